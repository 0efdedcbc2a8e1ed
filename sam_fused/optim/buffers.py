"""The backups: one flat buffer per device and dtype, allocated at first use and kept.

A fresh backup every step costs as much in page faults as the whole of a naive SAM step, and an address that changes makes
address tables and captured graphs stale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_fused.ops.checks import is_dense, same_layout
from sam_fused.ops.fingerprint import PLAIN_TYPES

# A tensor's backup starts on a cache line: streaming stores of neighbours then never share one.
_ALIGNMENT = 64


class BackupBuffers:
    """Backups of parameters, each laid out as its parameter, in the parameter's dtype and on its device."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def views(self, params: Sequence[Tensor]) -> list[Tensor]:
        """A backup for each parameter. Existing ones keep their address; the missing ones are allocated together."""
        missing = [p for p in params if not self._has(p)]
        places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in missing:
            if type(param) in PLAIN_TYPES:
                places.setdefault((param.device, param.dtype), []).append(param)
            else:  # a subclass (DTensor) knows best how it is stored
                self._views[id(param)] = (param, torch.empty_like(param.detach()))
        for (device, dtype), tensors in places.items():
            self._allocate(tensors, device, dtype)
        return [self._views[id(p)][1] for p in params]

    def keep(self, params: Sequence[Tensor]) -> None:
        """Forgets the backups of all parameters but these. Their memory is freed when no view of the same buffer is left."""
        kept = set(map(id, params))
        self._views = {key: held for key, held in self._views.items() if key in kept}

    def _has(self, param: Tensor) -> bool:
        held = self._views.get(id(param))
        if held is None or held[0] is not param:
            return False
        view = held[1]
        if view.dtype != param.dtype or view.device != param.device:
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
