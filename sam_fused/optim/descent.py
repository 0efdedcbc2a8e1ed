"""The descent: restore and base step, in one pass where the base optimizer has a fused form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_fused.ops import backends, functional
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.hyper import HyperTable, number
from sam_fused.ops.prepared import Factors, Gradients, TensorSet

from .ascent import Ascent, Part, partition
from .bases import FusedBase, FusedState, fused_base
from .state import Control

_is_cpu = attrgetter("is_cpu")
_version_of = attrgetter("_version")


@dataclass(frozen=True)
class Final:
    """What the base step is taken with: one entry per parameter, and the scalars.

    Attributes:
        grads: the gradients; the last micro-batch's where there are accumulators.
        accumulators: what the micro-batches before it add up to.
        weight: the last micro-batch's, as a scalar tensor on a device.
        wide: whether the gradients are sums in the dtype of the arithmetic, and not the parameters' own.
        grad_scale, found_inf: a scaler's.
    """

    grads: list[Tensor | None]
    accumulators: list[Tensor | None] | None = None
    weight: Callable[[torch.device], Tensor] | None = None
    wide: bool = False
    grad_scale: Tensor | None = None
    found_inf: Any = None

    @property
    def skip(self) -> Tensor | None:
        return self.found_inf if isinstance(self.found_inf, Tensor) else None


class FusedPart:
    """The tensors of a fused last pass on one device, and the base optimizer's state that goes with them."""

    def __init__(self, part: Part, state: FusedState) -> None:
        self.part = part
        self.state = state

    def is_current(self) -> bool:
        return self.part.tensors.is_current() and self.state.is_current()


