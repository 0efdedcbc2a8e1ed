"""Every operation by itself, through the door that the optimizer uses, beside a copy of as many elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import BASES, PERTURB_EPS, RHO
from benchmarks.cases import ParameterSet, make_gradients
from benchmarks.gpu_measure import Clock, Device, alternating
from benchmarks.gpu_report import KernelRow
from sam_fused.ops import schema
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.prepared import TensorSet


def _table(columns: tuple[str, ...], values: dict[str, float]) -> Tensor:
    """One group's hyper-parameters; a column left out is 0."""
    return torch.tensor([[float(values.get(column, 0.0)) for column in columns]], dtype=torch.float64, device="cpu")


class Operands:
    """What all backends share: the tensors of one set. Nothing grows, however often it is run: steps start from the backup."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        def fresh(seed: int) -> list[Tensor]:
            return make_gradients(shapes, seed, device, dtype)

        self.params, self.backups, self.grads, self.averages = fresh(1), fresh(2), fresh(3), fresh(4)
        self.squares = [square.square_() for square in fresh(5)]
        self.steps = [torch.zeros((), device=device) for _ in shapes]
        self.sums = [sums.to(arithmetic_dtype(dtype)) for sums in fresh(6)]
        self.weight = torch.full((), 1 / 8, dtype=torch.float64, device=device)

    def calls(self, backend: str) -> dict[str, Callable[[], object]]:
        """Each operation on its own set, gradients checked beforehand: what is launched and nothing else."""
        plain = TensorSet(self.params, self.backups, backend=backend)
        summed = TensorSet(self.params, self.backups, backend=backend, accumulators=self.sums)
        sgd = TensorSet(self.params, self.backups, backend=backend, states=(self.averages,))
        moments: tuple[list[Tensor], ...] = (self.averages, self.squares, [])
        adam = TensorSet(self.params, self.backups, backend=backend, states=moments, steps=self.steps)
        rho = _table(schema.PERTURB_COLUMNS, {"rho": RHO, "perturb_eps": PERTURB_EPS})
        sgd_hyper = _table(schema.SGD_COLUMNS, BASES["sgd"][1])
        adamw = {**BASES["adamw"][1], "decoupled": 1.0}
        adamw["beta1"], adamw["beta2"] = adamw.pop("betas")
        adamw_hyper = _table(schema.ADAM_COLUMNS, adamw)
        given, for_sgd, for_adam = plain.checked(self.grads), sgd.checked(self.grads), adam.checked(self.grads)
        adding = summed.checked(self.grads)
        norm = plain.grad_norm(given)[0].clone()
        return {
            "grad_norm": lambda: plain.grad_norm(given),
            "perturb_": lambda: plain.perturb_(given, norm, rho),
            "restore_": plain.restore_,
            "restore_accumulate_": lambda: summed.restore_accumulate_(adding, self.weight),
            "restore_sgd_": lambda: sgd.restore_sgd_(for_sgd, sgd_hyper),
            "restore_adamw_": lambda: adam.restore_adamw_(for_adam, adamw_hyper),
        }


class KernelBench:
    """The operations of one set and dtype, for every backend, in alternation."""

    def __init__(self, parameter_set: ParameterSet, name: str, dtype: torch.dtype, device: Device, backends: list[str]) -> None:
        self.set, self.name, self.dtype, self.device, self.backends = parameter_set, name, dtype, device, backends

    def _row(self, backend: str, op: str, accesses: tuple[int, int]) -> KernelRow:
        moved = sum(accesses) * self.dtype.itemsize * self.set.parameters
        if op == "restore_accumulate_":  # the accumulator is read and written in the dtype of the arithmetic
            moved += 2 * (arithmetic_dtype(self.dtype).itemsize - self.dtype.itemsize) * self.set.parameters
        return KernelRow(self.set.name, self.name, backend, op, self.set.tensors, self.set.parameters, moved)

    def not_measured(self, reason: str) -> list[KernelRow]:
        """The rows, each with the reason."""
        rows = [self._row(backend, op.name, op.accesses) for backend in self.backends for op in schema.OPS.values()]
        for row in rows:
            row.reason = reason
        return rows

    def measure(self, clock: Clock, rounds: int, repeats: int) -> list[KernelRow]:
        """The copy's row first: its 100 per cent are the others' yardstick."""
        try:
            operands = Operands(self.set.shapes(), self.dtype, self.device.name)
            source = torch.ones(self.set.parameters, dtype=self.dtype, device=self.device.name)
            target = torch.empty_like(source)
            calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
            for backend in self.backends:
                calls |= {f"{backend} {op}": call for op, call in operands.calls(backend).items()}
            seconds = alternating(clock, calls, rounds, repeats)
        except Exception as error:  # a full memory must not take the other sets' figures with it
            return self.not_measured(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300])
        rows = [self._row("torch", "copy", (1, 1))]
        rows += [self._row(backend, op.name, op.accesses) for backend in self.backends for op in schema.OPS.values()]
        for row, taken in zip(rows, seconds.values(), strict=True):
            row.ms, row.gb_per_s = 1e3 * taken, row.bytes / taken / 1e9
        copied = rows[0].gb_per_s
        for row in rows:
            row.percent_of_copy = 100 * row.gb_per_s / copied if row.gb_per_s and copied else None
        return rows
