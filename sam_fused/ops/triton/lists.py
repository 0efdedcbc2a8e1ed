"""The first door: operations on lists, which become rows and take the second.

The lists were fitted: every tensor lies on its parameter's device and in memory as its parameter does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schema
from ..rows import build_rows, column_of
from .door import DOOR


def _built(
    by_role: dict[str, Sequence[Tensor]],
    groups: Sequence[int] = (),
    scaling: Sequence[int] = (),
    first: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The rows and the gradients' addresses. ``by_role`` begins with the list that every tensor's size comes from."""
    numels = list(map(Tensor.numel, next(iter(by_role.values()))))
    rows = build_rows(by_role, numels, groups=groups, scaling=scaling, first=first)
    return rows, rows[:, column_of("grad")].contiguous()


def _cell() -> Tensor:
    """The functional operations leave it to their caller to remember what is perturbed."""
    return torch.zeros(1, dtype=torch.int64, device="cpu")


def grad_norm(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    scaling: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, addresses = _built({"grad": grads, "weight": params, "accumulator": accumulators}, scaling=scaling)
    device, wide = grads[0].device, any(grad.dtype == torch.float64 for grad in grads)
    norm = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    DOOR.grad_norm_(rows, addresses, norm, found_inf, weight, inv_scale, None, DOOR.table(rows, device))
    return norm, found_inf


def perturb_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    norm: Tensor,
    hyper: Tensor,
    groups: Sequence[int] = (),
    scaling: Sequence[int] = (),
    backup_exists: bool = False,
    inv_scale: Tensor | None = None,
) -> None:
    rows, addresses = _built({"weight": params, "backup": backups, "grad": grads}, groups, scaling)
    table = DOOR.table(rows, params[0].device)
    DOOR.perturb_(rows, addresses, norm, hyper, _cell(), backup_exists, inv_scale, table)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    rows, _ = _built({"weight": params, "backup": backups})
    DOOR.restore_(rows, _cell(), DOOR.table(rows, params[0].device))


def restore_accumulate_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    weight: Tensor,
    fresh: bool = False,
) -> None:
    rows, addresses = _built({"weight": params, "backup": backups, "grad": grads, "accumulator": accumulators})
    DOOR.restore_accumulate_(rows, addresses, weight, _cell(), fresh, DOOR.table(rows, params[0].device))


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int] = (),
    first: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    by_role = {"weight": params, "backup": backups, "grad": grads, "state0": momentum_buffers, "accumulator": accumulators}
    rows, addresses = _built(by_role, groups, first=first)
    table = DOOR.table(rows, params[0].device)
    DOOR.restore_sgd_(rows, addresses, hyper, _cell(), weight, inv_scale, found_inf, clip, table)


def restore_adamw_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    by_role = {"weight": params, "backup": backups, "grad": grads, "step": steps}
    by_role |= {"state0": exp_avgs, "state1": exp_avg_sqs, "state2": max_exp_avg_sqs, "accumulator": accumulators}
    rows, addresses = _built(by_role, groups)
    table = DOOR.table(rows, params[0].device)
    DOOR.restore_adamw_(rows, addresses, hyper, _cell(), weight, inv_scale, found_inf, clip, table)


KERNELS = {name: globals()[name] for name in schema.OPS}
