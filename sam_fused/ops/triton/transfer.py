"""Words from the host into device memory: pinned and asynchronous, or, inside a graph capture, as a kernel's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import captures

# Two arguments a word. A graph replays one such launch in about the time that a handful of words take.
_WORDS_PER_LAUNCH = 64


@contextmanager
def may_wait(device: torch.device) -> Iterator[None]:
    """For what happens once, or when something has gone wrong: waiting for the device is no error here, whatever the mode."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def to_device(words: Tensor, device: torch.device) -> Tensor:
    """A copy of an int64 tensor of one dimension, on the current stream of ``device``, the current one. Waits for nothing."""
    if device.type == "cpu":  # the interpreter's
        return words.clone()
    if captures.is_capturing(device):
        return by_value(words, device)
    return words.pin_memory().to(device, non_blocking=True)


def by_value(words: Tensor, device: torch.device) -> Tensor:
    """As ``to_device``, for a capture: a pinned buffer would have to outlive the graph, unchanged; arguments are part of it."""
    from .kernels_transfer import BIAS, write_words

    padded = -(-words.numel() // _WORDS_PER_LAUNCH) * _WORDS_PER_LAUNCH
    there = torch.empty(padded, dtype=torch.int64, device=device)
    values = words.tolist() + [0] * (padded - words.numel())
    for start in range(0, padded, _WORDS_PER_LAUNCH):
        halves = [half for word in values[start : start + _WORDS_PER_LAUNCH] for half in (word >> 32, word & 0xFFFFFFFF)]
        write_words[(1,)](there[start:], tuple(2 * half + BIAS.value for half in halves), num_warps=1)
    return there[: words.numel()]
