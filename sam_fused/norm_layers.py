"""Which parameters belong to normalisation layers, for SAM-ON."""

from __future__ import annotations

from typing import Any

from torch import nn

# By name as well: large models bring norm layers of their own (LlamaRMSNorm, Float32LayerNorm).
_TYPES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_IN_NAMES = ("norm",)


def is_norm_layer(module: nn.Module) -> bool:
    """Batch, layer, group, instance and RMS normalisation, and any class with "norm" in its name that holds no other module and
    no matrix: a linear layer over normalised inputs is a ``NormedLinear``, too."""
    named = any(part in type(module).__name__.lower() for part in _IN_NAMES)
    gains = all(param.dim() <= 1 for param in module.parameters(recurse=False))
    return isinstance(module, _TYPES) or (named and gains and not any(module.children()))


def norm_parameters(model: nn.Module, **norm_group: Any) -> list[dict[str, Any]]:
    """Two parameter groups: the normalisation layers' parameters, which are perturbed, and all others, which are not. That is
    SAM-ON [2306.04226] in one line: the norm is taken over the first group alone, and only it is backed up.

    Example:
        >>> import torch
        >>> from sam_fused import SAM, norm_parameters
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> optimizer = SAM(norm_parameters(model), torch.optim.SGD, rho=0.5, lr=0.1, adaptive="layerwise")
        >>> [len(group["params"]) for group in optimizer.param_groups], optimizer.param_groups[1]["perturb"]
        ([2, 2], False)

    Args:
        model: normalisation layers are found by type (``torch.nn``'s), and by "norm" in the name of a class that holds no other
            module and no parameter of two dimensions or more. A parameter that a norm layer shares with another one counts as
            the norm layer's.
        **norm_group: further keys of the first group, for example ``weight_decay=0.0``.

    Returns:
        ``[{"params": ..., "perturb": True}, {"params": ..., "perturb": False}]``, each parameter once, in the model's order;
        the second one is left out where it would be empty.

    Raises:
        TypeError: the model is no module.
        ValueError: there is no normalisation layer with parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}: pass the model itself.")
    own = {id(param) for module in model.modules() if is_norm_layer(module) for param in module.parameters(recurse=False)}
    norms = [param for param in model.parameters() if id(param) in own]
    others = [param for param in model.parameters() if id(param) not in own]
    if not norms:
        raise ValueError(
            f"model: expected a normalisation layer with parameters, got none in {type(model).__name__}: SAM-ON perturbs "
            "nothing else, use SAM(model.parameters(), ...)."
        )
    groups: list[dict[str, Any]] = [{"params": norms, "perturb": True, **norm_group}]
    return [*groups, {"params": others, "perturb": False}] if others else groups
