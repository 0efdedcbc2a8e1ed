"""Timing: one variant beside ours, in alternation, rounds under the noise guard.

A round is a block of steps of the variant, then a block of steps of ours, each warmed by steps that do not count. A
block's figure is the median of its steps; a round's ratio is the variant's figure over ours; the reported ratio is the
median of the kept rounds' ratios, so that a slow drift of the machine cancels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from benchmarks.cases import ParameterSet, make_gradients, make_parameters
from benchmarks.noise import NoiseGuard
from benchmarks.variants import Driver, Form, Variant

# Long enough for two blocks to span some 60 ticks of /proc/stat on two cores: a resolution of under 2 %.
BLOCK_SECONDS = 0.15
TRIAL_TURNS = 3


@dataclass(frozen=True)
class Pace:
    """Steps of a block: how many do not count, how many count at least, how many make one turn of a trial."""

    warm: int = 2
    least: int = 3
    trial: int = 5


PACE = Pace()


@dataclass
class Gradients:
    """A few sets of gradient tensors that change places from step to step, as fresh gradients' storages do.

    Every pass gets new tensor objects over them: nobody may profit from meeting the same object again.
    """

    sets: tuple[list[Tensor], ...]
    turn: int = 0

    @staticmethod
    def make(shapes: list[tuple[int, ...]], seed: int, sets: int = 2, dtype: torch.dtype = torch.float32) -> Gradients:
        """Random gradients of these shapes."""
        return Gradients(tuple(make_gradients(shapes, seed + 1 + number, dtype=dtype) for number in range(sets)))

    def next(self) -> Iterator[list[Tensor]]:
        """The gradients of the next step, one list for each pass, made when it is asked for."""
        self.turn = (self.turn + 1) % len(self.sets)
        return self._from(self.turn)

    def _from(self, turn: int) -> Iterator[list[Tensor]]:
        for number in count(turn):
            yield [g.detach() for g in self.sets[number % len(self.sets)]]


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


def block(run: Callable[[], float], steps: int, warm: int = PACE.warm) -> float:
    """Median seconds of `steps` runs after the warm ones. The collector is off: its turn would fall on anyone."""
    for _ in range(warm):
        run()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return statistics.median(run() for _ in range(steps))
    finally:
        if enabled:
            gc.enable()


def steps_per_block(run: Callable[[], float], seconds: float, least: int = PACE.least) -> int:
    """How many runs fill `seconds` of wall clock, at least `least`."""
    run()
    timed = min(2, least)
    start = time.perf_counter()
    for _ in range(timed):
        run()
    return max(least, round(seconds / max((time.perf_counter() - start) / timed, 1e-6)))


def alternate(
    variant: Callable[[], float],
    ours: Callable[[], float],
    rounds: int,
    deadline: float,
    block_seconds: float = BLOCK_SECONDS,
    on_round: Callable[[], None] = lambda: None,
    pace: Pace = PACE,
) -> Rounds:
    """Rounds until `rounds` were kept, three times as many were tried, or the deadline passed; at least one."""
    steps = steps_per_block(variant, block_seconds, pace.least), steps_per_block(ours, block_seconds, pace.least)
    result = Rounds()
    for number in range(3 * rounds):
        guard = NoiseGuard()
        with guard:
            # Who goes first changes: a machine that slows down within a round favours nobody.
            if number % 2 == 0:
                pair = block(variant, steps[0], pace.warm), block(ours, steps[1], pace.warm)
            else:
                ours_seconds = block(ours, steps[1], pace.warm)
                pair = block(variant, steps[0], pace.warm), ours_seconds
        (result.kept if guard.keep else result.discarded).append(pair)
        on_round()
        if len(result.kept) >= rounds or time.perf_counter() >= deadline:
            break
    return result


def rounds_of(
    runs: dict[str, Callable[[], float]],
    rounds: int,
    seconds: float,
    block_seconds: float,
    on_round: Callable[[], None] = lambda: None,
    pace: Pace = PACE,
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Rounds in which every run has one block in turn, kept and discarded; as many as `alternate` would try.

    Each round starts with the next run: a machine that slows down within a round favours nobody.
    """
    names = list(runs)
    steps = {name: steps_per_block(run, block_seconds, pace.least) for name, run in runs.items()}
    kept: list[dict[str, float]] = []
    discarded: list[dict[str, float]] = []
    deadline = time.perf_counter() + seconds
    for number in range(3 * rounds):
        guard, turn = NoiseGuard(), number % len(names)
        with guard:
            figures = {name: block(runs[name], steps[name], pace.warm) for name in names[turn:] + names[:turn]}
        (kept if guard.keep else discarded).append(figures)
        on_round()
        if len(kept) >= rounds or time.perf_counter() >= deadline:
            break
    return kept, discarded


def runner(driver: Driver, gradients: Gradients) -> Callable[[], float]:
    """One step of the driver with the next gradients, made outside its clock."""

    return lambda: driver.step(gradients.next())


def build(form: Form, parameter_set: ParameterSet, base: str, seed: int, dtype: torch.dtype = torch.float32) -> Driver:
    """The form over parameters of its own."""
    return form.build(list(make_parameters(parameter_set.shapes(), seed, dtype=dtype)), base)


@dataclass(frozen=True)
class Choice:
    """The form that a trial chose, built, and each form's trial time in ms."""

    form: Form
    driver: Driver
    trials: dict[str, float]


def best_form(
    variant: Variant,
    parameter_set: ParameterSet,
    base: str,
    gradients: Gradients,
    seed: int,
    forms: int | None = None,
    pace: Pace = PACE,
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
    turns = [[block(run, pace.trial, pace.warm) for run in runs] for _ in range(TRIAL_TURNS)]
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
