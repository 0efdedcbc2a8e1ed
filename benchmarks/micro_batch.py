"""What does micro-batch SAM cost beside the gradients? `python -m benchmarks.micro_batch`.

Measures the optimizer side of a step of K micro-batches, ours beside what a user would write instead; how it and its memory
grow with K; then whole training steps of small networks. Prints tables; writes JSON, CSV and two pictures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from benchmarks.cases import DEFAULT_SETS, SETS
from benchmarks.command import add_common, begin, check_positive, shown_progress
from benchmarks.endtoend import EndToEndRow, measure_net
from benchmarks.machine import describe_machine
from benchmarks.micro_batch_endtoend import MICRO_BATCHES, contest
from benchmarks.micro_batch_endtoend import NETS as DEFAULT_NETS
from benchmarks.micro_batch_growth import COUNTS, Line, measure_growth, print_growth, write_growth_png
from benchmarks.micro_batch_memory import (
    LowMemoryRow,
    MemoryRow,
    measure_low_memory,
    measure_memory,
    print_memory,
)
from benchmarks.micro_batch_variants import GRADIENT_SETS, all_variants, baselines, by_name, headline, pace
from benchmarks.nets import NETS
from benchmarks.noise import NoiseGuard
from benchmarks.plot import write_png
from benchmarks.report import Row, Target, print_end_to_end, print_rows, print_targets, targets, write_csv, write_json
from benchmarks.suite import Budget, Kind, Settings, measure_set
from benchmarks.variants import Variant

# The settings of `baselines.BASES`.
BASE = "sgd"
DEFAULT_COUNTS = (4, 8, 32)
BRIEF_COUNTS = (8,)
SMOKE_COUNTS = (2, 3)
# Variant over ours, whatever the number of micro-batches.
REQUIRED: dict[str, dict[str, float]] = {
    "resnet50": {"naive": 2.0, "foreach_inplace": 1.8, "foreach_swap": 1.0},
    "lora": {"naive": 4.0, "foreach_inplace": 4.0, "foreach_swap": 2.0},
    "tiny": {"naive": 8.0, "foreach_inplace": 3.0, "foreach_swap": 3.0},
}
NET_SECONDS = 10.0

METHOD = (
    "Optimizer side of one micro-batch SAM step: time in optimizer code with the base step and the clearing of gradients, "
    "which every variant does before each of the 2K passes; gradients are assigned outside the clock, new tensors over a few "
    "sets in turn. Each variant is timed next to ours in alternating blocks, each warmed before; a block's figure is the "
    "median of its steps, ms is the median over rounds, x ours the median over rounds of the round's own ratio variant / ours. "
    "In the tables times and accesses (reads + writes in elements per parameter, mSAM's own and with the base step) are "
    "divided by K; in the files they are those of the step. A variant with several forms is measured in the one that a trial "
    "found fastest for the set and K. Peak MiB is the high-water mark of torch's CPU allocator above parameters, gradients and "
    "the base optimizer's state."
)


@dataclass
class Measured:
    """Everything that the report holds."""

    rows: list[Row] = field(default_factory=list)
    yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: list[MemoryRow] = field(default_factory=list)
    growth: list[Line] = field(default_factory=list)
    low_memory: list[LowMemoryRow] = field(default_factory=list)
    end_to_end: list[EndToEndRow] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.micro_batch", description=__doc__)
    names = [variant.name for variant in all_variants(1)]
    counts = " ".join(map(str, DEFAULT_COUNTS))
    made.add_argument("--sets", nargs="+", choices=list(SETS), help=f"parameter sets (default: {' '.join(DEFAULT_SETS)})")
    made.add_argument("--counts", nargs="+", type=int, metavar="K", help=f"numbers of micro-batches (default: {counts})")
    made.add_argument("--variants", nargs="+", choices=names, metavar="NAME", help=f"rows beside ours: {', '.join(names)}")
    made.add_argument("--nets", nargs="*", choices=list(NETS), help="end-to-end networks; none with an empty list")
    made.add_argument(
        "--brief", action="store_true", help=f"{BRIEF_COUNTS[0]} micro-batches, baselines and networks: what `make bench` runs"
    )
    add_common(made, rounds="7; with --brief 5", seconds="300; with --brief 30", plots=True)
    return made


def check_arguments(options: argparse.Namespace) -> None:
    """Raises ValueError with one sentence on a number that cannot be meant."""
    check_positive(options, ("threads", "rounds", "seconds", "counts"))
    if options.brief and options.smoke:
        raise ValueError("--brief and --smoke: expected at most one of them, got both")


def sets_of(options: argparse.Namespace) -> list[str]:
    """The smallest first: every large set measured before scatters the small ones' objects more over the heap."""
    chosen = options.sets or (("smoke",) if options.smoke else DEFAULT_SETS)
    return sorted(chosen, key=lambda name: SETS[name].parameters)


def plan(options: argparse.Namespace) -> list[tuple[str, int, list[Variant]]]:
    """(set, number of micro-batches, variants) in the order of measuring."""
    counts = options.counts or (SMOKE_COUNTS if options.smoke else BRIEF_COUNTS if options.brief else DEFAULT_COUNTS)

    def variants(count: int) -> list[Variant]:
        if options.variants:
            return by_name(options.variants, count)
        return baselines(count) if options.brief else all_variants(count)

    return [(name, count, variants(count)) for name in sets_of(options) for count in counts]


