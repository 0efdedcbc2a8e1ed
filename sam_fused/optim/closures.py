"""Closures: forward, backward, return the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_fused.ops.functional import weighted_mean

from .state import Control


def evaluate(control: Control, closure: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it with gradients enabled; what it calls of the optimizer is refused."""
    control.evaluating = True
    try:
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
