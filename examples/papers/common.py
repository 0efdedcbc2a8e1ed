"""What the reproductions share: jobs in two processes, tables, and the files that a run leaves behind.

A script has a function for one run (a method and a seed), hands `run_jobs` a list of it with its arguments, and `publish` what
came back. That becomes the JSON's plain data first: the terminal's tables, the picture and README.md (`page.py`) are all made
from it, by the functions that the script names in its `Reproduction`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table as RichTable
from verdicts import Claim, standard_error

import sam_fused

RESULTS = Path(__file__).parent / "results"
PROCESSES, THREADS = 2, 1  # two threads make problems this small slower, two processes halve the time


class Table(NamedTuple):
    """The first column is text, the others are numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Reproduction(NamedTuple):
    """What a script makes of its results; the functions below `restore` take what that returns."""

    name: str  # the script's
    restore: Callable[[Any], Any]  # from the JSON's results
    tables: Callable[[Any], list[Table]]
    check: Callable[[Any], list[Claim]]  # the main claims, which the tests hold the recorded run to
    report: Callable[[Any], list[Claim]]  # what else the paper says, or one would ask, whatever came out
    plot: Callable[[Any], Figure]


# ---- the command line and the jobs -----------------------------------------------------------------------------------


def make_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that every reproduction has; a script adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the picture and the JSON (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="a shortened form: does it run, and does it look right?")
    return parser


def run_jobs(jobs: Sequence[tuple[Any, ...]], title: str) -> list[Any]:
    """What every `(function, *arguments)` returns, in that order, from two processes of one torch thread each.

    Put the longest jobs first, so that neither process ends up alone with one.
    """
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's threads can hang
    with ProcessPoolExecutor(PROCESSES, context, initializer=torch.set_num_threads, initargs=(THREADS,)) as pool:
        futures = [pool.submit(*job) for job in jobs]
        for future in track(as_completed(futures), title, total=len(futures), console=Console(stderr=True)):
            future.result()  # an error shows when it comes, not after the jobs submitted before it
        return [future.result() for future in futures]


def brief(values: Iterable[float]) -> list[float]:
    """To four digits: what a curve of a picture needs, and the JSON does not grow for more."""
    return [float(f"{value:.4g}") for value in values]


# ---- on the terminal and in pictures ----------------------------------------------------------------------------------


def print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:  # a log has no width: nothing need be folded
        console = Console(width=140)
    drawn = RichTable(title=escape(table.title))
    for number, heading in enumerate(table.headings):
        drawn.add_column(escape(heading), justify="right" if number else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def print_claims(claims: Iterable[Claim]) -> None:
    console = Console(highlight=False)
    for claim in claims:
        console.print(escape(str(claim)), style="green" if claim.holds else "red", soft_wrap=True)


def draw_bar(axes: Axes, place: float, values: Any, colour: str) -> None:
    """The mean with its standard error, and beside it every seed."""
    axes.bar(place, values.mean(), color=colour, alpha=0.35)
    axes.errorbar(place - 0.15, values.mean(), standard_error(values), c="black", capsize=4)
    axes.plot([place + 0.15] * len(values), values, "o", c=colour, ms=4)


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Named tuples become dictionaries, so that the JSON says what each number is."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def as_json(record: dict[str, Any]) -> str:
    """Indented, but for lists of numbers, which are lines: a curve is not a page."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\[\n([^\[\]{}\"]*)\]", lambda numbers: "[" + " ".join(numbers[1].split()) + "]", text)


def publish(reproduction: Reproduction, results: Any, output: Path, seeds: int, start: float) -> None:
    """Prints tables and verdicts, and writes the picture and the JSON. `start` is `time.perf_counter()` at the run's start."""
    name, results = reproduction.name, json.loads(json.dumps(plain(results)))
    runs = reproduction.restore(results)
    for table in reproduction.tables(runs):
        print_table(table)
    claims, reported = reproduction.check(runs), reproduction.report(runs)
    print_claims([*claims, *reported])

    output.mkdir(parents=True, exist_ok=True)
    reproduction.plot(runs).savefig(output / f"{name}.png")
    record = {
        "command": shlex.join(["python", f"examples/papers/{name}.py", *sys.argv[1:]]),
        "seeds": seeds,
        "processes": PROCESSES,
        "threads per process": THREADS,
        "torch": torch.__version__,
        "sam_fused": sam_fused.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "claims": plain(claims),
        "reported": plain(reported),
        "results": results,
    }
    (output / f"{name}.json").write_text(as_json(record), encoding="utf-8")
    print(f"picture and results: {output / name}.png, .json ({record['seconds']:.0f} s)")
