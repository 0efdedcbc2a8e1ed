"""What a batch is, and how a loss is had from one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


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
            remedy = "pass [(x, y)] if (x, y) is all of the data" if isinstance(batch, Tensor) else "give each batch these two"
            raise TypeError(
                f"batches: expected batches (x, y), got {got}: {remedy}, or decorate a loss(model, batch) with batch_loss."
            )
        return loss(model(batch[0]), batch[1])

    return of_batch


def modules_of(loss: Any) -> list[nn.Module]:
    """The loss itself where it is a module, also inside of ``batch_loss``: it may have buffers."""
    function = loss._function if isinstance(loss, batch_loss) else loss
    return [function] if isinstance(function, nn.Module) else []


def first_dimension(batch: Any) -> int:
    """The number of samples, if all tensors of a batch agree on it: the size of their first dimension.

    A list inside of a batch may hold one tensor per sample as well as several tensors over all samples: what the others say
    decides. Nothing is guessed: a wrong number would be a wrong weight, and a wrong mean.

    Raises:
        ValueError: there is no such tensor, or they do not agree.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if _is_plain(batch) else [batch]
    votes = [vote for vote in map(_possible_counts, parts) if vote is not None]
    agreed = set.intersection(*votes) if votes else set()
    if len(agreed) == 1:
        return agreed.pop()
    if votes:
        got = f"{' or '.join(map(str, sorted(set.union(*votes))))} in a {type(batch).__name__}"
        expected = "one size of the first dimension in all tensors of a batch"
    else:
        got = f"none in a {type(batch).__name__}"
        expected = "a tensor with a first dimension in each batch"
    raise ValueError(f"count: expected {expected}, got {got}: say how many samples a batch has by count=.")


def _is_plain(batch: Any) -> bool:
    """A tuple or a list of parts. A packed sequence is a tuple, but one thing."""
    return isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)


def _possible_counts(part: Any) -> set[int] | None:
    """How many samples a part of a batch may be of; None: it does not say."""
    if isinstance(part, PackedSequence):
        return {int(part.batch_sizes[0])}
    if isinstance(part, Tensor):
        return {part.size(0)} if part.dim() else None
    if not (isinstance(part, Mapping) or _is_plain(part)):
        return None
    inner = list(map(_possible_counts, part.values() if isinstance(part, Mapping) else part))
    said = [vote for vote in inner if vote is not None]
    if not said:
        return None
    found = set.intersection(*said)
    if not isinstance(part, Mapping) and len(said) == len(inner):
        found = found | {len(inner)}  # one per sample
    return found


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def moved_to(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on the device; the batch itself where there is nothing to move.

    What is more than a tuple, a list or a dict and has a ``to`` of its own (a packed sequence, a tokenizer's encoding, a graph)
    is moved by that.
    """
    if device is None:
        return batch
    opaque = not isinstance(batch, (Tensor, Mapping, tuple, list))
    if not opaque and all(tensor.device == device for tensor in _tensors(batch)) and not _has_opaque(batch):
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if type(batch) not in (dict, tuple, list) and callable(getattr(batch, "to", None)):
        movable: Any = batch if isinstance(batch, tuple) else copy.copy(batch)  # some move themselves in place
        return movable.to(device)
    if isinstance(batch, Mapping):
        moved = {key: moved_to(part, device) for key, part in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return moved
        like = copy.copy(batch)
        like.update(moved)
        return like
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved_to(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved_to(part, device) for part in batch)
    return batch


def _has_opaque(batch: Any) -> bool:
    """Whether something in it has a ``to`` of its own, and tensors that only it knows."""
    if isinstance(batch, (Mapping, tuple, list)):
        return any(map(_has_opaque, batch.values() if isinstance(batch, Mapping) else batch))
    return not isinstance(batch, Tensor) and callable(getattr(batch, "to", None))
