"""The descent: restore and base step, in one pass where the base optimizer has a fused form."""

from __future__ import annotations

from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_fused.ops import backends, functional
from sam_fused.ops.prepared import HyperTable, TensorSet

from .ascent import Ascent, Part, partition
from .bases import FusedBase, FusedState, fused_base
from .state import Control


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
        self._base: Optimizer | None = None
        self._key: Any = None
        self._parts: list[FusedPart] = []
        self._left_over: list[Part] = []
        self._fused = False
        self.stepped = False
        self._params: list[Tensor] = []

    def step(
        self,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        grads: list[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Any,
    ) -> None:
        """Leaves the weights clean and stepped. If a check fails, nothing has been written; whatever else is thrown,
        ``stepped`` says whether any weight has taken the step."""
        self.stepped = False
        if isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf):
            # Read here only where reading costs nothing: nothing of the base optimizer, not even its state's creation, happens.
            ascent.restore()
            return
        family = fused_base(base)
        complete = all(map(is_not, grads, repeat(None)))
        if family is None or not self._prepare(family, base, ascent, params, grads, complete):
            self._step_unfused(base, ascent, params, grads, grad_scale, found_inf)
            return
        hyper = self._hyper.update([family.hyper(group) for group in base.param_groups])
        checked = [entry.part.tensors.checked(entry.part.pick(grads)) for entry in self._parts]
        inverse = None if grad_scale is None else functional.inverse_scale(grad_scale)
        skip = found_inf if isinstance(found_inf, Tensor) else None
        ascending = [part for part in ascent.parts if part.tensors.is_perturbed]
        for part in self._left_over:
            part.tensors.restore_()
        for entry in self._parts:
            entry.part.tensors.perturbed.fill_(1)  # cleared by the operation, in the call that steps
        try:
            for entry in self._parts:
                entry.state.commit()
            for entry, chosen in zip(self._parts, checked, strict=True):
                device = entry.part.tensors.params[0].device
                family.run(entry.part.tensors, chosen, hyper, inv_scale=_on(device, inverse), found_inf=_on(device, skip))
            self.stepped = True
        except BaseException:
            self._key = None
            for entry in self._parts:
                if entry.part.tensors.is_perturbed:
                    entry.state.withdraw()
                else:
                    self.stepped = True
            raise
        for entry in self._parts:
            entry.state.settle()
        for part in ascending:
            part.tensors.perturbed.zero_()

    def _prepare(
        self,
        family: FusedBase,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        grads: list[Tensor | None],
        complete: bool,
    ) -> bool:
        """Makes ``_parts`` those of this step. False where the fused form does not serve these parameters."""
        perturbed = tuple(part.serial for part in ascent.parts if part.tensors.is_perturbed)
        layout = tuple((len(g["params"]), family.state_keys(g)) for g in base.param_groups)
        key = (perturbed, layout, None if complete else tuple(grad is None for grad in grads))
        same_params = len(params) == len(self._params) and all(map(is_, params, self._params))
        if base is self._base and key == self._key and same_params and all(entry.is_current() for entry in self._parts):
            return self._fused
        self._params, self._base, self._key = list(params), base, None
        places = partition(params, grads_present(grads), self._control.backend)
        self._fused = all(device.type == "cpu" or backends.is_compiled(backend) for device, backend in places)
        if not self._fused:
            self._parts, self._key = [], key
            return False
        self._parts = self._build(family, base, ascent, params, places)
        # Perturbed, but without a gradient in the second pass: nothing steps these, so they are restored by themselves.
        stepping = {id(param) for entry in self._parts for param in entry.part.tensors.params}
        ascending = [part for part in ascent.parts if part.tensors.is_perturbed]
        self._left_over = [part for part in ascending if not stepping.issuperset(map(id, part.tensors.params))]
        self._key = key
        return True

    def _build(
        self,
        family: FusedBase,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        places: dict[tuple[torch.device, str], list[int]],
    ) -> list[FusedPart]:
        group_of: list[int] = []
        for number, group in enumerate(base.param_groups):
            group_of += [number] * len(group["params"])
        backups: dict[int, Tensor] = {}
        cells: dict[int, Tensor] = {}
        for part in ascent.parts:
            if part.tensors.is_perturbed:
                # By identity, not by place in the list: somebody may have edited a group's list in between.
                for param, backup in zip(part.tensors.params, part.tensors.backups, strict=True):
                    backups[id(param)] = backup
                    cells[id(param)] = part.tensors.perturbed
        entries = []
        for (_, backend), chosen in places.items():
            members = [params[i] for i in chosen]
            state = FusedState(family, base, members, [base.param_groups[group_of[i]] for i in chosen])
            owners = {id(cell): cell for cell in map(cells.get, map(id, members)) if cell is not None}
            tensors = TensorSet(
                members,
                [backups.get(id(param), param) for param in members],
                backend=backend,
                groups=[group_of[i] for i in chosen],
                states=tuple(state.columns),
                steps=state.steps,
                first=state.first if not family.has_step_count else [],
                perturbed=next(iter(owners.values())) if len(owners) == 1 else None,
            )
            entries.append(FusedPart(Part(tensors, chosen, len(params)), state))
        return entries

    def _step_unfused(
        self,
        base: Optimizer,
        ascent: Ascent,
        params: list[Tensor],
        grads: list[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Any,
    ) -> None:
        """Restores, then lets the base optimizer's own ``step`` run, with its hooks. Under a loss scale this waits once."""
        ascent.restore()
        if isinstance(found_inf, Tensor) and bool(found_inf):
            return
        present = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
        if grad_scale is None or not present:
            base.step()
            self.stepped = True
            return
        # Unscaled copies stand in for the gradients during the step: gradients are never written into.
        unscaled = functional.unscaled([g for _, g in present], grad_scale)
        try:
            for (param, _), grad in zip(present, unscaled, strict=True):
                param.grad = grad
            base.step()
            self.stepped = True
        finally:
            for param, grad in present:
                param.grad = grad

    def release(self) -> None:
        self._key = None
        self._parts = []
        self._left_over = []
        self._params = []


def grads_present(grads: list[Tensor | None]) -> list[int]:
    return [index for index, grad in enumerate(grads) if grad is not None]


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """The scalar on that device. A copy between two GPUs waits for neither; one to the CPU has to be waited for."""
    return scalar if scalar is None or scalar.device == device else scalar.to(device, non_blocking=device.type != "cpu")