def file_stem(options: argparse.Namespace) -> str:
    """Names the kind of run, so that none but a default run can overwrite the published figures."""
    by_hand = options.sets or options.counts or options.variants or options.nets is not None
    kind = "-smoke" if options.smoke else "-partial" if by_hand else "-brief" if options.brief else ""
    return f"micro-batch-{options.threads}threads{kind}"


def settings_of(options: argparse.Namespace) -> Settings:
    """How long and how often."""
    return Settings(
        rounds=options.rounds or (2 if options.smoke else 5 if options.brief else 7),
        seconds=options.seconds or (5.0 if options.smoke else 30.0 if options.brief else 300.0),
        block_seconds=0.005 if options.smoke else Settings.block_seconds,
        seed=options.seed,
    )


def growth_settings(options: argparse.Namespace) -> Settings:
    """Of one set's growth: seconds for all numbers of micro-batches together."""
    settings = settings_of(options)
    settings.rounds, settings.seconds = (1, 2.0) if options.smoke else (3, 60.0)
    return settings


def measure(options: argparse.Namespace, console: Console) -> Measured:
    """All that the options ask for."""
    steps, settings, found = plan(options), settings_of(options), Measured()
    nets = options.nets
    if nets is None:
        nets = ("tiny_mlp",) if options.smoke else DEFAULT_NETS
    budget = Budget(settings.seconds, sum(len(variants) for _, _, variants in steps))
    with shown_progress(console, budget.pairs + len(nets), time.perf_counter()) as progress:
        for name, count, variants in steps:
            kind = Kind(headline(count), count, GRADIENT_SETS, pace(count))
            result = measure_set(SETS[name], BASE, variants, settings, budget, progress, kind)
            found.rows += result.rows
            found.yardsticks[f"{name} {BASE} {count}"] = asdict(result.yardstick)
        if not options.brief:
            measured = list(dict.fromkeys(count for _, count, _ in steps))
            for name in sets_of(options):
                forms = {row.variant: row.form for row in found.rows if row.set == name}
                growth = growth_settings(options)
                counts = COUNTS[:3] if options.smoke else COUNTS
                found.growth += measure_growth(SETS[name], BASE, forms, growth, counts, progress.say)
                progress.say(f"{name}: peak memory")
                found.memory += measure_memory(SETS[name], BASE, measured, options.seed)
            found.low_memory = measure_low_memory(options.seed, ["wide_mlp"] if options.smoke else None)
        for name in nets:
            progress.say(f"end to end: {NETS[name].title}, {MICRO_BATCHES} micro-batches")
            limit = 1.0 if options.smoke else NET_SECONDS
            found.end_to_end += measure_net(
                NETS[name],
                options.threads,
                settings.rounds,
                limit,
                options.seed,
                settings.block_seconds,
                contest=contest(MICRO_BATCHES),
            )
            progress.pair_done()
    return found


def describe_run(options: argparse.Namespace, command: Sequence[str], rows: list[Row], started: float) -> dict[str, Any]:
    """The command, the rounds and the method, for whoever repeats it."""
    # The headline's rounds are those of its pairs: counted once.
    pairs = [row for row in rows if row.variant != headline(row.micro_batches).name]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.micro_batch", *command]),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "headline": headline(1).name,
        "rounds_kept": sum(row.rounds_kept for row in pairs),
        "rounds_discarded": sum(row.rounds_discarded for row in pairs),
        "noise": NoiseGuard().describe(),
        "method": METHOD,
    }


def print_all(console: Console, found: Measured, judged: list[Target], run: dict[str, Any]) -> None:
    """Every table."""
    print_rows(console, found.rows)
    print_targets(console, judged)
    print_growth(console, found.growth)
    print_memory(console, found.memory, found.low_memory)
    rows = [row.as_dict() for row in found.end_to_end]
    print_end_to_end(console, rows, "over twice the same micro-batches with SGD")
    console.print(METHOD)
    console.print(f"{run['rounds_kept']} rounds kept, {run['rounds_discarded']} discarded: {run['noise']}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 whether or not the required ratios were reached, 2 on a wrong argument."""
    started = time.perf_counter()
    command, options, console = begin(parser(), check_arguments, arguments)
    found = measure(options, console)
    judged = targets(found.rows, REQUIRED)
    run = describe_run(options, command, found.rows, started)
    machine = describe_machine(options.threads)
    print_all(console, found, judged, run)

    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / file_stem(options)
    report = {
        "run": run,
        "machine": machine,
        "yardsticks": found.yardsticks,
        "targets": [asdict(target) for target in judged],
        "rows": [asdict(row) for row in found.rows],
        "growth": [asdict(line) for line in found.growth],
        "memory": [asdict(row) for row in found.memory],
        "low_memory": [asdict(row) for row in found.low_memory],
        "end_to_end": [row.as_dict() for row in found.end_to_end],
    }
    write_json(stem.with_suffix(".json"), report)
    write_csv(stem.with_suffix(".csv"), found.rows)
    if not options.no_plot:
        subtitle = f"{machine['cpu']}, {options.threads} threads"
        side = "optimizer side of a micro-batch"
        reasons = {write_png(stem.with_suffix(".png"), found.rows, subtitle, side)}
        if found.growth:
            reasons.add(write_growth_png(stem.with_name(f"{stem.name}-growth.png"), found.growth, subtitle))
        for reason in reasons - {None}:
            console.print(reason)
    console.print(f"written: {stem.with_suffix('.json')} and beside it, {run['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
