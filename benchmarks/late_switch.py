"""Whole runs with SAM over the last quarter: `python -m benchmarks.late_switch`.

A run is some steps of training; one round is one run of each optimizer in turn, on a net of its own. What SAM over the last
quarter [2410.10373] may cost is a quarter more forward and backward passes: 1.25 times the base run, and what the optimizer
adds to it. Beside it SAM in every step, and SAM that was never switched on, which is to cost nothing: one closure call a step,
the base optimizer's update, a look at the gradients.

The base is torch's fused SGD, the cheapest, so the ratios are the strictest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.baselines import BASES, RHO, make_base
from benchmarks.command import add_common, begin, check_positive, measure_each
from benchmarks.measure import Pace, quartiles, rounds_of
from benchmarks.nets import NETS, Net, Task

# Steps of a run: half a second and more of the base, so that a tick of the noise guard's counters is a small part of it.
STEPS = {"tiny_mlp": 800, "resnet20": 32, "encoder": 40}
GOAL = 1.27
STARTS = {"late": 0.75, "always": 0.0, "off": 1.0}
TITLES = {
    "base": "SGD, torch's fused form",
    "late": "SAM over the last quarter",
    "always": "SAM in every step",
    "off": "SAM, never switched on",
}


@dataclass(frozen=True)
class LateRow:
    """One optimizer on one net: seconds of a run, and how many base runs that is, round by round."""

    net: str
    title: str
    optimizer: str
    threads: int
    steps: int
    median_s: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    rounds_kept: int
    rounds_discarded: int
    noisy: bool  # no round was quiet: the figures are those of the discarded ones


class Runs:
    """Runs of one optimizer on a net of its own, each from the same weights with momentum 0: every run is the same run."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.task, self.optimizer, self.steps = task, optimizer, steps
        self._start = [tensor.detach().clone() for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [*self.task.model.parameters(), *self.task.model.buffers()]

    def __call__(self) -> float:
        """Seconds of a run; what goes before and after it is not timed."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), self._start, strict=True):
                tensor.copy_(value)
            for held in self.optimizer.state.values():
                for value in held.values():
                    value.zero_()
        began = time.perf_counter()
        loss = self.train()
        seconds = time.perf_counter() - began
        if not torch.isfinite(loss):
            raise RuntimeError(f"late_switch: expected a net that trains, got the loss {loss.item()}: lower the learning rate.")
        return seconds

    def train(self) -> Tensor:
        """A run; returns the last loss."""
        raise NotImplementedError

    def evaluate(self) -> Tensor:
        """Forward and backward pass."""
        loss: Tensor = self.task.loss(self.task.model, *self.task.batch)
        loss.backward()
        return loss


class BaseRuns(Runs):
    """The base optimizer alone."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, make_base(list(task.model.parameters()), "sgd", fused=True), steps)

    def train(self) -> Tensor:
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            loss = self.evaluate()
            self.optimizer.step()
        return loss


class SAMRuns(Runs):
    """SAM that is on from the fraction `start`; a schedule of its own for each run."""

    def __init__(self, task: Task, steps: int, start: float) -> None:
        from sam_fused import SAM

        optimizer_class, settings = BASES["sgd"]
        self.sam: Any = SAM(list(task.model.parameters()), optimizer_class, rho=RHO, **settings)
        self.start = start
        super().__init__(task, self.sam, steps)

    def __call__(self) -> float:
        seconds = super().__call__()
        if int(self.sam.ascent_overflows):
            raise RuntimeError("late_switch: expected an ascent in every step of SAM, got gradients that were not finite.")
        return seconds

    def train(self) -> Tensor:
        from sam_fused import SwitchSchedule

        schedule = SwitchSchedule(self.sam, start=self.start, total=self.steps)
        for _ in range(self.steps):
            loss: Tensor = self.sam.step(self.evaluate)
            schedule.step()
        return loss


def measure(net: Net, steps: int, threads: int, rounds: int, seconds: float, seed: int) -> list[LateRow]:
    """Rounds of one run of each."""
    used_threads, before = net.threads or threads, torch.get_num_threads()
    torch.set_num_threads(used_threads)
    try:
        runs: dict[str, Callable[[], float]] = {}
        for name in TITLES:
            torch.manual_seed(seed)
            task = net.make()
            task.model.train()
            runs[name] = BaseRuns(task, steps) if name == "base" else SAMRuns(task, steps, STARTS[name])
        kept, discarded = rounds_of(runs, rounds, seconds, 0.0, pace=Pace(warm=0, least=1))
    finally:
        torch.set_num_threads(before)
    used = kept or discarded
    rows = []
    for name in TITLES:
        low, ratio, high = quartiles([figures[name] / figures["base"] for figures in used])
        middle = statistics.median(figures[name] for figures in used)
        fixed = net.name, net.title, name, used_threads, steps
        rows.append(LateRow(*fixed, middle, ratio, low, high, len(kept), len(discarded), not kept))
    return rows


def show(rows: list[LateRow]) -> Table:
    """The table of a run."""
    table = Table("net", "optimizer", title=f"whole runs; goal for SAM over the last quarter: {GOAL} base runs")
    for heading in ("seconds", "base runs", "quartiles", "rounds"):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = f"{row.ratio_q1:.3f} to {row.ratio_q3:.3f}"
        rounds = f"{row.rounds_kept} of {row.rounds_kept + row.rounds_discarded}{', noisy' if row.noisy else ''}"
        cells = f"{row.median_s:.3f}", f"{row.ratio:.3f}", spread, rounds
        table.add_row(f"{row.title}, {row.threads} thr., {row.steps} steps", TITLES[row.optimizer], *cells)
    return table


NOT_PUBLISHED = "SAM late has not been measured on a quiet machine yet: `python -m benchmarks.late_switch`."


def late_switch_section(report: dict[str, Any] | None) -> str:
    """The Markdown of `docs/choosing.md` between its two marks; one sentence where nothing has been published."""
    if report is None:
        return NOT_PUBLISHED
    machine, rows = report["machine"], report["rows"]
    lines = [
        "What a whole run costs, as a multiple of the same run with torch's fused SGD alone: median (quartiles) of alternating "
        f"rounds, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; `{report['run']['command']}`. The "
        f"gradients of SAM over the last quarter are 1.25 base runs; the goal for all of it is {report['goal']}.",
        "",
        "| net | base step, ms | SAM, never switched on | SAM over the last quarter | SAM in every step | rounds kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for net in dict.fromkeys(row["net"] for row in rows):
        by_name = {row["optimizer"]: row for row in rows if row["net"] == net}
        base = by_name["base"]
        cells = [_ratio_cell(by_name[name], report["goal"]) for name in ("off", "late", "always")]
        title = f"{base['title']}, {base['threads']} thread{'s' if base['threads'] > 1 else ''}"
        rounds = f"{base['rounds_kept']} of {base['rounds_kept'] + base['rounds_discarded']}"
        if base["noisy"]:
            rounds += ", noisy"
        lines.append(f"| {title} | {base['median_s'] / base['steps'] * 1e3:.3g} | {' | '.join(cells)} | {rounds} |")
    lines += ["", "All that was measured: `benchmarks/results/published/late-switch-2threads.json`."]
    return "\n".join(lines)


def _ratio_cell(row: dict[str, Any], goal: float) -> str:
    missed = f" (goal {goal})" if row["optimizer"] == "late" and row["ratio"] > goal else ""
    return f"{row['ratio']:.3f}{missed} ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.late_switch", description=(__doc__ or "").split("\n\n")[0])
    add_common(made, "11", "300 for each net")
    made.add_argument("--nets", nargs="+", choices=list(STEPS), default=list(STEPS), help="default: all")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    begun = begin(parser(), lambda o: check_positive(o, ("threads", "rounds", "seconds")), arguments)
    options = begun[1]
    rounds, seconds = options.rounds or (2 if options.smoke else 11), options.seconds or 300.0
    titles = {name: NETS[name].title for name in (["tiny_mlp"] if options.smoke else options.nets)}

    def measured(name: str) -> list[LateRow]:
        steps = 16 if options.smoke else STEPS[name]
        return measure(NETS[name], steps, options.threads, rounds, seconds, options.seed)

    return measure_each("late_switch", "late-switch", begun, titles, measured, show, goal=GOAL)


if __name__ == "__main__":
    sys.exit(main())
