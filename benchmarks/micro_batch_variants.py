"""Rows and drivers of the micro-batch SAM benchmark, for any number K of micro-batches; accesses are those of a whole step.

Per micro-batch and parameter, without what a step adds once: naive 15 (norm 3, clone 2 or copies back 2, perturbation 7, sum
3), foreach in place 9 (1 + 3 + 2 + 3), with `p.data` swapped 7 (1 + 3 + 0 + 3; 9 where it copies), ours 9 (norm 1, perturbation
3, restore and sum in one pass 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.baselines import BASES, RHO
from benchmarks.measure import Pace
from benchmarks.micro_batch_baselines import ForeachInPlaceMicroBatchSAM, NaiveMicroBatchSAM, SwapMicroBatchSAM
from benchmarks.variants import UNFUSED_BASE, Driver, Form, Variant, assign_gradients, backend_missing

# As many sets of gradients as are needed to be no guest of the cache: a set of their own for each pass would be gigabytes.
GRADIENT_SETS = 4


class MicroBatchOptimizer(Protocol):
    """The call form that all baselines share."""

    def perturb(self) -> None:
        """After the first backward pass of a micro-batch."""

    def accumulate(self, weight: float) -> None:
        """After its second."""

    def step(self) -> None:
        """After the last micro-batch."""


class MicroBatchDriver(Driver, Protocol):
    """A driver whose number of micro-batches may change from step to step."""

    micro_batches: int


class PhasesDriver:
    """`perturb()`, `accumulate(1 / K)` K times, `step()`."""

    def __init__(self, params: list[Tensor], optimizer: MicroBatchOptimizer, micro_batches: int) -> None:
        self.params, self.optimizer, self.micro_batches = params, optimizer, micro_batches

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        inside = 0.0
        weight = 1 / self.micro_batches
        calls: tuple[Callable[[], None], ...] = (self.optimizer.perturb, partial(self.optimizer.accumulate, weight))
        for _ in range(self.micro_batches):
            for call in calls:
                assign_gradients(self.params, next(passes))
                start = time.perf_counter()
                call()
                inside += time.perf_counter() - start
        start = time.perf_counter()
        self.optimizer.step()
        return inside + time.perf_counter() - start


class ClosureDriver:
    """`step(closure, batch)` over a batch of one sample per micro-batch: the closure's own time is taken off."""

    def __init__(self, params: list[Tensor], optimizer: Any, micro_batches: int) -> None:
        self.params, self.optimizer = params, optimizer
        self.micro_batches = micro_batches
        self.loss = torch.ones(())

    @property
    def micro_batches(self) -> int:
        """K, as the optimizer has it."""
        return int(self.optimizer.num_micro_batches)

    @micro_batches.setter
    def micro_batches(self, count: int) -> None:
        self.optimizer.num_micro_batches = count
        self.batch = torch.zeros(count)

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        outside = 0.0

        def closure(sample: Tensor) -> Tensor:
            nonlocal outside
            entered = time.perf_counter()
            assign_gradients(self.params, next(passes))
            outside += time.perf_counter() - entered
            return self.loss

        start = time.perf_counter()
        self.optimizer.step(closure, self.batch)
        return time.perf_counter() - start - outside


class ByHandDriver:
    """`zero_grad()`, `with optimizer.micro_batch(weight)` K times, `step()`."""

    def __init__(self, params: list[Tensor], optimizer: Any, micro_batches: int) -> None:
        self.params, self.optimizer, self.micro_batches = params, optimizer, micro_batches

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        outside = 0.0
        start = time.perf_counter()
        for _ in range(self.micro_batches):
            self.optimizer.zero_grad()
            entered = time.perf_counter()
            assign_gradients(self.params, next(passes))
            outside += time.perf_counter() - entered
            with self.optimizer.micro_batch(weight=1 / self.micro_batches):
                entered = time.perf_counter()
                assign_gradients(self.params, next(passes))
                outside += time.perf_counter() - entered
        self.optimizer.step()
        return time.perf_counter() - start - outside


