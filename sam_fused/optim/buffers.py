"""Backups and accumulators: one flat buffer per device and dtype each, allocated at first use and kept.

A fresh backup every step costs as much in page faults as the whole of a naive SAM step, and an address that changes makes
address tables and captured graphs stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam_fused.ops.checks import is_dense, same_layout
from sam_fused.ops.fingerprint import PLAIN_TYPES

# A tensor's backup starts on a cache line: streaming stores of neighbours then never share one.
_ALIGNMENT = 64


def own_dtype(dtype: torch.dtype) -> torch.dtype:
    """A backup's: its parameter's."""
    return dtype


class FlatBuffers:
    """A tensor for each parameter, laid out as it and on its device; ``dtype_for`` says of which dtype."""

    def __init__(self, dtype_for: Callable[[torch.dtype], torch.dtype] = own_dtype) -> None:
        self._dtype_for = dtype_for
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def views(self, params: Sequence[Tensor]) -> list[Tensor]:
        """One for each parameter. Existing ones keep their address; the missing ones are allocated together."""
        missing = [p for p in params if not self._has(p)]
        places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in missing:
            if type(param) in PLAIN_TYPES:
                places.setdefault((param.device, self._dtype_for(param.dtype)), []).append(param)
            else:  # a subclass knows best how it is stored
                self._views[id(param)] = (param, torch.empty_like(param.detach(), dtype=self._dtype_for(param.dtype)))
        for (device, dtype), tensors in places.items():
            self._allocate(tensors, device, dtype)
        return [self._views[id(p)][1] for p in params]

    def has_all(self, params: Sequence[Tensor]) -> bool:
        """Whether each of them has one, laid out as it is now."""
        return all(map(self._has, params))

    def keep(self, params: Sequence[Tensor]) -> None:
        """Forgets what belongs to any other parameter. Their memory is freed when no view of the same buffer is left."""
        kept = set(map(id, params))
        self._views = {key: held for key, held in self._views.items() if key in kept}

    def _has(self, param: Tensor) -> bool:
        held = self._views.get(id(param))
        if held is None or held[0] is not param:
            return False
        view = held[1]
        if view.dtype != self._dtype_for(param.dtype) or view.device != param.device:
            return False
        return same_layout(param, view) if is_dense(param) else view.size() == param.size()

    def _allocate(self, params: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        unit = _ALIGNMENT // dtype.itemsize
        offsets, total = [], 0
        for param in params:
            offsets.append(total)
            total += -(-param.numel() // unit) * unit
        flat = torch.empty(total + unit, dtype=dtype, device=device)
        start = -(flat.data_ptr() // dtype.itemsize) % unit
        for param, offset in zip(params, offsets, strict=True):
            strides = param.stride() if is_dense(param) else torch.empty(param.size(), device="meta").stride()
            self._views[id(param)] = (param, flat.as_strided(param.size(), strides, start + offset))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        storages = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for _, view in self._views.values()}
        return sum(storages.values())

    def release(self) -> None:
        self._views.clear()
