"""What does SAM cost beside the gradients? `python -m benchmarks.throughput`.

Measures the optimizer side of one SAM step for sets of real models' shapes, ours beside what a user would run instead,
then whole training steps of small networks. Prints tables; writes JSON, CSV and a picture.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks.baselines import BASES
from benchmarks.cases import DEFAULT_SETS, FULL_SETS, SETS
from benchmarks.command import add_common, begin, check_positive, shown_progress
from benchmarks.endtoend import EndToEndRow, measure_net
from benchmarks.machine import describe_machine
from benchmarks.nets import DEFAULT_NETS, FULL_NETS, NETS
from benchmarks.noise import NoiseGuard
from benchmarks.plot import write_png
from benchmarks.report import Row, Target, print_end_to_end, print_rows, print_targets, targets, write_csv, write_json
from benchmarks.suite import Budget, Settings, measure_set, pairs_of
from benchmarks.variants import Variant, all_variants, by_name, headline

# Whole training steps are timed until this is over; the first round is always finished.
NET_SECONDS = 14.0
# AdamW in the default run, to stay within four minutes: ours, naive, the strongest form at stable addresses.
SHORT_ADAMW = ("naive", "foreach_inplace")
# The oracle computes in fp64 and is nobody's choice for training: one small set shows what it costs.
REFERENCE_SETS = ("tiny", "smoke")

METHOD = (
    "Optimizer side of one SAM step: time in optimizer code of pass 1 and pass 2, gradients assigned outside the clock "
    "and, in the first/second form, not cleared. Each variant is timed next to ours in alternating blocks, each warmed "
    "before; a block's figure is the median of its steps, ms is the median over rounds, x ours the median over rounds "
    "of the round's own ratio variant / ours. Accesses are reads + writes in elements per parameter, SAM's own and "
    "(with the base step); GB/s counts the latter, without write-allocate; % copy is GB/s over that of a copy of the "
    "same size in this run. Peak MiB is the high-water mark of torch's CPU allocator above parameters, gradients and "
    "the base optimizer's state."
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    names = [variant.name for variant in all_variants()]
    sets_help = f"parameter sets (default: {' '.join(DEFAULT_SETS)})"
    variants_help = f"rows beside {headline().name}, every one by default: {', '.join(names)}"
    made.add_argument("--sets", nargs="+", choices=list(SETS), help=sets_help)
    made.add_argument("--bases", nargs="+", choices=list(BASES), help="base optimizers (default: both)")
    made.add_argument("--variants", nargs="+", choices=names, metavar="NAME", help=variants_help)
    made.add_argument("--nets", nargs="*", choices=list(NETS), help="end-to-end networks; none with an empty list")
    made.add_argument("--full", action="store_true", help="every set, base, variant, form and network")
    add_common(made, rounds="7", seconds="110; with --full 900", plots=True)
    return made


def check_arguments(options: argparse.Namespace) -> None:
    """Raises ValueError with one sentence on a number that cannot be meant."""
    check_positive(options, ("threads", "rounds", "seconds"))
    if options.full and options.smoke:
        raise ValueError("--full and --smoke: expected at most one of them, got both")


def plan(options: argparse.Namespace) -> list[tuple[str, str, list[Variant]]]:
    """(set, base, variants) in the order of measuring: the smallest set first.

    Small sets' times are those of objects scattered over the heap, and every large set measured before scatters them more.
    """
    chosen_sets = options.sets or (("smoke",) if options.smoke else FULL_SETS if options.full else DEFAULT_SETS)
    chosen_bases = options.bases or (("sgd",) if options.smoke else tuple(BASES))
    steps = []
    for set_name in sorted(chosen_sets, key=lambda name: SETS[name].parameters):
        for base in chosen_bases:
            if options.variants:
                variants = by_name(options.variants)
            elif base == "adamw" and not options.full and not options.bases:
                variants = by_name(SHORT_ADAMW)
            else:
                variants = [
                    variant
                    for variant in all_variants()
                    if (variant.backend != "reference" or set_name in REFERENCE_SETS)
                    and not (options.smoke and variant.name == "torch_compile")
                ]
            steps.append((set_name, base, variants))
    return steps


def file_stem(options: argparse.Namespace) -> str:
    """Names the kind of run, so that a partial or a smoke run cannot overwrite the published figures."""
    chosen_by_hand = options.sets or options.bases or options.variants or options.nets is not None
    kind = "-smoke" if options.smoke else "-partial" if chosen_by_hand else "-full" if options.full else ""
    return f"cpu-{options.threads}threads{kind}"


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that the report holds, with the rows as objects."""
    started = time.perf_counter()
    steps = plan(options)
    settings = Settings(
        rounds=options.rounds or (2 if options.smoke else 7),
        seconds=options.seconds or (5.0 if options.smoke else 900.0 if options.full else 110.0),
        block_seconds=0.005 if options.smoke else Settings.block_seconds,
        seed=options.seed,
        compile_forms=None if options.full else 1,
    )
    nets = options.nets
    if nets is None:
        nets = ("tiny_mlp",) if options.smoke else FULL_NETS if options.full else DEFAULT_NETS
    budget = Budget(settings.seconds, sum(pairs_of(variants) for _, _, variants in steps))
    rows: list[Row] = []
    checks: list[Target] = []
    yardsticks: dict[str, dict[str, float]] = {}
    end_to_end: list[EndToEndRow] = []
    with shown_progress(console, budget.pairs + len(nets), started) as progress:
        for set_name, base, variants in steps:
            result = measure_set(SETS[set_name], base, variants, settings, budget, progress)
            rows += result.rows
            checks += result.checks
            yardsticks[f"{set_name} {base}"] = asdict(result.yardstick)
        for name in nets:
            progress.say(f"end to end: {NETS[name].title}")
            limit = 1.0 if options.smoke else NET_SECONDS
            end_to_end += measure_net(NETS[name], options.threads, settings.rounds, limit, options.seed, settings.block_seconds)
            progress.pair_done()
    return {"rows": rows, "targets": targets(rows) + checks, "yardsticks": yardsticks, "end_to_end": end_to_end}


