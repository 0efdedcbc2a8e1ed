"""The optimizer side: every variant beside ours, parameter set by parameter set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import ParameterSet
from benchmarks.measure import (
    BLOCK_SECONDS,
    PACE,
    Choice,
    Gradients,
    Pace,
    Rounds,
    Yardstick,
    alternate,
    best_form,
    build,
    quartiles,
    runner,
    yardstick,
)
from benchmarks.memory import peak_bytes
from benchmarks.report import FOREACH_MINIMUM, Row, Target, judge
from benchmarks.variants import BASE_STATE_COPIES, Form, Variant, by_name, headline

FOREACH_ROW = "ours_foreach_first_second"


@dataclass
class Settings:
    """How long and how often. `compile_forms` limits the forms of torch.compile, which take minutes to compile."""

    rounds: int = 7
    seconds: float = 110.0
    block_seconds: float = BLOCK_SECONDS
    seed: int = 0
    compile_forms: int | None = 1


class Budget:
    """Shares the seconds for measuring among the pairs still to come; building and compiling are not charged."""

    def __init__(self, seconds: float, pairs: int) -> None:
        self.left, self.pairs = seconds, pairs

    def share(self) -> float:
        """Seconds for the next pair."""
        return max(0.0, self.left) / max(1, self.pairs)

    def charge(self, seconds: float) -> None:
        """Takes off what a pair took."""
        self.left -= seconds
        self.pairs -= 1


@dataclass
class Progress:
    """Where the command line hears of what goes on: one line of text, one round done, one pair done."""

    say: Callable[[str], None] = lambda text: None
    round_done: Callable[[], None] = lambda: None
    pair_done: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Kind:
    """Of step: SAM's, or micro-batch SAM's. `ours` is what every ratio refers to, `gradient_sets` what its passes share."""

    ours: Variant
    micro_batches: int = 1
    gradient_sets: int = 2
    pace: Pace = PACE


@dataclass
class SetResult:
    """All rows of one parameter set with one base."""

    rows: list[Row]
    checks: list[Target]
    yardstick: Yardstick


def extra_bytes(form: Form, parameter_set: ParameterSet, base: str, gradients: Gradients, seed: int) -> int:
    """Peak of two steps above the parameters and the base optimizer's state; gradients are made before, of their dtype."""
    dtype = gradients.sets[0][0].dtype

    def run() -> object:
        driver = build(form, parameter_set, base, seed, dtype)
        for _ in range(2):
            driver.step(gradients.next())
        return driver

    owned = (1 + BASE_STATE_COPIES[base]) * parameter_set.parameters * dtype.itemsize
    return max(0, peak_bytes(run) - owned)


