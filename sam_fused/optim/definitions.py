"""ASAM's definitions of T by name [2102.11600]: what ``adaptive`` says, tensor by tensor.

=============  =======================================================================  =====================================
``adaptive``   T                                                                        where from
=============  =======================================================================  =====================================
``"all"``      ``|w| + eta`` for every tensor; what ``True`` means                      the popular class, with eta = 0
``"weights"``  ``|w| + eta`` for tensors called weight, norm layers' too, 1 elsewhere   the authors' class
``"layerwise"``  ``||w||_F``, one number per tensor                                       SAM-ON's [2306.04226]
=============  =======================================================================  =====================================
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sam_fused.ops.directions import ELEMENTWISE, LAYERWISE, PLAIN

DEFINITIONS = ("all", "weights", "layerwise")


def definition(adaptive: bool | str) -> str | None:
    """The definition's name, None for SAM; what was said may be a bool, as in the popular class."""
    if isinstance(adaptive, str):
        return adaptive
    return "all" if adaptive else None


def scaling_of(group: dict[str, Any], adaptive: bool | str, model: nn.Module | None) -> list[int]:
    """How each parameter of the group is scaled.

    Raises:
        ValueError: ``"weights"``, and a parameter has no name.
    """
    kind = definition(adaptive)
    if kind == "weights":
        return [ELEMENTWISE if _is_weight(name) else PLAIN for name in _names(group, model)]
    return [{None: PLAIN, "all": ELEMENTWISE, "layerwise": LAYERWISE}[kind]] * len(group["params"])


def _names(group: dict[str, Any], model: nn.Module | None) -> list[str]:
    if "param_names" in group:
        names: list[str] = group["param_names"]
        if len(names) != len(group["params"]):
            raise ValueError(
                f"adaptive='weights': expected a name for every parameter, got {len(names)} names in a group of "
                f"{len(group['params'])}: add parameters by add_param_group(), or their names to the group's param_names."
            )
        return names
    known = {} if model is None else {id(param): name for name, param in model.named_parameters(remove_duplicate=False)}
    for index, param in enumerate(group["params"]):
        if id(param) not in known:
            whose = "the model has no such parameter" if known else "nobody has told the names"
            raise ValueError(
                f"adaptive='weights': expected a name for every parameter, got none for number {index} of its group, of shape "
                f"{tuple(param.shape)}, because {whose}: pass model.named_parameters() instead of model.parameters(), or "
                "model=model."
            )
    return [known[id(param)] for param in group["params"]]


def _is_weight(name: str) -> bool:
    """``weight``, ``weight_ih_l0``, ``in_proj_weight``; parametrised ones are ``parametrizations.weight.original0``."""
    *path, own = name.split(".")
    if "parametrizations" in path[:-1]:
        own = path[path.index("parametrizations") + 1]
    return "weight" in own
