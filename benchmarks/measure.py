"""Timing: one variant beside ours, in alternation, rounds under the noise guard.

A round is a block of steps of the variant, then a block of steps of ours, each warmed by steps that do not count. A
block's figure is the median of its steps; a round's ratio is the variant's figure over ours; the reported ratio is the
median of the kept rounds' ratios, so that a slow drift of the machine cancels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import ParameterSet, make_gradients, make_parameters
from benchmarks.noise import NoiseGuard
from benchmarks.variants import Driver, Form, Variant

# Long enough for two blocks to span some 60 ticks of /proc/stat on two cores: a resolution of under 2 %.
BLOCK_SECONDS = 0.15
WARM_STEPS = 2
TRIAL_STEPS, TRIAL_TURNS = 5, 3


@dataclass
class Gradients:
    """Two sets of gradient tensors that change places from step to step, as fresh gradients' storages do.

    Every step gets new tensor objects over them: nobody may profit from meeting the same object again.
    """

    sets: tuple[list[Tensor], list[Tensor]]
    turn: int = 0

    @staticmethod
    def make(shapes: list[tuple[int, ...]], seed: int) -> Gradients:
        """Random gradients of these shapes."""
        return Gradients((make_gradients(shapes, seed + 1), make_gradients(shapes, seed + 2)))

    def next(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of pass 1 and pass 2 of the next step."""
        self.turn ^= 1
        first, second = self.sets[self.turn], self.sets[1 - self.turn]
        return [g.detach() for g in first], [g.detach() for g in second]


@dataclass
class Rounds:
    """(variant seconds, ours seconds) per step and round; `discarded` rounds are kept apart, in case all are."""

    kept: list[tuple[float, float]] = field(default_factory=list)
    discarded: list[tuple[float, float]] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        """True where no round was quiet, and the figures come from the noisy ones."""
        return not self.kept and bool(self.discarded)

    @property
    def used(self) -> list[tuple[float, float]]:
        """The rounds that the figures come from."""
        return self.kept or self.discarded

    @property
    def ratios(self) -> list[float]:
        """Variant over ours, round by round."""
        return [variant / ours for variant, ours in self.used]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (inclusive method: never outside the values)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def block(run: Callable[[], float], steps: int) -> float:
    """Median seconds of `steps` runs after the warm ones. The collector is off: its turn would fall on anyone."""
    for _ in range(WARM_STEPS):
        run()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return statistics.median(run() for _ in range(steps))
    finally:
        if enabled:
            gc.enable()


def steps_per_block(run: Callable[[], float], seconds: float) -> int:
    """How many runs fill `seconds` of wall clock, at least 3."""
    run()
    start = time.perf_counter()
    run()
    run()
    return max(3, round(seconds / max((time.perf_counter() - start) / 2, 1e-6)))


def alternate(
    variant: Callable[[], float],
    ours: Callable[[], float],
    rounds: int,
    deadline: float,
    block_seconds: float = BLOCK_SECONDS,
    on_round: Callable[[], None] = lambda: None,
) -> Rounds:
    """Rounds until `rounds` were kept, three times as many were tried, or the deadline passed; at least one."""
    steps = steps_per_block(variant, block_seconds), steps_per_block(ours, block_seconds)
    result = Rounds()
    for number in range(3 * rounds):
        guard = NoiseGuard()
        with guard:
            # Who goes first changes: a machine that slows down within a round favours nobody.
            if number % 2 == 0:
                pair = block(variant, steps[0]), block(ours, steps[1])
            else:
                pair = tuple(reversed((block(ours, steps[1]), block(variant, steps[0]))))  # type: ignore[assignment]
        (result.kept if guard.keep else result.discarded).append(pair)
        on_round()
        if len(result.kept) >= rounds or time.perf_counter() >= deadline:
            break
    return result


def runner(driver: Driver, gradients: Gradients) -> Callable[[], float]:
    """One step of the driver with the next gradients, made before its clock starts."""

    def run() -> float:
        first, second = gradients.next()
        return driver.step(first, second)

    return run


def build(form: Form, parameter_set: ParameterSet, base: str, seed: int) -> Driver:
    """The form over parameters of its own."""
    return form.build(list(make_parameters(parameter_set.shapes(), seed)), base)


@dataclass(frozen=True)
class Choice:
    """The form that a trial chose, built, and each form's trial time in ms."""

    form: Form
    driver: Driver
    trials: dict[str, float]


def best_form(
    variant: Variant, parameter_set: ParameterSet, base: str, gradients: Gradients, seed: int, forms: int | None = None
) -> Choice:
    """Builds each of the first `forms` forms, keeps the fastest of a short trial in turns; the first run compiles, uncounted.

    A form's trial figure is the median over the turns: a noisy moment may not decide which form stands for a baseline.
    """
    tried = variant.forms[:forms]
    assert tried, f"variant {variant.name} must have at least one form"
    drivers = [build(form, parameter_set, base, seed) for form in tried]
    runs = [runner(driver, gradients) for driver in drivers]
    for run in runs:
        run()
    if len(tried) == 1:
        return Choice(tried[0], drivers[0], {})
    turns = [[block(run, TRIAL_STEPS) for run in runs] for _ in range(TRIAL_TURNS)]
    seconds = [statistics.median(turn[index] for turn in turns) for index in range(len(tried))]
    fastest = seconds.index(min(seconds))
    trials = {form.name: figure * 1e3 for form, figure in zip(tried, seconds, strict=True)}
    return Choice(tried[fastest], drivers[fastest], trials)


@dataclass(frozen=True)
class Yardstick:
    """GB/s of a copy and of an in-place add over a buffer as large as the set; write-allocate is not counted."""

    copy_gb_per_s: float
    add_gb_per_s: float


def yardstick(parameters: int, rounds: int, block_seconds: float = BLOCK_SECONDS) -> Yardstick:
    """`y.copy_(x)` reads one and writes one element, `y.add_(x)` reads two and writes one."""
    x, y = torch.rand(parameters), torch.rand(parameters)

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return run

    pairs = alternate(
        timed(lambda: y.copy_(x)), timed(lambda: y.add_(x)), rounds, time.perf_counter() + 5.0, block_seconds
    ).used
    copy_seconds, add_seconds = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    size = parameters * x.element_size() / 1e9
    return Yardstick(2 * size / copy_seconds, 3 * size / add_seconds)
