"""One runner for every door and backend: builds the lists of a case, calls the operation, gives back what it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from sam_fused import ops
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.prepared import Factors, TensorSet
from tests.devices import randn

from .cases import LAYOUTS, SENTINEL, Case, Entry

ROLES = ("params", "backups", "grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "accumulators")


def table(rows: Sequence[Sequence[float]]) -> Tensor:
    """Hyper-parameters, on the CPU whatever the tensors' device: only there can an operation look into them first."""
    return torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")


def deal(values: Sequence[float], count: int) -> list:
    """``values`` in turn, one for each tensor; nothing if there are none."""
    return [values[index % len(values)] for index in range(count)] if values else []


@dataclass
class Lists:
    """Everything an operation can take for a list of parameters, and the blocks of memory that hold it."""

    params: list[Tensor] = field(default_factory=list)
    backups: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    accumulators: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of(self, role: str) -> list[Tensor]:
        return getattr(self, role)  # type: ignore[no-any-return]

    def copies(self) -> Lists:
        """The values, for comparing with: contiguous, in memory of their own."""
        copy = Lists(steps=[step.clone() for step in self.steps])
        for role in ROLES:
            setattr(copy, role, [t.detach().clone(memory_format=torch.contiguous_format) for t in self.of(role)])
        return copy

    def addresses(self) -> dict[str, list[int]]:
        return {role: [t.data_ptr() for t in self.of(role)] for role in (*ROLES, "steps")}

    def gaps_are_untouched(self) -> bool:
        """Whether nothing was written beside the tensors. Overwrites the tensors themselves."""
        for view, block in self.held:
            if view.numel() != block.numel():
                view.fill_(SENTINEL)
                if not bool((block == SENTINEL).all()):
                    return False
        return True


