"""What a DataLoader keeps between two passes: the generators it draws from, and workers that persist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


def generators(batches: Any) -> Iterator[torch.Generator]:
    """Those that a DataLoader and its samplers draw from beside the default ones."""
    sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    yield from dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator))


def check_idle(batches: Any) -> None:
    """Workers that persist serve one loop at a time: a pass inside a loop over the same loader would end that loop, silently.

    Raises:
        ValueError: such a loop has not come to its end.
    """
    if _persists(batches) and getattr(batches._iterator, "_tasks_outstanding", 0) > 0:
        raise ValueError(
            "batches: expected a loader that is not in use, got one with persistent_workers in the middle of an epoch, which a "
            "pass would end: measure after the epoch, or with a DataLoader of its own."
        )


def start_workers(batches: Any) -> None:
    """Starts workers that persist before the first pass: a loader that starts them draws one random number more than later."""
    if _persists(batches) and batches._iterator is None:
        iter(batches)


def stop_workers(batches: Any) -> None:
    """After a pass that broke off: workers that persist are in the middle of it, or were interrupted too. New ones are started
    when the loader is used again."""
    if _persists(batches):
        batches._iterator = None


def _persists(batches: Any) -> bool:
    return isinstance(batches, DataLoader) and batches.persistent_workers
