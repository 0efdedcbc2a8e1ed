"""Whole training steps of micro-batch SAM on real nets, held against the same micro-batches without a perturbation.

The base is plain gradient accumulation over the same micro-batches with torch's fused SGD: half as many forward and backward
passes, so a micro-batch SAM step is held against two of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.baselines import BASES, RHO, make_base
from benchmarks.endtoend import Contest, Step, timed
from benchmarks.measure import Pace
from benchmarks.micro_batch_baselines import (
    ForeachInPlaceMicroBatchSAM,
    NaiveMicroBatchSAM,
    SwapMicroBatchSAM,
)
from benchmarks.micro_batch_variants import MicroBatchOptimizer
from benchmarks.nets import Task

NETS = ("resnet20", "encoder")
MICRO_BATCHES = 4


def pieces(task: Task, micro_batches: int) -> Iterator[tuple[Tensor, ...]]:
    """The batch in equal parts."""
    return zip(*(tensor.chunk(micro_batches) for tensor in task.batch), strict=True)


def accumulating(task: Task, micro_batches: int) -> Step:
    """Plain gradient accumulation, base of the comparison."""
    optimizer = make_base(list(task.model.parameters()), "sgd", fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for piece in pieces(task, micro_batches):
            (task.loss(task.model, *piece) / micro_batches).backward()
        optimizer.step()

    return timed(step)


def by_phases(task: Task, micro_batches: int, build: Callable[[list[Tensor], str], MicroBatchOptimizer]) -> Step:
    """A baseline's training step."""
    optimizer = build(list(task.model.parameters()), "sgd")

    def step() -> None:
        for piece in pieces(task, micro_batches):
            task.loss(task.model, *piece).backward()
            optimizer.perturb()
            task.loss(task.model, *piece).backward()
            optimizer.accumulate(1 / micro_batches)
        optimizer.step()

    return timed(step)


def by_closure(task: Task, micro_batches: int) -> Step:
    """Our training step."""
    from sam_fused import MicroBatchSAM

    optimizer_class, settings = BASES["sgd"]
    optimizer: Any = MicroBatchSAM(
        list(task.model.parameters()), optimizer_class, rho=RHO, num_micro_batches=micro_batches, **settings
    )

    def closure(*piece: Tensor) -> Tensor:
        value = task.loss(task.model, *piece)
        value.backward()
        return value

    return timed(lambda: optimizer.step(closure, *task.batch))


def contest(micro_batches: int) -> Contest:
    """Baselines in the forms that need no trial: on nets like these they are within one per cent of each other."""
    count = micro_batches
    return Contest(
        {
            "sgd_fused_accumulation": lambda task: accumulating(task, count),
            "naive_msam": lambda task: by_phases(task, count, lambda p, b: NaiveMicroBatchSAM(p, b, kept=False)),
            "foreach_inplace_msam": lambda task: by_phases(task, count, lambda p, b: ForeachInPlaceMicroBatchSAM(p, b, "kept")),
            "foreach_swap_msam": lambda task: by_phases(task, count, lambda p, b: SwapMicroBatchSAM(p, b, "loop")),
            "sam_fused": lambda task: by_closure(task, count),
        },
        base="sgd_fused_accumulation",
        plain=("sgd_fused_accumulation",),
        title=f", {micro_batches} micro-batches",
        pace=Pace(warm=1, least=2),
    )