class Descent:
    """Runs the base optimizer from the clean weights and remembers how, until something about it changes."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._hyper = HyperTable()
        self._limit = HyperTable()
        self._base: Optimizer | None = None
        self._key: Any = None
        self._parts: list[FusedPart] = []
        self._left_over: list[Part] = []
        self._fused = False
        self.stepped = False
        self._params: list[Tensor] = []

    def is_fused(self, base: Optimizer, params: list[Tensor]) -> bool:
        """Whether a step of these parameters takes the restore and the base step in one pass."""
        if fused_base(base) is None:
            return False
        return all(map(_is_cpu, params)) or _serve_fused(partition(params, range(len(params)), self._control.backend))

    def step(self, base: Optimizer, ascent: Ascent, params: list[Tensor], final: Final) -> None:
        """Leaves the weights clean and stepped. If a check fails, nothing has been written.

        Whatever else is thrown, ``stepped``, which the caller sets to False before, says whether any weight may have taken the
        step: it must not be taken again. (An interrupt in the middle of the Python backends' operations, which go through
        several calls of torch, leaves perturbed weights to be restored; momentum and moments may have moved then.)
        """
        self._control.grad_norm = None
        if final.skip is not None and final.skip.is_cpu and bool(final.skip):
            # Read here only where reading costs nothing: nothing of the base optimizer, not even its state's creation, happens.
            ascent.restore()
            return
        family = fused_base(base)
        if family is None or not self._prepare(family, base, ascent, params, final):
            self._step_unfused(base, ascent, params, final)
            return
        table = self._hyper.update([family.hyper(group) for group in base.param_groups], is_capturable(self._control, base))
        checked = [entry.part.tensors.checked(entry.part.pick(final.grads)) for entry in self._parts]
        factors = self._factors(base, checked, final)
        hypers = [
            table.on(entry.part.device, compiled=backends.is_compiled(entry.part.tensors.backend)) for entry in self._parts
        ]
        ascending = ascent.perturbed_parts()
        for part in self._left_over:
            part.tensors.restore_()
        for entry in self._parts:
            entry.part.tensors.perturbed.fill_(1)  # cleared by the operation, in the call that steps
        # Python backends step weights before they clear the cell.
        by_lists = not ascending and any(chosen.addresses is None for chosen in checked)
        versions = list(map(_version_of, params)) if by_lists else []
        try:
            for entry in self._parts:
                entry.state.commit()
            for entry, chosen, hyper, scalars in zip(self._parts, checked, hypers, factors, strict=True):
                family.run(entry.part.tensors, chosen, hyper, scalars)
            self.stepped = True
        except BaseException:
            self._key = None
            written = by_lists and self._have_stepped(ascent, params, versions)
            for entry in self._parts:
                if entry.part.tensors.is_perturbed and not written:
                    entry.state.withdraw()
                else:
                    self.stepped = True
            raise
        for entry in self._parts:
            entry.state.settle()
        for part in ascending:
            part.tensors.perturbed.zero_()

    def note_stepped(self, ascent: Ascent) -> None:
        """After an interrupt: what the operations have restored in their pass is not to be restored once more, which would
        undo the step. They tell it in a cell of their own where their weights were perturbed in several parts."""
        done = {
            id(param) for entry in self._parts if not entry.part.tensors.is_perturbed for param in entry.part.tensors.params
        }
        for part in ascent.perturbed_parts():
            if done.issuperset(map(id, part.tensors.params)):
                part.tensors.perturbed.zero_()

    def _limit_on(self, device: torch.device, base: Optimizer) -> float | Tensor:
        limit = self._control.max_grad_norm
        assert limit is not None
        if not is_capturable(self._control, base):
            return limit
        return self._limit.update([[number(limit)]], True).on(device)[0, 0]

    def refresh_hyper(self, base: Optimizer) -> None:
        """Hyper-parameters that have changed, into the tables that captured graphs read."""
        family, limit = fused_base(base), self._control.max_grad_norm
        if family is not None:
            self._hyper.update([family.hyper(group) for group in base.param_groups], True).refresh()
        if limit is not None:
            self._limit.update([[number(limit)]], True).refresh()

    def _factors(self, base: Optimizer, checked: list[Gradients], final: Final) -> list[Factors]:
        """The scalars of the last pass, for each part on its device; the clip factor from one norm over all parts."""
        inverse = None if final.grad_scale is None else functional.inverse_scale(final.grad_scale)
        found = []
        for entry in self._parts:
            device = entry.part.device
            weight = None if final.weight is None else final.weight(device)
            found.append(Factors(weight, _on(device, inverse), _on(device, final.skip)))
        if self._control.max_grad_norm is None or not self._parts:
            return found
        norms = [
            entry.part.tensors.grad_norm(chosen, weight=factors.weight, inv_scale=factors.inv_scale)[0]
            for entry, chosen, factors in zip(self._parts, checked, found, strict=True)
        ]
        norm = self._control.grad_norm = functional.combined_norm(norms).clone()
        clip = functional.clip_factor(norm, self._limit_on(norm.device, base))
        return [f._replace(clip=_on(entry.part.device, clip)) for entry, f in zip(self._parts, found, strict=True)]

    def _prepare(
        self,
        family: FusedBase,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        final: Final,
    ) -> bool:
        """Makes ``_parts`` those of this step. False where the fused form does not serve these parameters."""
        grads = final.grads
        complete = all(map(is_not, grads, repeat(None)))
        perturbed = tuple(part.serial for part in ascent.perturbed_parts())
        layout = tuple((len(g["params"]), family.state_keys(g)) for g in base.param_groups)
        sums = (final.wide, final.accumulators is not None)
        key = (perturbed, layout, sums, None if complete else tuple(grad is None for grad in grads))
        same_params = len(params) == len(self._params) and all(map(is_, params, self._params))
        if base is self._base and key == self._key and same_params and all(entry.is_current() for entry in self._parts):
            return self._fused
        self._params, self._base, self._key = list(params), base, None
        places = partition(params, grads_present(grads), self._control.backend)
        self._fused = _serve_fused(places)
        if not self._fused:
            self._parts, self._key = [], key
            return False
        self._parts = self._build(family, base, ascent, params, final, places)
        # Perturbed, but without a gradient in the second pass: nothing steps these, so they are restored by themselves.
        stepping = {id(param) for entry in self._parts for param in entry.part.tensors.params}
        self._left_over = [part for part in ascent.perturbed_parts() if not stepping.issuperset(map(id, part.tensors.params))]
        self._key = key
        return True

    def _build(
        self,
        family: FusedBase,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        final: Final,
        places: dict[tuple[torch.device, str], list[int]],
    ) -> list[FusedPart]:
        group_of: list[int] = []
        for index, group in enumerate(base.param_groups):
            group_of += [index] * len(group["params"])
        entries = []
        for (_, backend), chosen in places.items():
            members = [params[i] for i in chosen]
            state = FusedState(family, base, members, [base.param_groups[group_of[i]] for i in chosen])
            backups, cell = ascent.restoring(members)
            tensors = TensorSet(
                members,
                backups,
                backend=backend,
                groups=[group_of[i] for i in chosen],
                states=tuple(state.columns),
                steps=state.steps,
                first=state.first if not family.has_step_count else [],
                accumulators=[]
                if final.accumulators is None
                else [a for i in chosen if (a := final.accumulators[i]) is not None],
                grad_dtypes=[arithmetic_dtype(param.dtype) for param in members] if final.wide else [],
                perturbed=cell,
            )
            entries.append(FusedPart(Part(tensors, chosen, len(params)), state))
        return entries

    def _step_unfused(self, base: Optimizer, ascent: Ascent, params: list[Tensor], final: Final) -> None:
        """Restores, then lets the base optimizer's own ``step`` run, with its hooks. Under a loss scale this waits once."""
        ascent.restore()
        if final.skip is not None and bool(final.skip):
            return
        present = [(param, grad) for param, grad in zip(params, final.grads, strict=True) if grad is not None]
        factor = self._factor_unfused([grad for _, grad in present], final.grad_scale)
        own = all(param.grad is grad for param, grad in present)
        if factor is None and own:
            self._run(base, ascent, params)
            return
        # Copies stand in for the gradients during the step: gradients are never written into.
        held = [param.grad for param, _ in present]
        stand_ins = functional.scaled([grad for _, grad in present], [param.dtype for param, _ in present], factor)
        try:
            for (param, _), stand_in in zip(present, stand_ins, strict=True):
                param.grad = stand_in
            self._run(base, ascent, params)
        finally:
            for (param, _), own_grad in zip(present, held, strict=True):
                param.grad = own_grad

    def _run(self, base: Optimizer, ascent: Ascent, params: list[Tensor]) -> None:
        """The base optimizer's own ``step``. Where that raises, weights that were written say that it had stepped: a hook after
        it raised, or an interrupt came."""
        before = list(map(_version_of, params))
        try:
            base.step()
            self.stepped = True
        except BaseException:
            self.stepped = self._have_stepped(ascent, params, before)
            raise

    def _have_stepped(self, ascent: Ascent, params: list[Tensor], versions: list[int]) -> bool:
        """Whether weights that were clean have been written. By version and by value: torch's fused steps, and who writes
        through ``.data``, leave no trace in version counters."""
        return versions != list(map(_version_of, params)) or ascent.differs_from_backups()

    def _factor_unfused(self, grads: list[Tensor], grad_scale: Tensor | None) -> Tensor | None:
        """What the gradients are multiplied with before the base optimizer's own ``step`` reads them."""
        inverse = None if grad_scale is None else functional.inverse_scale(grad_scale)
        limit = self._control.max_grad_norm
        if limit is None or not grads:
            return inverse
        places: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            places.setdefault(grad.device, []).append(grad)
        norms = [
            functional.grad_norm(list(there), inv_scale=_on(device, inverse), backend=self._control.backend)[0]
            for device, there in places.items()
        ]
        norm = self._control.grad_norm = functional.combined_norm(norms).clone()
        clip = functional.clip_factor(norm, limit)
        return clip if inverse is None else clip * inverse.to(clip.device)

    def release(self) -> None:
        self._key = None
        self._parts = []
        self._left_over = []
        self._params = []


def _serve_fused(places: Iterable[tuple[torch.device, str]]) -> bool:
    """Whether the operations have the base step in them everywhere: compiled backends, and every one on the CPU."""
    return all(device.type == "cpu" or backends.is_compiled(backend) for device, backend in places)


def is_capturable(control: Control, base: Optimizer) -> bool:
    """Whether hyper-parameters live on the device: our setting, or the base optimizer's of the same name."""
    return control.capturable or any(group.get("capturable") for group in base.param_groups)


def grads_present(grads: list[Tensor | None]) -> list[int]:
    return [index for index, grad in enumerate(grads) if grad is not None]


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """The scalar on that device. A copy between two GPUs waits for neither; one to the CPU has to be waited for."""
    return scalar if scalar is None or scalar.device == device else scalar.to(device, non_blocking=device.type != "cpu")
