"""The ascent: which tensors are perturbed, with which backups, and how they come back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor

from sam_fused.ops import backends
from sam_fused.ops.checks import refuse_shared_memory
from sam_fused.ops.fingerprint import PLAIN_TYPES
from sam_fused.ops.functional import combined_norm, count_not_finite_
from sam_fused.ops.hyper import HyperTable, number
from sam_fused.ops.metrics import perturbation_metrics
from sam_fused.ops.prepared import Gradients, TensorSet

from . import groups
from .buffers import FlatBuffers
from .state import Control

_serials = count()
_version_of = attrgetter("_version")

# Sets of parameters that had gradients in a first pass are remembered: models that drop modules alternate between a few.
_REMEMBERED = 8


class Part:
    """The tensors of an ascent on one device: their set and their places in the list of all parameters."""

    def __init__(self, tensors: TensorSet, indices: list[int], total: int) -> None:
        self.tensors = tensors
        self.indices = indices
        self.serial = next(_serials)  # tells parts apart for as long as the process lives, which an id() does not
        self._clean: list[int] | None = None
        self._all = len(indices) == total

    @property
    def device(self) -> torch.device:
        return self.tensors.device

    def pick(self, entries: list[Any]) -> list[Any]:
        return entries if self._all else [entries[index] for index in self.indices]

    def note_clean(self) -> None:
        """The weights have just been restored: their backups are good until somebody writes into the weights."""
        self._clean = list(map(_version_of, self.tensors.params))

    def forget_clean(self) -> None:
        self._clean = None

    def backups_are_good(self) -> bool:
        """Whether the weights are what they were when ``note_clean`` was called."""
        return self._clean is not None and self._clean == list(map(_version_of, self.tensors.params))


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
        self._buffers = FlatBuffers()
        self._hyper = HyperTable()
        self._checked: list[list[Any]] = []
        self._known: dict[Any, list[Part]] = {}
        self._params: list[Tensor] = []
        self.parts: list[Part] = []

    def perturb(
        self,
        param_groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        *,
        capturable: bool = False,
        same_step: bool = False,
    ) -> None:
        """One norm over all parts, then every part to ``w + e``. If anything is thrown, no weight has moved.

        ``same_step``: backups written by an earlier micro-batch of this step serve again.
        """
        names = self._names
        if not same_step:
            for known in self._known.values():
                for part in known:
                    part.forget_clean()
        flags = tuple((len(g["params"]), g[names["perturb"]], g[names["adaptive"]]) for g in param_groups)
        self.parts = self._parts(param_groups, params, grads, flags)
        if not self.parts:
            return
        hyper = self._update_hyper(param_groups, capturable)
        picked = [part.tensors.checked(part.pick(grads)) for part in self.parts]
        norm = self._norm(picked)
        tables = [hyper.on(part.device, compiled=backends.is_compiled(part.tensors.backend)) for part in self.parts]
        try:
            for part, chosen, table in zip(self.parts, picked, tables, strict=True):
                here = norm if norm.device == part.device else norm.to(part.device)
                part.tensors.perturb_(chosen, here, table, backup_exists=same_step and part.backups_are_good())
            if self._control.track_perturbation:
                self._measure(picked)
        except BaseException:
            self.restore()
            raise

    def _update_hyper(self, param_groups: list[dict[str, Any]], capturable: bool) -> HyperTable:
        names = self._names
        rows = [[number(g[names["rho"]]), number(g[names["perturb_eps"]])] for g in param_groups]
        seen = [[id(value) if isinstance(value, Tensor) else value for value in row] for row in rows]
        if seen != self._checked:
            for index, group in enumerate(param_groups):
                groups.check_group(group, names, index)
            self._checked = seen
        # Maximizing a function is minimizing its negative, whose gradient is the negative: so is its ascent.
        return self._hyper.update(
            [[-rho if g.get("maximize") else rho, eps] for (rho, eps), g in zip(rows, param_groups, strict=True)],
            capturable,
        )

    def refresh_hyper(self, param_groups: list[dict[str, Any]]) -> None:
        """Hyper-parameters that have changed, into the tables that captured graphs read."""
        self._update_hyper(param_groups, True).refresh()

    def _norm(self, picked: list[Gradients]) -> Tensor:
        """One norm over all parts; counts, where it is, that it is not finite."""
        device = self.parts[0].device
        overflows = self._control.overflows
        if overflows is None or overflows.device != device:
            before = 0 if overflows is None else int(overflows)
            overflows = self._control.overflows = torch.full((), before, dtype=torch.int64, device=device)
        if len(self.parts) == 1:
            return self.parts[0].tensors.grad_norm(picked[0], overflows=overflows)[0]
        norm = combined_norm([part.tensors.grad_norm(chosen)[0] for part, chosen in zip(self.parts, picked, strict=True)])
        count_not_finite_(norm, overflows)
        return norm

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

    def note_clean(self) -> None:
        """The weights are clean and have just been restored, in the middle of a step."""
        for part in self.parts:
            part.note_clean()

    def differs_from_backups(self) -> bool:
        """Whether any weight is something else than its backup. For when something has been thrown: it reads them all."""
        return any(
            param.dtype != backup.dtype or param.device != backup.device or not torch.equal(param, backup)
            for part in self.parts
            for param, backup in zip(part.tensors.params, part.tensors.backups, strict=True)
        )

    def restoring(self, members: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """What brings ``members`` back to where they were: the backup of each that is perturbed, itself for any other; and the
        cell that says whether they are perturbed, where that is one for all that are.

        By identity, not by place in the list: somebody may have edited a group's list in between.
        """
        backups: dict[int, Tensor] = {}
        cells: dict[int, Tensor] = {}
        for part in self.perturbed_parts():
            for param, backup in zip(part.tensors.params, part.tensors.backups, strict=True):
                backups[id(param)] = backup
                cells[id(param)] = part.tensors.perturbed
        owners = {id(cell): cell for cell in map(cells.get, map(id, members)) if cell is not None}
        cell = next(iter(owners.values())) if len(owners) == 1 else None
        return [backups.get(id(param), param) for param in members], cell

    def perturbed_parts(self) -> list[Part]:
        return [part for part in self.parts if part.tensors.is_perturbed]

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