def baselines(micro_batches: int) -> list[Variant]:
    """What a user would write, in the table's order."""
    count = micro_batches

    def form(name: str, build: Callable[[list[Tensor], str], MicroBatchOptimizer], accesses: int, *base: Any) -> Form:
        return Form(name, lambda params, chosen: PhasesDriver(params, build(params, chosen), count), accesses, *base)

    naive = (
        form("clones", lambda p, b: NaiveMicroBatchSAM(p, b, kept=False), 15 * count - 1, UNFUSED_BASE),
        form("copied back", lambda p, b: NaiveMicroBatchSAM(p, b, kept=True), 15 * count + 1, UNFUSED_BASE),
    )
    in_place = (
        form("fresh sums", lambda p, b: ForeachInPlaceMicroBatchSAM(p, b, "fresh"), 9 * count + 1),
        form("kept sums", lambda p, b: ForeachInPlaceMicroBatchSAM(p, b, "kept"), 9 * count + 3),
        form("mul(out=) loop", lambda p, b: ForeachInPlaceMicroBatchSAM(p, b, "loop"), 9 * count + 1),
    )
    swap = (
        form("fresh copies", lambda p, b: SwapMicroBatchSAM(p, b, "fresh"), 7 * count - 1),
        form("kept copies", lambda p, b: SwapMicroBatchSAM(p, b, "kept"), 9 * count + 1),
        form("out= loops", lambda p, b: SwapMicroBatchSAM(p, b, "loop"), 7 * count - 1),
    )
    return [
        Variant("naive", "naive mSAM", "phases", naive),
        Variant("foreach_inplace", "foreach in place", "phases", in_place),
        Variant("foreach_swap", "foreach, p.data swapped", "phases", swap),
    ]


DRIVERS: dict[str, Callable[[list[Tensor], Any, int], MicroBatchDriver]] = {
    "closure": ClosureDriver,
    "micro_batch": ByHandDriver,
}


def ours(backend: str, call_form: str, micro_batches: int) -> Variant:
    """One form of ours. In the closure's, the last micro-batch is added up by the base step: 5 accesses less, 1 more."""
    driver = DRIVERS[call_form]

    def build(params: list[Tensor], base: str) -> Driver:
        from sam_fused import MicroBatchSAM

        optimizer_class, settings = BASES[base]
        optimizer = MicroBatchSAM(
            params, optimizer_class, rho=RHO, num_micro_batches=micro_batches, backend=backend, **settings
        )
        return driver(params, optimizer, micro_batches)

    native = 9 * micro_batches - (4 if call_form == "closure" else 0)
    return Variant(
        f"ours_{backend}_{call_form}",
        f"sam_fused {backend}, {call_form}",
        call_form,
        (Form(call_form, build, native if backend == "native" else None),),
        backend=backend,
        ours=True,
        why_not=lambda: backend_missing(backend),
    )


def headline(micro_batches: int) -> Variant:
    """Ours in the form that every ratio refers to."""
    return ours("native" if backend_missing("native") is None else "foreach", "closure", micro_batches)


def all_variants(micro_batches: int) -> list[Variant]:
    """Baselines, then every form of ours but the headline itself, in the table's order."""
    forms = [("native", "closure"), ("native", "micro_batch"), ("foreach", "closure")]
    rest = [ours(*form, micro_batches) for form in forms]
    return [*baselines(micro_batches), *(variant for variant in rest if variant.name != headline(micro_batches).name)]


def by_name(names: list[str], micro_batches: int) -> list[Variant]:
    """The variants of these names."""
    return [variant for variant in all_variants(micro_batches) if variant.name in names]


def pace(micro_batches: int) -> Pace:
    """A step of many micro-batches is a mean by itself, and warm once the first of them is over."""
    return Pace(warm=1, least=-(-3 // micro_batches), trial=-(-5 // micro_batches))
