"""The ascent: which tensors are perturbed, with which backups, and how they come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor

from sam_fused.ops import backends
from sam_fused.ops.checks import refuse_shared_memory
from sam_fused.ops.fingerprint import PLAIN_TYPES
from sam_fused.ops.metrics import perturbation_metrics
from sam_fused.ops.prepared import Gradients, HyperTable, TensorSet

from . import groups
from .buffers import BackupBuffers
from .state import Control

_serials = count()

# Sets of parameters that had gradients in a first pass are remembered: models that drop modules alternate between a few.
_REMEMBERED = 8


class Part:
    """The tensors of an ascent on one device: their set and their places in the list of all parameters."""

    def __init__(self, tensors: TensorSet, indices: list[int], total: int) -> None:
        self.tensors = tensors
        self.indices = indices
        self.serial = next(_serials)  # tells parts apart for as long as the process lives, which an id() does not
        self._all = len(indices) == total

    def pick(self, entries: list[Any]) -> list[Any]:
        return entries if self._all else [entries[index] for index in self.indices]


def backend_for(param: Tensor, forced: str | None) -> str:
    """The device's backend; for tensor subclasses the one that speaks torch, since their memory is not theirs alone."""
    if type(param) not in PLAIN_TYPES and forced is None:
        return "foreach"
    return backends.choose(param.device, forced)


def partition(
    params: Sequence[Tensor], indices: Sequence[int], forced: str | None
) -> dict[tuple[torch.device, str], list[int]]:
    """``indices`` by device and backend."""
    parts: dict[tuple[torch.device, str], list[int]] = {}
    for index in indices:
        parts.setdefault((params[index].device, backend_for(params[index], forced)), []).append(index)
    return parts


class Ascent:
    """Perturbs and restores. ``parts`` is what the last ``perturb`` moved, fixed there and independent of ``.grad``."""

    def __init__(self, control: Control, names: dict[str, str]) -> None:
        self._control = control
        self._names = names
        self._buffers = BackupBuffers()
        self._hyper = HyperTable()
        self._rows: list[list[float]] = []
        self._known: dict[Any, list[Part]] = {}
        self._params: list[Tensor] = []
        self.parts: list[Part] = []

    def perturb(
        self,
        param_groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        combined_norm: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        """One norm over all parts, then every part to ``w + e``. If anything is thrown, no weight has moved."""
        names = self._names
        flags = tuple((len(g["params"]), g[names["perturb"]], g[names["adaptive"]]) for g in param_groups)
        self.parts = self._parts(param_groups, params, grads, flags)
        if not self.parts:
            return
        rows = [[float(g[names["rho"]]), float(g[names["perturb_eps"]])] for g in param_groups]
        if rows != self._rows:
            for index, group in enumerate(param_groups):
                groups.check_group(group, names, index)
            self._rows = rows
        # Maximizing a function is minimizing its negative, whose gradient is the negative: so is its ascent.
        hyper = self._hyper.update(
            [[-rho if g.get("maximize") else rho, eps] for (rho, eps), g in zip(rows, param_groups, strict=True)]
        )
        picked = [part.tensors.checked(part.pick(grads)) for part in self.parts]
        norm = combined_norm([part.tensors.grad_norm(chosen)[0] for part, chosen in zip(self.parts, picked, strict=True)])
        try:
            for part, chosen in zip(self.parts, picked, strict=True):
                device = part.tensors.params[0].device
                part.tensors.perturb_(chosen, norm if norm.device == device else norm.to(device), hyper)
            if self._control.track_perturbation:
                self._measure(picked)
        except BaseException:
            self.restore()
            raise

    def _measure(self, picked: list[Gradients]) -> None:
        sets = [part.tensors for part in self.parts]
        self._control.perturbation = perturbation_metrics(
            [p for s in sets for p in s.params],
            [b for s in sets for b in s.backups],
            [g for chosen in picked for g in chosen.tensors],
            [flag for s in sets for flag in (s.scaling or [0] * len(s.params))],
        )

    def nothing(self) -> None:
        """An ascent that perturbs nothing: SAM is switched off."""
        self.parts = []

    def restore(self) -> None:
        """Copies the backups back wherever the weights are perturbed."""
        for part in self.parts:
            if part.tensors.is_perturbed:
                try:
                    part.tensors.restore_()
                except Exception:  # changed while perturbed, say by model.half()
                    part.tensors.restore_converted_()

    def _parts(
        self,
        param_groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        flags: tuple[Any, ...],
    ) -> list[Part]:
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._known.clear()
            self._params = list(params)
            self._buffers.keep(params)
        complete = all(map(is_not, grads, repeat(None)))
        key = (flags, None if complete else tuple(grad is None for grad in grads))
        parts = self._known.get(key)
        if parts is None or not all(part.tensors.is_current() for part in parts):
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            parts = self._known[key] = self._build(params, grads, flags)
        return parts

    def _build(self, params: list[Tensor], grads: list[Tensor | None], flags: tuple[Any, ...]) -> list[Part]:
        group_of: list[int] = []
        for group, (members_count, _, _) in enumerate(flags):
            group_of += [group] * members_count
        indices = [i for i, grad in enumerate(grads) if grad is not None and flags[group_of[i]][1]]
        refuse_shared_memory([params[i] for i in indices])
        parts = []
        for (_, backend), chosen in partition(params, indices, self._control.backend).items():
            members = [params[i] for i in chosen]
            tensors = TensorSet(
                members,
                self._buffers.views(members),
                backend=backend,
                groups=[group_of[i] for i in chosen],
                scaling=[int(flags[group_of[i]][2]) for i in chosen],
            )
            parts.append(Part(tensors, chosen, len(params)))
        return parts

    @property
    def buffer_bytes(self) -> int:
        return self._buffers.nbytes

    def release(self) -> None:
        self.parts = []
        self._known.clear()
        self._params = []
        self._buffers.release()
