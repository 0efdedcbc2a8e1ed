"""Cutting a batch into micro-batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def micro_batches(batch: tuple[Any, ...], count: int) -> list[tuple[tuple[Any, ...], int]]:
    """``count`` tuples of arguments and how many samples each has: sizes differ by one at most, the larger ones come first.

    Tensors are cut along their first dimension, in nested lists, tuples, dicts and dataclasses too; views, no copies.
    Everything else, tensors without dimensions and containers without tensors included, goes into each micro-batch as it is.

    Raises:
        ValueError: no tensor to cut, tensors that differ in the number of samples, fewer samples than micro-batches.
        TypeError: a packed sequence or a nested tensor, whose first dimension is not the batch.
    """
    sizes: list[tuple[str, int]] = []
    for index, argument in enumerate(batch):
        _collect(argument, f"argument {index}", sizes)
    if not sizes:
        raise ValueError(
            "step(closure, *batch): expected tensors whose first dimension is the batch, got none: pass the inputs and "
            "targets, or cut the batch yourself and use micro_batch()."
        )
    (first, samples), *rest = sizes
    for name, other in rest:
        if other != samples:
            raise ValueError(
                f"step(closure, *batch): expected the same number of samples in every tensor, got {samples} in {first} and "
                f"{other} in {name}: make their first dimensions agree, or cut the batch yourself and use micro_batch()."
            )
    if samples < count:
        raise ValueError(
            f"step(closure, *batch): expected at least as many samples as the {count} micro-batches, got {samples}: pass "
            "larger batches, or set num_micro_batches lower."
        )
    small, larger = divmod(samples, count)
    found, begin = [], 0
    for index in range(count):
        size = small + (index < larger)
        found.append((tuple(_cut(argument, begin, size) for argument in batch), size))
        begin += size
    return found


def _collect(value: Any, name: str, sizes: list[tuple[str, int]], around: tuple[int, ...] = ()) -> None:
    if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.is_nested):
        raise TypeError(
            f"step(closure, *batch): expected tensors whose first dimension is the batch, got a {type(value).__name__} of "
            f"sequences in {name}: pass padded sequences and their lengths, or cut the batch yourself and use micro_batch()."
        )
    if isinstance(value, Tensor):
        if value.dim():
            sizes.append((name, value.size(0)))
        return
    if id(value) in around:
        raise ValueError(
            f"step(closure, *batch): expected containers that do not hold themselves, got one in {name}: pass its tensors."
        )
    around = (*around, id(value))
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _collect(entry, f"{name}[{key!r}]", sizes, around)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _collect(entry, f"{name}[{index}]", sizes, around)
    elif _is_dataclass(value):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), f"{name}.{field.name}", sizes, around)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _cut(value: Any, begin: int, size: int) -> Any:
    if isinstance(value, Tensor):
        return value.narrow(0, begin, size) if value.dim() else value
    if isinstance(value, Mapping):
        pieces = {key: _cut(entry, begin, size) for key, entry in value.items()}
        if all(pieces[key] is entry for key, entry in value.items()):
            return value
        # A copy keeps the type: tokenizers return mappings with attributes. Of a class that does not say how it is copied, the
        # copy would share what it holds with the batch.
        keeps_its_own = isinstance(value, dict) or hasattr(type(value), "__copy__")
        cut: Any = copy.copy(value) if keeps_its_own else {}
        for key, piece in pieces.items():
            cut[key] = piece
        return cut
    if isinstance(value, (list, tuple)):
        entries = [_cut(entry, begin, size) for entry in value]
        return value if all(map(is_, entries, value)) else _like(value, entries)
    if _is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields = {name: _cut(entry, begin, size) for name, entry in own.items()}
        if all(fields[name] is entry for name, entry in own.items()):
            return value
        cut = copy.copy(value)
        for name, piece in fields.items():  # of frozen ones, too, and such as no constructor takes
            object.__setattr__(cut, name, piece)
        return cut
    return value


def _like(value: Any, entries: list[Any]) -> Any:
    if isinstance(value, list):
        cut = copy.copy(value)
        cut[:] = entries
        return cut
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    try:
        return type(value)(entries)
    except TypeError:  # a constructor of its own
        return tuple(entries)