def describe_run(options: argparse.Namespace, command: Sequence[str], rows: list[Row], started: float) -> dict[str, Any]:
    """The command, the rounds and the method, for whoever repeats it."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *command]),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        # The headline's rounds are those of its pairs: counted once.
        "rounds_kept": sum(row.rounds_kept for row in rows if row.variant != headline().name),
        "rounds_discarded": sum(row.rounds_discarded for row in rows if row.variant != headline().name),
        "noise": NoiseGuard().describe(),
        "method": METHOD,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 whether or not the required ratios were reached, 2 on a wrong argument."""
    started = time.perf_counter()
    command, options, console = begin(parser(), check_arguments, arguments)
    measured = measure(options, console)
    rows: list[Row] = measured["rows"]
    judged: list[Target] = measured["targets"]
    end_to_end = [row.as_dict() for row in measured["end_to_end"]]
    run = describe_run(options, command, rows, started)
    machine = describe_machine(options.threads)

    print_rows(console, rows)
    print_targets(console, judged)
    print_end_to_end(console, end_to_end)
    console.print(METHOD)
    console.print(f"{run['rounds_kept']} rounds kept, {run['rounds_discarded']} discarded: {run['noise']}.")
    for name, figures in measured["yardsticks"].items():
        console.print(f"{name}: copy {figures['copy_gb_per_s']:.1f} GB/s, add {figures['add_gb_per_s']:.1f} GB/s")

    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / file_stem(options)
    report = {
        "run": run,
        "machine": machine,
        "yardsticks": measured["yardsticks"],
        "targets": [asdict(target) for target in judged],
        "rows": [asdict(row) for row in rows],
        "end_to_end": end_to_end,
    }
    write_json(stem.with_suffix(".json"), report)
    write_csv(stem.with_suffix(".csv"), rows)
    if not options.no_plot:
        reason = write_png(stem.with_suffix(".png"), rows, f"{machine['cpu']}, {options.threads} threads")
        if reason is not None:
            console.print(reason)
    console.print(f"written: {stem.with_suffix('.json')} and beside it, {run['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
