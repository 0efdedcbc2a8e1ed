"""Each operation by itself: `python -m pytest benchmarks/test_kernels.py`, figures by pytest-benchmark.

Through the functions of `sam_fused.ops`, their checks included: what a caller of the functional API pays. The optimizer
goes through prepared sets, which skip that; `python -m benchmarks.throughput` measures those. `extra_info` holds the
GB/s of the accesses that `sam_fused.ops.schema` states for the native kernels, so it is given for those alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import BASES, PERTURB_EPS, RHO
from benchmarks.cases import DEFAULT_SETS, SETS, make_gradients
from benchmarks.variants import backend_missing
from sam_fused import ops
from sam_fused.ops import schema

BACKENDS = ("native", "foreach")


def _table(columns: tuple[str, ...], values: dict[str, float]) -> Tensor:
    """One group's hyper-parameters; a column left out is 0."""
    return torch.tensor([[float(values.get(column, 0.0)) for column in columns]], dtype=torch.float64)


class Operands:
    """Every list that an operation may take, of the shapes of one parameter set."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        def fresh(seed: int) -> list[Tensor]:
            return make_gradients(shapes, seed)

        self.params, self.backups, self.grads = fresh(1), fresh(2), fresh(3)
        self.momenta, self.averages = fresh(4), fresh(5)
        self.squares = [square.square_() for square in fresh(6)]
        self.steps = [torch.zeros(()) for _ in shapes]
        self.norm = torch.ones(())
        self.sums, self.weight = fresh(7), torch.tensor(0.25)


def _calls(operands: Operands, backend: str) -> dict[str, Callable[[], Any]]:
    o = operands
    sgd = BASES["sgd"][1]
    adamw = dict(BASES["adamw"][1])
    adamw["beta1"], adamw["beta2"] = adamw.pop("betas")
    perturb_hyper = _table(schema.PERTURB_COLUMNS, {"rho": RHO, "perturb_eps": PERTURB_EPS})
    sgd_hyper = _table(schema.SGD_COLUMNS, sgd)
    adamw_hyper = _table(schema.ADAM_COLUMNS, {**adamw, "decoupled": 1.0})
    return {
        "grad_norm": lambda: ops.grad_norm(o.grads, backend=backend),
        "perturb_": lambda: ops.perturb_(o.params, o.backups, o.grads, o.norm, perturb_hyper, backend=backend),
        "restore_": lambda: ops.restore_(o.params, o.backups, backend=backend),
        "restore_accumulate_": lambda: ops.restore_accumulate_(o.params, o.backups, o.grads, o.sums, o.weight, backend=backend),
        "restore_sgd_": lambda: ops.restore_sgd_(o.params, o.backups, o.grads, o.momenta, sgd_hyper, backend=backend),
        "restore_adamw_": lambda: ops.restore_adamw_(
            o.params, o.backups, o.grads, o.averages, o.squares, [], o.steps, adamw_hyper, backend=backend
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", schema.OPS)
@pytest.mark.parametrize("set_name", DEFAULT_SETS)
def test_op(benchmark: Any, set_name: str, op: str, backend: str) -> None:
    """One call of one operation over one parameter set."""
    reason = backend_missing(backend)
    if reason is not None:
        pytest.skip(reason)
    calls = _calls(Operands(SETS[set_name].shapes()), backend)
    assert op in calls, f"operation {op} of the schema has no call here: add one to _calls"
    benchmark.group = f"{set_name} {op}"
    benchmark(calls[op])
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if backend == "native" and benchmark.stats is not None:
        moved = sum(schema.OPS[op].accesses) * SETS[set_name].parameters * torch.float32.itemsize
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9
