"""Closures: forward, backward, return the loss; and what becomes of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_fused.ops.functional import weighted_mean

from .state import Control


class Losses(NamedTuple):
    """The two losses of the last ``step(closure)``: at the clean and at the perturbed weights, detached, on their device.

    Their difference is a free reading of the sharpness in the ascent direction, L(w + e) - L(w) [2211.05729]. None is what the
    step did not see: both after a step by hand, the perturbed one while SAM is switched off, the clean one after
    ``first_pass_done=True`` and with an ``ascent_closure``, whose loss is another one.
    """

    clean: Any
    perturbed: Any

    @property
    def rise(self) -> Any:
        """``perturbed - clean``; None where one of the two is. Raises TypeError if the closure returned something else than a
        loss."""
        if self.clean is None or self.perturbed is None:
            return None
        if not all(isinstance(loss, (Tensor, float, int)) for loss in self):
            raise TypeError(
                f"rise: expected a closure that returns the loss, got {type(self.clean).__name__}: return the loss alone."
            )
        return self.perturbed - self.clean


def check_callable(closure: Any, name: str) -> None:
    """Before anything is done for it."""
    if closure is not None and not callable(closure):
        raise TypeError(
            f"{name}: expected a function that runs forward and backward and returns the loss, got "
            f"{type(closure).__name__}: pass the function itself, which is called at both weights."
        )


def evaluate(control: Control, closure: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it with gradients enabled; what it calls of the optimizer is refused."""
    try:
        control.evaluating = True
        if torch.is_grad_enabled():
            return closure(*arguments)
        with torch.enable_grad():
            return closure(*arguments)
    finally:
        control.evaluating = False


def mean_loss(losses: list[Any], weights: list[float]) -> Any:
    """What micro-batches' losses say about the batch's: a tensor on their device, which nothing waits for, or a number."""
    if all(isinstance(loss, Tensor) for loss in losses):
        return weighted_mean(losses, weights)
    return sum(float(loss) * weight for loss, weight in zip(losses, weights, strict=True))


def detached(loss: Any) -> Any:
    """What a closure returned, without the graph that it would keep alive."""
    if isinstance(loss, Tensor):
        return loss.detach()
    if isinstance(loss, dict):
        return {key: detached(value) for key, value in loss.items()}
    if type(loss) in (tuple, list):
        return type(loss)(map(detached, loss))
    return loss
