"""The Triton backend's two doors as runners for the building blocks of ``tests/ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_fused.ops.rows import build_rows, column_of
from sam_fused.ops.triton import DOOR, KERNELS
from tests.ops.runner import Call, Lists, uses_amsgrad, uses_momentum

CPU = torch.device("cpu")
Result = tuple[Tensor, Tensor] | None


def _state(case, lists: Lists) -> dict[str, list[Tensor]]:
    """The base optimizer's lists, by role."""
    if case.op == "restore_sgd_":
        return {"state0": lists.momentum_buffers if uses_momentum(case) else []}
    if case.op == "restore_adamw_":
        largest = lists.max_exp_avg_sqs if uses_amsgrad(case) else []
        return {"state0": lists.exp_avgs, "state1": lists.exp_avg_sqs, "state2": largest, "step": lists.steps}
    return {}


def by_lists(case, lists: Lists) -> Result:
    """``case`` through ``KERNELS``. The lists are those of ``cases.FITTING``, which need no fitting."""
    call = Call.of(case, len(lists.params))
    operands = [lists.params, lists.backups, lists.grads, *_state(case, lists).values()]
    summed = {"accumulators": lists.accumulators}
    if case.op == "grad_norm":
        params = lists.params if any(call.scaling) else []
        return KERNELS["grad_norm"](lists.grads, params, call.scaling, **summed, **call.scalars)
    if case.op == "restore_":
        return KERNELS["restore_"](lists.params, lists.backups)
    if case.op == "restore_accumulate_":
        return KERNELS["restore_accumulate_"](*operands, lists.accumulators, **call.scalars, fresh=case.fresh)
    if case.op == "perturb_":
        options = {"groups": call.groups, "scaling": call.scaling, "backup_exists": case.backup_exists}
        return KERNELS["perturb_"](*operands, call.norm, call.hyper, **options, **call.scalars)
    first = {"first": call.first} if case.op == "restore_sgd_" else {}
    return KERNELS[case.op](*operands, call.hyper, groups=call.groups, **first, **summed, **call.scalars)


class Set:
    """A case's lists as rows with a table, as a ``TensorSet`` keeps them."""

    def __init__(self, case, lists: Lists) -> None:
        self.case, self.call = case, Call.of(case, len(lists.params))
        roles = {"weight": lists.params, "backup": lists.backups, "accumulator": lists.accumulators, **_state(case, lists)}
        self.rows = build_rows(
            roles,
            [param.numel() for param in lists.params],
            groups=self.call.groups,
            scaling=self.call.scaling,
            first=self.call.first,
            grad_dtypes=[grad.dtype for grad in lists.grads],
        )
        assert not self.rows[:, column_of("grad")].any()
        self.cell = torch.full((1,), 7, dtype=torch.int64)
        self.overflows = torch.full((), 7, dtype=torch.int64)
        self.table = DOOR.table(self.rows, CPU)

    def run(self, grads: list[Tensor]) -> Result:
        case, call, scalars = self.case, self.call, self.call.scalars
        addresses = torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64)
        if case.op == "grad_norm":
            wide = any(grad.dtype == torch.float64 for grad in grads)
            norm, found_inf = torch.full((), 7.0, dtype=torch.float64 if wide else torch.float32), torch.full((), 7.0)
            of = {name: scalars.get(name) for name in ("weight", "inv_scale")}
            DOOR.grad_norm_(self.rows, addresses, norm, found_inf, **of, overflows=self.overflows, table=self.table)
            assert int(self.cell) == 7
            return norm, found_inf
        if case.op == "perturb_":
            operands = (call.norm, call.hyper, self.cell, case.backup_exists, scalars.get("inv_scale"))
            DOOR.perturb_(self.rows, addresses, *operands, self.table)
        elif case.op == "restore_":
            DOOR.restore_(self.rows, self.cell, self.table)
        elif case.op == "restore_accumulate_":
            DOOR.restore_accumulate_(self.rows, addresses, scalars["weight"], self.cell, case.fresh, self.table)
        else:
            operation = DOOR.restore_sgd_ if case.op == "restore_sgd_" else DOOR.restore_adamw_
            of = {name: scalars.get(name) for name in ("weight", "inv_scale", "found_inf", "clip")}
            operation(self.rows, addresses, call.hyper, self.cell, **of, table=self.table)
        assert int(self.cell) == (case.op == "perturb_")
        return None


def by_rows(case, lists: Lists) -> Result:
    """``case`` through ``DOOR``."""
    return Set(case, lists).run(lists.grads)


DOORS = {"lists": by_lists, "rows": by_rows}
