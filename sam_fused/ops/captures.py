"""CUDA graphs: whether one is being captured, and what has to live as long as it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Where nobody says when a graph ends, what it reads lives as long as the process.
_for_ever: dict[int, Any] = {}
_kept = _for_ever


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now on ``device`` goes into a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_if_captured(read: Any, device: torch.device) -> None:
    """Keeps what a graph that is being captured will read: replays find it at the address that it has now."""
    if is_capturing(device):
        _kept[id(read)] = read


@contextmanager
def kept_in(owner: dict[int, Any]) -> Iterator[None]:
    """What captures inside read is kept in ``owner``, for as long as that lives."""
    global _kept
    before, _kept = _kept, owner
    try:
        yield
    finally:
        _kept = before
