"""The second pass by hand, for optimizers that a framework has wrapped in objects of its own (Lightning, Accelerate)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor

from .optim import SAM, MicroBatchSAM

Wanted = TypeVar("Wanted", bound=SAM)


def _inside(optimizer: Any, wanted: type[Wanted], function: str) -> Wanted:
    inner = optimizer
    while not isinstance(inner, wanted) or "base_optimizer" not in inner.__dict__:
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"{function}: expected a sam_fused.{wanted.__name__} optimizer or a wrapper around one, got "
                f"{type(optimizer).__name__}: construct {wanted.__name__}(...) and pass that."
            )
    return inner


def perturbed(optimizer: Any, *, grad_scale: float | Tensor | None = None) -> AbstractContextManager[None]:
    """``SAM.perturbed(grad_scale=)`` of the optimizer inside.

    Raises:
        TypeError: there is no SAM inside.
    """
    return _inside(optimizer, SAM, "perturbed").perturbed(grad_scale=grad_scale)


def micro_batch(
    optimizer: Any, weight: float | None = None, *, grad_scale: float | Tensor | None = None
) -> AbstractContextManager[None]:
    """``MicroBatchSAM.micro_batch(weight, grad_scale=)`` of the optimizer inside.

    Raises:
        TypeError: there is no MicroBatchSAM inside.
    """
    return _inside(optimizer, MicroBatchSAM, "micro_batch").micro_batch(weight, grad_scale=grad_scale)