def _values(role: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values in the range where the halves lose precision and nothing else."""
    normal = randn(shape, generator, torch.float64)
    if role in ("exp_avg_sqs", "max_exp_avg_sqs"):
        return normal.abs() * 0.5 + 0.25
    if role == "grads" and normal.numel() > 3:
        normal.view(-1)[1] = 0.0
    return normal * (0.5 if role in ("params", "backups") else 1.0)


# What each operation takes beside the weights: the other roles are not built for it.
TAKES = {
    "grad_norm": ("params", "grads"),
    "perturb_": ("params", "backups", "grads"),
    "restore_": ("params", "backups"),
    "restore_accumulate_": ("params", "backups", "grads"),
    "restore_sgd_": ("params", "backups", "grads", "momentum_buffers"),
    "restore_adamw_": ("params", "backups", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
}


def takes(case: Case) -> tuple[str, ...]:
    """The roles that the operation reads or writes in this case."""
    return (*TAKES[case.op], *(("accumulators",) if "weight" in case.scalars else ()))


# Large tensors repeat this many values, a prime, so that only these few need the oracle's long arithmetic.
PERIOD = 4099


@lru_cache(maxsize=64)
def _templates(role: str, entries: tuple[Entry, ...], dtypes: tuple[torch.dtype, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + ROLES.index(role))
    if role == "accumulators":
        dtypes = tuple(map(arithmetic_dtype, dtypes))
    return [_values(role, entry.shape, generator).to(dtypes[i % len(dtypes)]) for i, entry in enumerate(entries)]


def period(role: str, dtype: torch.dtype) -> Tensor:
    """The values that periodic lists repeat."""
    return _templates(role, (Entry((PERIOD,)),), (dtype,), 3)[0]


def _repeated(role: str, entry: Entry, dtype: torch.dtype) -> Tensor:
    count = prod(entry.shape)
    return period(role, dtype).repeat(-(-count // PERIOD))[:count].view(entry.shape)


def make_lists(
    entries: Sequence[Entry], dtypes: Sequence[torch.dtype], case: Case, seed: int = 1, periodic: bool = False
) -> Lists:
    """Lists for ``case``; the dtypes are dealt out in turn."""
    lists = Lists()
    for role in takes(case):
        if role == "backups" and case.in_place:
            lists.backups = list(lists.params)
            continue
        seeded = "params" if role == "backups" and case.backup_exists else role  # they hold the weights already
        if periodic:
            templates = [_repeated(seeded, entry, dtypes[i % len(dtypes)]) for i, entry in enumerate(entries)]
        else:
            templates = _templates(seeded, tuple(entries), tuple(dtypes), seed)
        for entry, values in zip(entries, templates, strict=True):
            layout = entry.layout if role == "params" or entry.others is None else entry.others
            tensor, block = LAYOUTS[layout](values)
            lists.of(role).append(tensor)
            lists.held.append((tensor, block))
    lists.steps = [torch.tensor(step) for step in deal(case.steps, len(entries))]
    return lists


@dataclass
class Call:
    """A case's arguments beside the lists."""

    hyper: Tensor | None
    groups: list[int]
    scaling: list[int]
    first: list[int]
    scalars: dict[str, Tensor]
    norm: Tensor

    @staticmethod
    def of(case: Case, count: int) -> Call:
        groups = deal(range(len(case.hyper)), count) if len(case.hyper) > 1 else []
        scalars = {name: torch.tensor(value) for name, value in case.scalars.items()}
        hyper = table(case.hyper) if case.hyper else None
        norm = torch.tensor(case.norm, dtype=torch.float64)
        return Call(hyper, groups, deal(case.scaling, count), deal(case.first, count), scalars, norm)


def uses_momentum(case: Case) -> bool:
    return any(row[1] for row in case.hyper)


def uses_amsgrad(case: Case) -> bool:
    return any(row[6] for row in case.hyper)


def run(case: Case, runner: str, lists: Lists) -> tuple[Tensor, Tensor] | None:
    """Calls the operation of ``case`` through ``runner``. Returns what ``grad_norm`` returns."""
    call = Call.of(case, len(lists.params))
    if runner.startswith("prepared"):
        return run_prepared(case, call, lists, runner.removeprefix("prepared").removeprefix("-") or "native")
    backend, p, b, g = {"backend": runner}, lists.params, lists.backups, lists.grads
    summed = {"accumulators": lists.accumulators}
    if case.op == "grad_norm":
        return ops.grad_norm(g, p if any(call.scaling) else (), call.scaling, **summed, **call.scalars, **backend)
    if case.op == "perturb_":
        ops.perturb_(
            p,
            b,
            g,
            call.norm,
            call.hyper,
            call.groups,
            call.scaling,
            backup_exists=case.backup_exists,
            **call.scalars,
            **backend,
        )
    elif case.op == "restore_":
        ops.restore_(p, b, **backend)
    elif case.op == "restore_accumulate_":
        ops.restore_accumulate_(p, b, g, lists.accumulators, fresh=case.fresh, **call.scalars, **backend)
    elif case.op == "restore_sgd_":
        buffers = lists.momentum_buffers if uses_momentum(case) else []
        ops.restore_sgd_(p, b, g, buffers, call.hyper, call.groups, call.first, **summed, **call.scalars, **backend)
    else:
        largest = lists.max_exp_avg_sqs if uses_amsgrad(case) else []
        moments = (lists.exp_avgs, lists.exp_avg_sqs, largest, lists.steps)
        ops.restore_adamw_(p, b, g, *moments, call.hyper, call.groups, **summed, **call.scalars, **backend)
    return None


def prepare(case: Case, call: Call, lists: Lists, backend: str = "native") -> TensorSet:
    options: dict = {"groups": call.groups, "scaling": call.scaling, "accumulators": lists.accumulators}
    if case.op == "restore_sgd_":
        options |= {"states": (lists.momentum_buffers,) if uses_momentum(case) else (), "first": call.first}
    elif case.op == "restore_adamw_":
        largest = lists.max_exp_avg_sqs if uses_amsgrad(case) else []
        options |= {"states": (lists.exp_avgs, lists.exp_avg_sqs, largest), "steps": lists.steps}
    # A norm needs no backups: the parameters stand in for them.
    return TensorSet(lists.params, lists.backups or lists.params, backend=backend, **options)


def run_prepared(case: Case, call: Call, lists: Lists, backend: str = "native") -> tuple[Tensor, Tensor] | None:
    return operate(case, call, prepare(case, call, lists, backend), lists.grads)


def operate(case: Case, call: Call, tensors: TensorSet, gradients: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The operation on a prepared set."""
    if case.op == "restore_":
        tensors.restore_()
        return None
    grads = tensors.checked(gradients)
    if case.op == "grad_norm":
        norm, found_inf = tensors.grad_norm(grads, **call.scalars)
        return norm.clone(), found_inf.clone()
    if case.op == "perturb_":
        tensors.perturb_(grads, call.norm, call.hyper, backup_exists=case.backup_exists, **call.scalars)
    elif case.op == "restore_accumulate_":
        tensors.restore_accumulate_(grads, fresh=case.fresh, **call.scalars)
    elif case.op == "restore_sgd_":
        tensors.restore_sgd_(grads, call.hyper, Factors(**call.scalars))
    else:
        tensors.restore_adamw_(grads, call.hyper, Factors(**call.scalars))
    return None
