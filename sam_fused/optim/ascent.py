"""The ascent: which tensors are perturbed, with which backups, and how they come back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_fused.ops import backends
from sam_fused.ops.checks import check_lists, refuse_shared_memory
from sam_fused.ops.directions import ELEMENTWISE, Directions, one_where_it_moves
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.fingerprint import PLAIN_TYPES
from sam_fused.ops.functional import combined_norm, count_not_finite_
from sam_fused.ops.hyper import HyperTable, number
from sam_fused.ops.metrics import perturbation_metrics
from sam_fused.ops.prepared import Gradients, TensorSet

from . import groups
from .buffers import FlatBuffers
from .definitions import scaling_of
from .state import Control

_serials = count()
_version_of = attrgetter("_version")

# Sets of parameters that had gradients in a first pass are remembered: models that drop modules alternate between a few.
_REMEMBERED = 8


class OwnGroup(NamedTuple):
    """What a parameter group says of its ascent, but for rho and perturb_eps, which kernels read from a table."""

    size: int
    perturb: bool
    adaptive: bool | str
    eta: float
    decay: float  # what of the weights is added to the gradient; the sign is the gradient's as it was computed

    @property
    def is_written(self) -> bool:
        """Whether the kernels do not form its direction themselves."""
        scaled = self.adaptive == "layerwise" or (bool(self.adaptive) and self.eta != 0)
        return self.perturb and (scaled or self.decay != 0)

    def shape(self) -> tuple[Any, ...]:
        """What parts are built by: a value that only scales may change without a new part."""
        return self.size, self.perturb, self.adaptive, self.eta != 0, self.decay != 0


class Part:
    """The tensors of an ascent on one device: their set and their places in the list of all parameters."""

    def __init__(self, tensors: TensorSet, indices: list[int], total: int, directions: Directions | None = None) -> None:
        self.tensors = tensors
        self.directions = directions  # where the kernels do not form the direction themselves
        self.indices = indices
        self.serial = next(_serials)  # tells parts apart for as long as the process lives, which an id() does not
        self._clean: list[int] | None = None
        self._all = len(indices) == total

    @property
    def device(self) -> torch.device:
        return self.tensors.device

    def pick(self, entries: list[Any]) -> list[Any]:
        return entries if self._all else [entries[index] for index in self.indices]

    def direction(self, grads: list[Any], own_groups: list[OwnGroup], inv_scale: Tensor | None) -> Gradients:
        """What the norm is taken of, and then, ``finish_direction`` called, what the weights are perturbed along."""
        chosen = self.pick(grads)
        if self.directions is None:
            return self.tensors.checked(chosen)
        check_lists(self.tensors.params, grads=chosen)
        etas = [own_groups[group].eta for group in self.tensors.groups]
        decays = [own_groups[group].decay for group in self.tensors.groups]
        return self.tensors.checked(self.directions.write(chosen, etas, decays, inv_scale))

    def finish_direction(self, signs: bool) -> None:
        if self.directions is not None:
            self.directions.finish(signs)

    def note_clean(self) -> None:
        """The weights have just been restored: their backups are good until somebody writes into the weights."""
        self._clean = list(map(_version_of, self.tensors.params))

    def forget_clean(self) -> None:
        self._clean = None

    def backups_are_good(self) -> bool:
        """Whether the weights are what they were when ``note_clean`` was called."""
        return self._clean is not None and self._clean == list(map(_version_of, self.tensors.params))


def _seen(value: Any) -> Any:
    """What is compared of a group's value: a tensor on a device by its identity, since its value would be waited for."""
    if not isinstance(value, Tensor):
        return value
    return number(value) if value.is_cpu else id(value)


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
        self._directions = FlatBuffers(arithmetic_dtype)
        self._scales = FlatBuffers(arithmetic_dtype)
        self._hyper = HyperTable()
        self._checked: list[list[Any]] = []
        self._known: dict[Any, list[Part]] = {}
        self._params: list[Tensor] = []
        self.parts: list[Part] = []
        self.needs_scale = False  # whether the last perturbation depended on the size of the gradients

    def perturb(
        self,
        param_groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        *,
        capturable: bool = False,
        same_step: bool = False,
        inv_scale: Tensor | None = None,
    ) -> None:
        """One norm over all parts, then every part to ``w + e``. If anything is thrown, no weight has moved.

        ``same_step``: backups written by an earlier micro-batch of this step serve again. ``inv_scale``: of the gradients'
        loss scale, for what depends on their size.
        """
        control = self._control
        if not same_step:
            for known in self._known.values():
                for part in known:
                    part.forget_clean()
        self._check_groups(param_groups)
        own_groups = list(map(self.own_group, param_groups))
        self.parts = self._parts(param_groups, params, grads, own_groups)
        self.needs_scale = bool(self.parts) and (not control.normalize or any(own.perturb and own.decay for own in own_groups))
        if not self.parts:
            return
        hyper = self._update_hyper(param_groups, capturable)
        picked = [part.direction(grads, own_groups, inv_scale) for part in self.parts]
        # A norm has the gradients' scale, which the perturbation divides by again. What was written out is without it already:
        # then, and where nothing is divided by, what the kernels form has to be without it as well.
        unscaled = inv_scale is not None and (not control.normalize or any(part.directions for part in self.parts))
        inverses = [
            inv_scale.to(part.device) if inv_scale is not None and unscaled and not part.directions else None
            for part in self.parts
        ]
        norm = self._norm(picked, inverses)
        if control.p != 2 or not control.normalize:
            norm = one_where_it_moves(norm)
        for part in self.parts:
            part.finish_direction(control.p != 2)
        tables = [hyper.on(part.device, compiled=backends.is_compiled(part.tensors.backend)) for part in self.parts]
        try:
            for part, chosen, table, inverse in zip(self.parts, picked, tables, inverses, strict=True):
                here = norm if norm.device == part.device else norm.to(part.device)
                exists = same_step and part.backups_are_good()
                part.tensors.perturb_(chosen, here, table, inv_scale=inverse, backup_exists=exists)
            if control.track_perturbation:
                self._measure(picked)
        except BaseException:
            self.restore()
            raise

    def _update_hyper(self, param_groups: list[dict[str, Any]], capturable: bool) -> HyperTable:
        names = self._names
        rows = [[number(g[names["rho"]]), number(g[names["perturb_eps"]])] for g in param_groups]
        divides = self._control.normalize and self._control.p == 2
        # Maximizing a function is minimizing its negative, whose gradient is the negative: so is its ascent.
        return self._hyper.update(
            [
                [-rho if g.get("maximize") else rho, eps if divides else 0.0]
                for (rho, eps), g in zip(rows, param_groups, strict=True)
            ],
            capturable,
        )

    def _check_groups(self, param_groups: list[dict[str, Any]]) -> None:
        """Groups are anybody's to edit: what differs from what was checked last is checked."""
        seen = [[_seen(group.get(key)) for key in self._names.values()] for group in param_groups]
        if seen != self._checked:
            for index, group in enumerate(param_groups):
                groups.check_group(group, self._names, index)
            self._checked = seen

    def own_group(self, group: dict[str, Any]) -> OwnGroup:
        names, decay = self._names, 0.0
        if group[names["weight_decay_in_ascent"]]:
            decay = float(number(group["weight_decay"]))
            if group.get("maximize"):  # the gradient is of what is maximized, the decay of what is minimized
                decay = -decay
        return OwnGroup(len(group["params"]), group[names["perturb"]], group[names["adaptive"]], group[names["eta"]], decay)

    def refresh_hyper(self, param_groups: list[dict[str, Any]]) -> None:
        """Hyper-parameters that have changed, into the tables that captured graphs read."""
        self._check_groups(param_groups)
        self._update_hyper(param_groups, True).refresh()

    def _norm(self, picked: list[Gradients], inverses: list[Tensor | None]) -> Tensor:
        """One norm over all parts; counts, where it is, that it is not finite."""
        device = self.parts[0].device
        overflows = self._control.overflows
        if overflows is None or overflows.device != device:
            before = 0 if overflows is None else int(overflows)
            overflows = self._control.overflows = torch.full((), before, dtype=torch.int64, device=device)
        if len(self.parts) == 1:
            return self.parts[0].tensors.grad_norm(picked[0], inv_scale=inverses[0], overflows=overflows)[0]
        norm = combined_norm(
            [
                part.tensors.grad_norm(chosen, inv_scale=inverse)[0]
                for part, chosen, inverse in zip(self.parts, picked, inverses, strict=True)
            ]
        )
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
        own_groups: list[OwnGroup],
    ) -> list[Part]:
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._known.clear()
            self._params = list(params)
            for buffers in (self._buffers, self._directions, self._scales):
                buffers.keep(params)
        complete = all(map(is_not, grads, repeat(None)))
        shapes = tuple(own.shape() for own in own_groups)
        key = (shapes, self._control.p, None if complete else tuple(grad is None for grad in grads))
        parts = self._known.get(key)
        if parts is None or not all(part.tensors.is_current() for part in parts):
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            parts = self._known[key] = self._build(param_groups, params, grads, own_groups)
        return parts

    def _build(
        self,
        param_groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        own_groups: list[OwnGroup],
    ) -> list[Part]:
        group_of: list[int] = []
        scaling: list[int] = []
        for index, (group, own) in enumerate(zip(param_groups, own_groups, strict=True)):
            group_of += [index] * own.size
            scaling += scaling_of(group, own.adaptive, self._control.model) if own.perturb else [0] * own.size
        indices = [i for i, grad in enumerate(grads) if grad is not None and own_groups[group_of[i]].perturb]
        refuse_shared_memory([params[i] for i in indices])
        is_written = [self._control.p != 2 or own_groups[group_of[i]].is_written for i in indices]
        parts = []
        for written in sorted(set(is_written)):
            here = [i for i, own in zip(indices, is_written, strict=True) if own == written]
            for (_, backend), chosen in partition(params, here, self._control.backend).items():
                members, kinds = [params[i] for i in chosen], [scaling[i] for i in chosen]
                tensors = TensorSet(
                    members,
                    self._buffers.views(members),
                    backend=backend,
                    groups=[group_of[i] for i in chosen],
                    scaling=[] if written else kinds,
                    grad_dtypes=[arithmetic_dtype(p.dtype) for p in members] if written else (),
                )
                directions = self._direct(members, kinds, backend) if written else None
                parts.append(Part(tensors, chosen, len(params), directions))
        return parts

    def _direct(self, members: list[Tensor], kinds: list[int], backend: str) -> Directions:
        elementwise = [param for param, kind in zip(members, kinds, strict=True) if kind == ELEMENTWISE]
        return Directions(members, kinds, self._directions.views(members), self._scales.views(elementwise), backend)

    @property
    def buffer_bytes(self) -> int:
        return self._buffers.nbytes + self._directions.nbytes + self._scales.nbytes

    def release(self) -> None:
        self.parts = []
        self._known.clear()
        self._params = []
        for buffers in (self._buffers, self._directions, self._scales):
            buffers.release()
