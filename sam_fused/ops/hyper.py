"""Tables of hyper-parameters: float64, a row per parameter group, written only when a value has changed.

On the CPU a table is read when an operation is called, so that a captured graph keeps what it held at the capture. What a graph
is to see changing lives on the device: values that are tensors there, and every value where the optimizer is capturable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import captures

Value = float | Tensor


def number(value: object) -> Value:
    """A hyper-parameter as a table takes it: a float, or a tensor on a device, which only the device reads."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.is_cpu else value
    return float(value)  # type: ignore[arg-type]


def is_known(value: object) -> bool:
    """Whether the host can look at the value without waiting for a device."""
    return not isinstance(value, Tensor) or value.is_cpu


class _DeviceTable:
    """A table at one address on one device. Written by copies that wait for nothing, or by the device itself."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.table = torch.zeros((rows, columns), dtype=torch.float64, device=device)
        self._written: list[list[float]] | None = None

    def update(self, floats: list[list[float]], tensors: list[tuple[int, int, Tensor]]) -> None:
        if floats != self._written:
            device = self.table.device
            if captures.is_capturing(device):
                raise RuntimeError(
                    "a step in a CUDA graph: expected the hyper-parameters of the step before the capture, got others, which "
                    "the graph would take from the host for ever: take one step with them first."
                )
            source = torch.tensor(floats, dtype=torch.float64, device="cpu")
            self.table.copy_(source.pin_memory() if device.type == "cuda" else source, non_blocking=True)
            self._written = [list(row) for row in floats]
        for row, column, tensor in tensors:
            self.table[row, column].copy_(tensor.detach().reshape(()))
            captures.keep_if_captured(tensor, self.table.device)


class HyperTable:
    """The hyper-parameters of one operation, group by group."""

    def __init__(self) -> None:
        self._floats: list[list[float]] = []
        self._tensors: list[tuple[int, int, Tensor]] = []
        self._host: Tensor | None = None
        self._devices: dict[torch.device, _DeviceTable] = {}
        self._capturable = False

    def update(self, values: Sequence[Sequence[Value]], capturable: bool = False) -> HyperTable:
        """Takes over the values of this step."""
        tensors = [(r, c, v) for r, row in enumerate(values) for c, v in enumerate(row) if isinstance(v, Tensor)]
        floats = [[0.0 if isinstance(value, Tensor) else value for value in row] for row in values]
        if floats != self._floats or tensors or self._tensors:
            self._floats = floats
            self._host = None
        self._tensors = tensors
        self._capturable = capturable
        return self

    def refresh(self) -> None:
        """Writes what has changed into the tables that are on devices, for the graphs that read them."""
        for there in self._devices.values():
            there.update(self._floats, self._tensors)

    def on(self, device: torch.device, *, compiled: bool = True) -> Tensor:
        """The table for an operation on ``device``: on the CPU, or there where it has to be. Python backends (``compiled``
        False) read it on the host, and wait for values that are on a device."""
        if compiled and (self._capturable or self._tensors):
            there = self._devices.get(device)
            shape = (len(self._floats), len(self._floats[0]) if self._floats else 0)
            if there is None or tuple(there.table.size()) != shape:
                there = self._devices[device] = _DeviceTable(*shape, device)
            there.update(self._floats, self._tensors)
            captures.keep_if_captured(there.table, device)
            return there.table
        if self._host is None:
            self._host = torch.tensor(self._floats, dtype=torch.float64, device="cpu")
            for row, column, tensor in self._tensors:
                self._host[row, column] = float(tensor.detach())
        return self._host
