"""What a batch is, and how a loss is had from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn


class batch_loss:
    """Marks a loss that is computed from the model and a batch as the loader yields it.

    Without it a loss is called as torch's are, ``loss(model(x), y)`` for a batch ``(x, y)``.

    Example:
        >>> @batch_loss
        ... def loss(model, batch):
        ...     return model(**batch).loss
    """

    def __init__(self, function: Callable[[nn.Module, Any], Tensor]) -> None:
        if not callable(function):
            raise TypeError(
                f"batch_loss: expected a function (model, batch) -> mean loss, got {type(function).__name__}: decorate one."
            )
        self._function = function
        update_wrapper(self, function)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self._function(model, batch)


def check_batches(batches: Any) -> None:
    if not isinstance(batches, Iterable):  # nor is a map-style Dataset, whose items are single samples
        raise TypeError(
            f"batches: expected a DataLoader or a list of batches, got {type(batches).__name__}: pass one of these."
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: expected what can be iterated again and again, got a {type(batches).__name__}, which is exhausted after "
            "one pass: pass list(batches), or the loader itself."
        )


def supervised(loss: Callable[[Any, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    def of_batch(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batches: expected batches (x, y), got {got}: decorate a loss(model, batch) with batch_loss.")
        return loss(model(batch[0]), batch[1])

    return of_batch


def first_dimension(batch: Any) -> int:
    """The size of the first dimension of the first tensor in a batch."""
    tensor = next(_tensors(batch), None)
    if tensor is None or tensor.dim() == 0:
        raise ValueError(
            f"count: expected a tensor with a first dimension in each batch, got none in a {type(batch).__name__}: say how "
            "many samples a batch has by count=."
        )
    return tensor.size(0)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def moved_to(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on the device; the batch itself where there is nothing to move."""
    if device is None or all(tensor.device == device for tensor in _tensors(batch)):
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved_to(part, device) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved_to(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved_to(part, device) for part in batch)
    return batch
