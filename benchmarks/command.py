"""What the benchmarks' command lines share: console, progress, checks of numbers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.noise import NoiseGuard
from benchmarks.suite import Progress

RESULTS = Path(__file__).resolve().parent / "results"
TABLE_WIDTH = 160


def wide_console() -> Console:
    """A log file has no width: there the tables need not be folded."""
    console = Console()
    return console if console.width >= TABLE_WIDTH or console.is_terminal else Console(width=TABLE_WIDTH)


@contextmanager
def shown_progress(console: Console, total: int, started: float) -> Iterator[Progress]:
    """A bar over `total` pairs; in a log, which shows no moving bar, a line per pair tells that it lives."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)

        def say(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:
                console.print(f"{time.perf_counter() - started:6.1f} s  {text}")

        yield Progress(say=say, pair_done=lambda: bar.update(task, advance=1))


def add_common(made: argparse.ArgumentParser, rounds: str, seconds: str, plots: bool = False) -> None:
    """The arguments that every benchmark takes; `rounds` and `seconds` describe their defaults."""
    made.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    made.add_argument("--rounds", type=int, help=f"rounds to keep (default: {rounds})")
    made.add_argument("--seconds", type=float, help=f"budget for timing (default: {seconds})")
    made.add_argument("--smoke", action="store_true", help="a few seconds on one small set: does everything run?")
    made.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files go")
    if plots:
        made.add_argument("--no-plot", action="store_true", help="write no picture")
    made.add_argument("--seed", type=int, default=0, help="of the random weights and gradients (default: %(default)s)")


def begin(
    made: argparse.ArgumentParser, check: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None
) -> tuple[list[str], argparse.Namespace, Console]:
    """The command line, what it says, and where to print; ends the program with status 2 on a wrong argument."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    options = made.parse_args(command)
    try:
        check(options)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(options.threads)
    return command, options, wide_console()


def check_positive(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ValueError with one sentence on a number that cannot be meant."""
    for name in names:
        value = getattr(options, name)
        if value is not None and any(number <= 0 for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{name}: expected a number above 0, got {value}")


def measure_each(
    benchmark: str,
    stem: str,
    arguments: tuple[list[str], argparse.Namespace, Console],
    titles: dict[str, str],
    measure: Callable[[str], list[Any]],
    show: Callable[[list[Any]], Table],
    **more: Any,
) -> int:
    """A command that measures one thing after another: what `measure` returns for each title's name, as a table and a JSON.

    `arguments` are what `begin` returned; rows are dataclasses; `more` goes into the JSON beside them.
    """
    command, options, console = arguments
    machine, rows = describe_machine(options.threads), []  # the machine as it was found
    with shown_progress(console, len(titles), time.perf_counter()) as progress:
        for name, title in titles.items():
            progress.say(title)
            rows += measure(name)
            progress.pair_done()
    console.print(show(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{stem}-{options.threads}threads{'-smoke' if options.smoke else ''}.json"
    run = {"command": " ".join([f"python -m benchmarks.{benchmark}", *command]), "noise": NoiseGuard().describe()}
    report = {"run": run, "machine": machine, **more, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {path}")
    return 0
