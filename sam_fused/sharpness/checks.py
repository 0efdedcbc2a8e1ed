"""What arguments may be, and the packages that only some measurements need. Each error is one sentence."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def radius(value: Any, name: str) -> float:
    """A distance in weight space: a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}: pass a distance in weight space, as 0.05.")
    distance = float(value)
    if not (math.isfinite(distance) and distance >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {distance}: pass a distance in weight space, as 0.05.")
    return distance


def surface(value: Any) -> None:
    """By what it can do: the surface's own module imports this one."""
    if not hasattr(value, "hessian_product"):
        raise TypeError(
            f"surface: expected a LossSurface, got {type(value).__name__}: make one of the model, the loss and the batches, "
            "LossSurface(model, loss, batches)."
        )


def no_backward(parameters: Iterable[Tensor]) -> None:
    if any(parameter.grad is not None for parameter in parameters):
        raise TypeError(
            "loss: expected a function that computes the loss and no more, got one that calls backward(): leave that out, "
            "gradients are taken here."
        )


def whole(value: Any, name: str, least: int, why: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}: pass {least} or more, {why}.")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}: pass {least} or more, {why}.")
    return int(value)


def finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}: pass numbers, as [0.0, 0.5, 1.0].") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected finite numbers, got {number}: pass numbers, as [0.0, 0.5, 1.0].")
    return number


def positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a positive number, got {type(value).__name__}: pass a relative one, as 1e-6.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a positive number, got {number}: pass a relative one, as 1e-6.")
    return number


def function(value: Any, name: str, example: str) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}: pass {example}.")


def one_of(value: Any, name: str, known: Collection[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}: pass one of these.")
    return str(value)


def vector(value: Any, name: str, dimension: int) -> Tensor:
    """A direction or an offset as every function here holds it: ``[dimension]``, fp64, on the host."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}: pass one of shape [{dimension}].")
    if value.shape != (dimension,):
        raise ValueError(
            f"{name}: expected the shape [{dimension}], one entry per trainable parameter, got {list(value.shape)}: "
            "concatenate the parts in the order of surface.parameters."
        )
    return value.detach().cpu().double()


def package(module: str, why: str) -> ModuleType:
    """An optional package, imported when it is first needed.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != name:
            raise  # it is there, and misses something itself
        raise ModuleNotFoundError(
            f"{name}: expected it to be installed for {why}, got no such package: pip install 'sam_fused[sharpness]'.",
            name=name,
        ) from None


def no_graph(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a tensor that depends on the model's trainable parameters, got one without a graph: compute it "
            "without detach() and no_grad()."
        )


def dependent(used: bool) -> None:
    if not used:
        raise ValueError(
            "loss: expected a tensor that depends on the model's parameters, got no gradient for any of them in any batch: "
            "compute it from the model that the surface has."
        )


def scalar(loss: Any, number: int, finite: bool) -> Tensor:
    """The loss of batch ``number``: a real 0-dim tensor, and a finite one where it has to be."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a 0-dim tensor, got {type(loss).__name__} for batch {number}: return the mean loss.")
    if loss.dim() != 0:
        raise ValueError(
            f"loss: expected a 0-dim tensor, got the shape {list(loss.shape)} for batch {number}: return its mean."
        )
    if not loss.is_floating_point():
        raise TypeError(
            f"loss: expected a real floating-point tensor, got {loss.dtype} for batch {number}: return the mean loss."
        )
    if finite and not torch.isfinite(loss):
        raise ValueError(
            f"loss: expected a finite value, got {loss.item()} for batch {number}: look for what is wrong with the weights or "
            "the batch, or take a smaller radius if it is far from the weights."
        )
    return loss
