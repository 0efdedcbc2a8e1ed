"""A set's rows where kernels on a device can read them, with everything that is looked up or allocated once for the set."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import captures
from ..dtypes import CODES, arithmetic_dtype
from ..rows import CHUNK, COLUMNS, FIRST, ROLES, ROW_WORDS, column_of
from .transfer import to_device

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_NUMEL, _GROUP, _SCALING, _CODES = (COLUMNS.index(name) for name in ("numel", "group", "scaling", "dtypes"))

# Kernels are compiled for the dtypes of the roles that they read. In this order, so that rows which differ in a later role
# alone stay neighbours for the operations that do not read it.
_SIGNATURE = ("grad", "weight", "state0", "state1", "state2")

# Vectors of gradient addresses that are kept on the device: a training loop's allocator comes back to a few.
_ADDRESS_VECTORS = 8


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one signature, none of them empty, and the chunks they own."""

    dtypes: tuple[torch.dtype, ...]
    row: int
    rows: int
    chunk: int
    chunks: int

    @property
    def place(self) -> tuple[int, int, int]:
        return self.row, self.rows, self.chunk


class DeviceTable:
    """The rows of ``ops/rows.py`` sorted by signature, empty tensors last, and the number of each row's first chunk.

    Device memory comes into being when it is first asked for, and stays; except inside a graph capture, where what is made is
    the graph's, which fills it on every replay and not before.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self.device = device
        listed = rows.tolist()
        self._order = sorted(range(len(listed)), key=lambda index: _sort_key(listed[index]))
        is_sorted = self._order == list(range(len(listed)))
        self._permutation = None if is_sorted else torch.tensor(self._order, device="cpu")
        self._listed = [listed[index] for index in self._order]
        self._first_chunk = [0]
        for row in self._listed:
            self._first_chunk.append(self._first_chunk[-1] + -(-row[_NUMEL] // CHUNK))
        self.rows = len(listed)
        self.chunks = self._first_chunk[-1]
        self.groups = 1 + max((row[_GROUP] for row in listed), default=-1)
        self.is_scaled = any(row[_SCALING] for row in listed)
        self.has_first_steps = any(row[FIRST] for row in listed)
        self._runs: dict[tuple[str, ...], list[Run]] = {}
        self._accumulators_fit: set[tuple[str, bool]] = set()
        self._kept: dict[str, Tensor] = {}
        self._number = 0
        self._hyper: dict[int, tuple[Tensor, Tensor]] = {}
        self._grads: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def runs(self, *roles: str) -> list[Run]:
        """The table cut up into rows that agree in the dtypes of ``roles``."""
        found = self._runs.get(roles)
        if found is None:
            found = self._runs[roles] = self._cut(roles)
        return found

    def _cut(self, roles: tuple[str, ...]) -> list[Run]:
        runs, row = [], 0
        filled = [listed for listed in self._listed if listed[_NUMEL]]
        for dtypes, members in groupby(filled, key=lambda listed: tuple(_dtype(listed, role) for role in roles)):
            rows = len(list(members))
            chunk = self._first_chunk[row]
            runs.append(Run(dtypes, row, rows, chunk, self._first_chunk[row + rows] - chunk))
            row += rows
        return runs

    def lacking(self, role: str, used: list[float]) -> int | None:
        """A tensor, counted as the rows came, that has no ``role`` although its group, by ``used[group]``, uses it."""
        for place, row in zip(self._order, self._listed, strict=True):
            if row[_NUMEL] and not row[column_of(role)] and used[row[_GROUP]]:
                return place
        return None

    def check_accumulators(self, deciding: str, wanted: bool) -> None:
        """Accumulators where there is a weight and only there, in the dtype of arithmetic on the ``deciding`` role: kernels ask
        for neither."""
        if (deciding, wanted) in self._accumulators_fit:
            return
        for place, row in zip(self._order, self._listed, strict=True):
            found = _dtype(row, "accumulator") if row[column_of("accumulator")] else "none"
            expected = arithmetic_dtype(_dtype(row, deciding)) if wanted else "none"
            if row[_NUMEL] and found != expected:
                raise ValueError(
                    f"accumulators: expected {expected} for tensor {place} because there is {'a' if wanted else 'no'} weight, "
                    f"got {found}: pass a weight and an accumulator for every tensor, in what it is computed in, or neither."
                )
        self._accumulators_fit.add((deciding, wanted))

    def first_steps_taken(self) -> None:
        """The device has cleared ``first`` everywhere, so nothing needs to be cleared in later steps."""
        if not captures.is_capturing(self.device):
            self.has_first_steps = False

    # ---- on the device -------------------------------------------------------------------------------------------------------

    def on_device(self) -> AbstractContextManager[None]:
        """Launches, and looks for the current stream, on this table's device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        kept = self._kept.get(name)
        if kept is None:
            kept = make()
            if not captures.is_capturing(self.device):
                self._kept[name] = kept
        else:
            captures.keep_if_captured(kept, self.device)
        return kept

    def _words(self) -> Tensor:
        if self.has_first_steps and captures.is_capturing(self.device):
            raise RuntimeError(
                "capture: expected momentum buffers that exist, got a first step, which every replay would repeat: "
                "take one step before capturing."
            )
        words = [word for row in self._listed for word in row] + self._first_chunk
        return to_device(torch.tensor(words, dtype=torch.int64, device="cpu"), self.device)

    def pointers(self) -> tuple[Tensor, Tensor]:
        """The rows and their first chunks, on the device."""
        words = self._keep("words", self._words)
        return words, words[self.rows * ROW_WORDS :]

    def slots(self) -> Tensor:
        """Memory for three fp64 sums per chunk."""
        return self._keep("slots", lambda: torch.empty(3 * self.chunks, dtype=torch.float64, device=self.device))

    def ticket(self) -> Tensor:
        """A counter that is 0 between launches."""
        return self._keep("ticket", lambda: torch.zeros(1, dtype=torch.int32, device=self.device))

    def marks(self, count: int) -> Tensor:
        """A number for each launch of a perturbation: of the last one in which it took place."""
        return self._keep("marks", lambda: torch.zeros(count, dtype=torch.int64, device=self.device))

    def next_number(self) -> int:
        """A number for a perturbation, which none before it had."""
        self._number += 1
        return self._number

    def has_seen(self, hyper: Tensor) -> bool:
        """Whether ``hyper`` is the last table, on the CPU, of its width, to the last value."""
        last = self._hyper.get(hyper.size(1))
        return last is not None and torch.equal(last[0], hyper)

    def hyper(self, hyper: Tensor) -> Tensor:
        """The hyper-parameters on the device: uploaded when a value has changed."""
        if hyper.device.type == "cuda":
            return hyper
        if self.has_seen(hyper):
            there = self._hyper[hyper.size(1)][1]
            captures.keep_if_captured(there, self.device)
            return there
        there = to_device(hyper.view(torch.int64).reshape(-1), self.device).view(torch.float64)
        if not captures.is_capturing(self.device):
            self._hyper[hyper.size(1)] = (hyper.clone(), there)
        return there

    def grads(self, addresses: Tensor) -> Tensor:
        """The gradients' addresses on the device, in the table's order.

        A graph brings its own: an entry kept here may be dropped for a newer one while the graph still reads it.
        """
        if self._permutation is not None:
            addresses = addresses[self._permutation]
        if captures.is_capturing(self.device):
            return to_device(addresses, self.device)
        key = (_stream(self.device), *addresses.tolist())
        there = self._grads.get(key)
        if there is None:
            there = self._grads[key] = to_device(addresses, self.device)
            if len(self._grads) > _ADDRESS_VECTORS:
                self._grads.popitem(last=False)
        else:
            self._grads.move_to_end(key)
        return there


def _stream(device: torch.device) -> int:
    """A vector is read on the stream that it was written on, so that dropping it needs no waiting."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _dtype(row: list[int], role: str) -> torch.dtype:
    """The dtype of a role; the weight's where a row has no such tensor, so that it does not cost a launch of its own."""
    is_there = role == "grad" or row[column_of(role)]
    return _DTYPES[row[_CODES] >> (8 * ROLES.index(role if is_there else "weight")) & 0xFF]


def _sort_key(row: list[int]) -> tuple[Any, ...]:
    return (row[_NUMEL] == 0, *(CODES[_dtype(row, role)] for role in _SIGNATURE))
