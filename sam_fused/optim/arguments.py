"""What SAM's constructor is given: a base optimizer as a class or an instance, our keywords beside its own, parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_fused.ops.dtypes import SUPPORTED, SUPPORTED_NAMES
from sam_fused.ops.functional import inverse_scale

from . import groups


def keys_of(params: Any, base_optimizer: Any) -> set[str]:
    """The names that the base optimizer owns, in its groups or its constructor. Refuses bases that cannot be one."""
    if isinstance(params, Optimizer):
        if base_optimizer is not None:
            raise TypeError(
                "base_optimizer: expected nothing beside an optimizer instance, got "
                f"{getattr(base_optimizer, '__name__', type(base_optimizer).__name__)}: "
                "pass SAM(optimizer) or SAM(params, optimizer_class)."
            )
        base_class: type[Optimizer] = type(params)
        keys = set(params.defaults)
    else:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            got = getattr(base_optimizer, "__name__", f"an instance of {type(base_optimizer).__name__}")
            got = "nothing" if base_optimizer is None else got
            raise TypeError(
                f"base_optimizer: expected an optimizer class such as torch.optim.SGD, got {got}: "
                "pass SAM(params, torch.optim.SGD, lr=0.1), or an optimizer instance alone, SAM(optimizer)."
            )
        base_class = base_optimizer
        keys = _keywords_of(base_class)
    for name, reason in (
        ("LBFGS", "calls its closure many times at weights of its own choosing"),
        ("SparseAdam", "needs sparse gradients, which SAM's norm and perturbation do not take"),
    ):
        if base_class.__name__ == name:
            raise TypeError(f"base_optimizer: expected a first-order optimizer, got {name}, which {reason}: use SGD or AdamW.")
    return keys


def _keywords_of(base_class: type[Optimizer]) -> set[str]:
    """The keywords of the constructor, and of its parents' as far as it forwards ``**kwargs`` to them."""
    keys: set[str] = set()
    for owner in base_class.__mro__:
        if "__init__" not in vars(owner) or owner in (Optimizer, object):
            continue
        try:
            parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
        except (TypeError, ValueError):  # written in C
            continue
        keys.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return keys - {"self"}


def refuse_hidden(base: Optimizer, names: dict[str, str], given: dict[str, Any]) -> dict[str, str]:
    """The keys' names now that the base's groups can be seen: its constructor may not have named all that it puts there."""
    final = groups.key_names({key for key, name in names.items() if key != name} | set(base.defaults))
    for name in given:
        if final[name] != names[name]:
            raise TypeError(
                f"{name}: expected {final[name]} for SAM because {type(base).__name__} keeps a {name} of its own, got {name}="
                f"{given[name]!r}: pass {final[name]}={given[name]!r}."
            )
    return final


def own_values(kwargs: dict[str, Any], names: dict[str, str], params: Any, base_optimizer: Any) -> dict[str, Any]:
    """Takes SAM's own keywords out of ``kwargs``, leaving the base optimizer's."""
    values = {}
    for name, default in groups.DEFAULTS.items():
        key = names[name]
        if key != name and name in kwargs and not isinstance(params, Optimizer):
            raise TypeError(
                f"{name}: expected {key} for SAM because {base_optimizer.__name__} has a {name} of its own, got {name}="
                f"{kwargs[name]!r}: pass {key}={default} for SAM's, and set the base's own where you construct it, "
                f"SAM({base_optimizer.__name__}(params, {name}=...), {key}=...)."
            )
        values[name] = kwargs.pop(key, kwargs.pop(name, default) if isinstance(params, Optimizer) else default)
    return values


# None is a value that a base optimizer with a limit of its own must see.
NOT_GIVEN: Any = object()

# SAM's settings that no group holds, as they are when nothing is said.
_NO_SETTINGS = {
    "p": 2,
    "normalize": True,
    "max_grad_norm": NOT_GIVEN,
    "model": None,
    "same_dropout": False,
    "capturable": False,
}


