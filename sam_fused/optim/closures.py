"""Closures: forward, backward, return the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def evaluate(closure: Callable[[], Any]) -> Any:
    """Calls it with gradients enabled."""
    if torch.is_grad_enabled():
        return closure()
    with torch.enable_grad():
        return closure()


def detached(loss: Any) -> Any:
    """What a closure returned, without the graph that it would keep alive."""
    if isinstance(loss, Tensor):
        return loss.detach()
    if isinstance(loss, dict):
        return {key: detached(value) for key, value in loss.items()}
    if type(loss) in (tuple, list):
        return type(loss)(map(detached, loss))
    return loss
