"""Whole runs with SAM over the last quarter: `python -m benchmarks.late_switch`.

A run is some steps of training; one round is one run of each optimizer in turn, on a net of its own. What SAM over the last
quarter [2410.10373] may cost is a quarter more forward and backward passes: 1.25 times the base run, and what the optimizer
adds to it. Beside it SAM in every step, and SAM that was never switched on, which is to cost nothing: one closure call a step,
the base optimizer's update, a look at the gradients.

The base is torch's fused SGD, the cheapest, so the ratios are the strictest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.baselines import BASES, RHO, make_base
from benchmarks.command import add_common, begin, check_positive, shown_progress
from benchmarks.machine import describe_machine
from benchmarks.measure import Pace, quartiles, rounds_of
from benchmarks.nets import NETS, Net, Task
from benchmarks.noise import NoiseGuard

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


def base_run(task: Task, steps: int) -> Callable[[], float]:
    """Seconds of `steps` steps of the base optimizer alone."""
    optimizer = make_base(list(task.model.parameters()), "sgd", fused=True)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(task.model, *task.batch).backward()
            optimizer.step()
        return time.perf_counter() - start

    return run


def sam_run(task: Task, steps: int, start: float) -> Callable[[], float]:
    """Seconds of `steps` steps of SAM that is on from the fraction `start`; a schedule of its own for each run."""
    from sam_fused import SAM, SwitchSchedule

    optimizer_class, settings = BASES["sgd"]
    optimizer: Any = SAM(list(task.model.parameters()), optimizer_class, rho=RHO, **settings)

    def closure() -> Tensor:
        loss = task.loss(task.model, *task.batch)
        loss.backward()
        return loss

    def run() -> float:
        began = time.perf_counter()
        schedule = SwitchSchedule(optimizer, start=start, total=steps)
        for _ in range(steps):
            optimizer.step(closure)
            schedule.step()
        return time.perf_counter() - began

    return run


def measure(net: Net, steps: int, threads: int, rounds: int, seconds: float, seed: int) -> list[LateRow]:
    """Rounds of one run of each."""
    used_threads, before = net.threads or threads, torch.get_num_threads()
    torch.set_num_threads(used_threads)
    try:
        runs = {}
        for name in TITLES:
            torch.manual_seed(seed)
            task = net.make()
            task.model.train()
            runs[name] = base_run(task, steps) if name == "base" else sam_run(task, steps, STARTS[name])
        kept, discarded = rounds_of(runs, rounds, seconds, 0.0, pace=Pace(warm=0, least=1))
    finally:
        torch.set_num_threads(before)
    used = kept or discarded
    rows = []
    for name in TITLES:
        low, ratio, high = quartiles([figures[name] / figures["base"] for figures in used])
        middle = statistics.median(figures[name] for figures in used)
        fixed = net.name, net.title, name, used_threads, steps
        rows.append(LateRow(*fixed, middle, ratio, low, high, len(kept), len(discarded)))
    return rows


def show(rows: list[LateRow]) -> Table:
    """The table of a run."""
    table = Table("net", "optimizer", title=f"whole runs; goal for SAM over the last quarter: {GOAL} base runs")
    for heading in ("seconds", "base runs", "quartiles", "rounds"):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = f"{row.ratio_q1:.3f} to {row.ratio_q3:.3f}"
        cells = (
            f"{row.median_s:.3f}",
            f"{row.ratio:.3f}",
            spread,
            f"{row.rounds_kept} of {row.rounds_kept + row.rounds_discarded}",
        )
        table.add_row(f"{row.title}, {row.threads} thr., {row.steps} steps", TITLES[row.optimizer], *cells)
    return table


def late_switch_section(report: dict[str, Any]) -> str:
    """The Markdown of `docs/choosing.md` between its two marks."""
    machine, rows = report["machine"], report["rows"]
    lines = [
        "What a whole run costs, as a multiple of the same run with torch's fused SGD alone (median and quartiles of "
        f"alternating rounds, {machine['cpu']}, torch {machine['torch']}, `{report['run']['command']}`; the goal for SAM over "
        f"the last quarter is {report['goal']}, of which 1.25 is the gradients'):",
        "",
        "| net | base step, ms | SAM, never switched on | SAM over the last quarter | SAM in every step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for net in dict.fromkeys(row["net"] for row in rows):
        by_name = {row["optimizer"]: row for row in rows if row["net"] == net}
        base = by_name["base"]
        cells = [
            f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
            for row in (by_name[name] for name in ("off", "late", "always"))
        ]
        title = f"{base['title']}, {base['threads']} thread{'s' if base['threads'] > 1 else ''}"
        lines.append(f"| {title} | {base['median_s'] / base['steps'] * 1e3:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.late_switch", description=(__doc__ or "").split("\n\n")[0])
    add_common(made, "11", "300 for each net")
    made.add_argument("--nets", nargs="+", choices=list(STEPS), default=list(STEPS), help="default: all")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    command, options, console = begin(parser(), lambda o: check_positive(o, ("threads", "rounds", "seconds")), arguments)
    names = ["tiny_mlp"] if options.smoke else options.nets
    rounds, seconds = options.rounds or (2 if options.smoke else 11), options.seconds or 300.0
    rows: list[LateRow] = []
    machine = describe_machine(options.threads)
    with shown_progress(console, len(names), time.perf_counter()) as progress:
        for name in names:
            progress.say(NETS[name].title)
            steps = 16 if options.smoke else STEPS[name]
            rows += measure(NETS[name], steps, options.threads, rounds, seconds, options.seed)
            progress.pair_done()
    console.print(show(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"late-switch-{options.threads}threads{'-smoke' if options.smoke else ''}.json"
    report = {
        "run": {"command": " ".join(["python -m benchmarks.late_switch", *command]), "noise": NoiseGuard().describe()},
        "machine": machine,
        "goal": GOAL,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