class SetBench:
    """Measures the variants of one parameter set and base against one instance of ours, which stays."""

    def __init__(
        self,
        parameter_set: ParameterSet,
        base: str,
        settings: Settings,
        budget: Budget,
        progress: Progress,
        kind: Kind | None = None,
    ) -> None:
        self.set, self.base, self.settings, self.budget, self.progress = parameter_set, base, settings, budget, progress
        self.kind = kind or Kind(headline())
        # Graphs of other sets would be tried first at every call: one code object holds all its compiled forms.
        torch.compiler.reset()
        self.gradients = Gradients.make(parameter_set.shapes(), settings.seed, self.kind.gradient_sets)
        self.ours = self._choose(self.kind.ours)
        self.ours_run = runner(self.ours.driver, self.gradients)
        self.yardstick = yardstick(parameter_set.parameters, min(5, settings.rounds), settings.block_seconds)
        self.ours_rounds = Rounds()

    def _choose(self, variant: Variant) -> Choice:
        limit = self.settings.compile_forms if variant.name == "torch_compile" else None
        return best_form(variant, self.set, self.base, self.gradients, self.settings.seed, limit, self.kind.pace)

    @property
    def title(self) -> str:
        """What is measured, for the command line."""
        count = self.kind.micro_batches
        return f"{self.set.name} {self.base}" + (f", {count} micro-batches" if count > 1 else "")

    def _empty_row(self, variant: Variant) -> Row:
        return Row(
            set=self.set.name,
            base=self.base,
            variant=variant.name,
            title=variant.title,
            form=variant.forms[0].name,
            call_form=variant.call_form,
            backend=variant.backend,
            tensors=self.set.tensors,
            parameters=self.set.parameters,
            threads=torch.get_num_threads(),
            micro_batches=self.kind.micro_batches,
        )

    def _alternate(self, variant: Callable[[], float], ours: Callable[[], float]) -> Rounds:
        start = time.perf_counter()
        rounds = alternate(
            variant,
            ours,
            self.settings.rounds,
            start + self.budget.share(),
            self.settings.block_seconds,
            self.progress.round_done,
            self.kind.pace,
        )
        self.budget.charge(time.perf_counter() - start)
        return rounds

    def _fill(self, row: Row, form: Form, seconds: list[float], rounds: Rounds) -> None:
        row.q1_ms, row.median_ms, row.q3_ms = (1e3 * value for value in quartiles(seconds))
        row.rounds_kept, row.rounds_discarded, row.noisy = len(rounds.kept), len(rounds.discarded), rounds.noisy
        row.form, row.accesses_sam = form.name, form.accesses
        if form.accesses is not None:
            row.accesses_with_base = form.accesses + form.base_accesses[self.base]
            moved = row.accesses_with_base * self.set.parameters * torch.float32.itemsize
            row.gb_per_s = moved / statistics.median(seconds) / 1e9
            row.percent_of_copy = 100 * row.gb_per_s / self.yardstick.copy_gb_per_s
        row.peak_extra_bytes = extra_bytes(form, self.set, self.base, self.gradients, self.settings.seed)

    def measure(self, variant: Variant) -> Row:
        """One row; a variant that cannot run here gives its reason, and costs the table nothing else."""
        row = self._empty_row(variant)
        row.reason = variant.why_not()
        if row.reason is not None:
            self.budget.charge(0.0)
            return row
        compiles = ", compiling first: minutes when its cache is cold" if variant.name == "torch_compile" else ""
        self.progress.say(f"{self.title}: {variant.title}{compiles}")
        try:
            choice = self._choose(variant)
        except Exception as error:  # whatever a foreign package or a compiler raises belongs into its row
            self.budget.charge(0.0)
            row.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
            return row
        rounds = self._alternate(runner(choice.driver, self.gradients), self.ours_run)
        self.ours_rounds.kept += rounds.kept
        self.ours_rounds.discarded += rounds.discarded
        self._fill(row, choice.form, [variant_seconds for variant_seconds, _ in rounds.used], rounds)
        row.ratio_q1, row.ratio_to_ours, row.ratio_q3 = quartiles(rounds.ratios)
        row.trials_ms = choice.trials
        return row

    def headline_row(self) -> Row:
        """Ours, over every round of every pair: the form that the ratios of the other rows refer to."""
        if not self.ours_rounds.used:  # nothing ran beside it
            self.ours_rounds = self._alternate(self.ours_run, self.ours_run)
        row = self._empty_row(self.kind.ours)
        self._fill(row, self.ours.form, [ours for _, ours in self.ours_rounds.used], self.ours_rounds)
        row.ratio_q1 = row.ratio_to_ours = row.ratio_q3 = 1.0
        return row

    def foreach_check(self, naive: Variant) -> Target:
        """naive over our foreach backend, side by side: what users without a compiler get must not be a step back."""
        self.progress.say(f"{self.title}: foreach backend beside naive")
        drivers = [self._choose(variant).driver for variant in (naive, by_name_or_headline(FOREACH_ROW))]
        rounds = self._alternate(*(runner(driver, self.gradients) for driver in drivers))
        reached = statistics.median(rounds.ratios)
        return judge(self.set.name, "naive / our foreach backend", FOREACH_MINIMUM, reached, rounds.noisy)


def by_name_or_headline(name: str) -> Variant:
    """The variant of this name; the headline is not in the list that `by_name` looks at."""
    return headline() if headline().name == name else by_name([name])[0]


def measure_set(
    parameter_set: ParameterSet,
    base: str,
    variants: list[Variant],
    settings: Settings,
    budget: Budget,
    progress: Progress,
    kind: Kind | None = None,
) -> SetResult:
    """Rows in the order of `variants`, ours first; our foreach backend beside naive where both are asked for."""
    progress.say(f"{parameter_set.name} {base}: gradients, yardsticks")
    bench = SetBench(parameter_set, base, settings, budget, progress, kind)
    rows = []
    for variant in variants:
        rows.append(bench.measure(variant))
        progress.pair_done()
    checks = []
    if needs_foreach_check(variants):
        checks.append(bench.foreach_check(variants[0]))
        progress.pair_done()
    return SetResult([bench.headline_row(), *rows], checks, bench.yardstick)


def needs_foreach_check(variants: list[Variant]) -> bool:
    """Whether naive is asked for (it comes first) beside our foreach backend."""
    names = {variant.name for variant in variants} | {headline().name}
    return bool(variants) and variants[0].name == "naive" and FOREACH_ROW in names


def pairs_of(variants: list[Variant]) -> int:
    """How many pairs a set takes, for the budget and the progress bar."""
    return len(variants) + int(needs_foreach_check(variants))