def own_settings(kwargs: dict[str, Any], settings: dict[str, Any], base_keys: set[str]) -> dict[str, Any]:
    """SAM's settings that no group holds. What the base optimizer has a keyword for goes to it, and ours is ``sam_<name>``."""
    for name, value in list(settings.items()):
        if name not in base_keys:
            continue
        if value is not _NO_SETTINGS[name]:
            kwargs[name] = value
        settings[name] = kwargs.pop(groups.PREFIX + name, _NO_SETTINGS[name])
    if settings["max_grad_norm"] is NOT_GIVEN:
        settings["max_grad_norm"] = None
    return settings


def check_limit(value: Any) -> None:
    """Refuses a ``max_grad_norm`` that is none. What is on a device is not looked at: that would be waited for."""
    if value is None or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_cpu):
        return
    if isinstance(value, Tensor):
        value = value.detach()
        is_number = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not float(value) > 0:
        raise ValueError(f"max_grad_norm: expected a number above 0 or None, got {value!r}: use for example 1.0.")


def check_norm(p: Any, normalize: Any) -> None:
    """Refuses a perturbation that is none of those there are."""
    if isinstance(p, bool) or not isinstance(p, Real) or p not in (2, math.inf):
        raise ValueError(f"p: expected 2 or math.inf, the norm that bounds the perturbation, got {p!r}: use 2, or math.inf.")
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize: expected True or False, got {normalize!r}: False is e = rho g.")
    if p != 2 and not normalize:
        raise ValueError(
            "normalize: expected True with p=inf because signs have no length to divide by, got False: leave one of them out."
        )


def inverse_of(grad_scale: float | Tensor | None) -> Tensor | None:
    """A loss scale as what gradients are multiplied with. What is on a device is not looked at: that would be waited for."""
    if grad_scale is None:
        return None
    known = not isinstance(grad_scale, Tensor) or grad_scale.is_cpu
    is_number = grad_scale.numel() == 1 if isinstance(grad_scale, Tensor) else isinstance(grad_scale, Real)
    if not is_number or isinstance(grad_scale, bool) or (known and not 0 < float(grad_scale) < math.inf):
        raise ValueError(f"grad_scale: expected a finite number above 0, got {grad_scale!r}: pass scaler.get_scale().")
    return inverse_scale(grad_scale.detach() if isinstance(grad_scale, Tensor) else torch.tensor(float(grad_scale)))


def check_params(params: Iterable[Tensor]) -> None:
    """Refuses parameters that the kernels cannot read, and a parameter that is in a group twice."""
    params = list(params)
    if len(set(map(id, params))) != len(params):
        # torch only warns. Perturbed twice, the second backup would be of perturbed weights.
        raise ValueError(
            f"params: expected each parameter once in a group, got {len(params) - len(set(map(id, params)))} more than once: "
            "drop the duplicates, for example with dict.fromkeys(params)."
        )
    for index, param in enumerate(params):
        if type(param).__name__ == "DTensor":  # by name: the class would import all of torch.distributed
            raise TypeError(
                f"parameter {index} of shape {tuple(param.shape)}: expected a tensor of this process alone, got a DTensor, "
                "whose norm is spread over processes: train this model with its base optimizer, or under DDP."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.size(), strict=True)):
            raise ValueError(
                f"parameter {index} of shape {tuple(param.shape)}: expected memory for every element, got an expanded tensor: "
                "call .clone(memory_format=torch.contiguous_format) on it first."
            )
        if param.dtype not in SUPPORTED or param.is_quantized or param.layout != torch.strided:
            raise TypeError(
                f"parameter {index} of shape {tuple(param.shape)}: expected {SUPPORTED_NAMES}, dense, got {param.dtype} "
                f"({param.layout}): convert it, or give it to an optimizer of its own."
            )
