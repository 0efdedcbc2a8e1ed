"""What the reproductions share: jobs in two processes, error bars, tables, and the files that a run leaves behind.

A reproduction has a function for one run (a method and a seed), hands `run_jobs` a list of it with its arguments, and computes
the paper's claims from what came back as `Claim`s: whether each holds is worked out from the runs, never written down before.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sam_fused

RESULTS = Path(__file__).parent / "results"


# ---- the command line and the jobs -----------------------------------------------------------------------------------


def make_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that every reproduction has; a script adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the picture and the JSON (default: results/)")
    parser.add_argument("--smoke", action="store_true", help="a shortened form: does it run, and does it look right?")
    return parser


def run_jobs(jobs: Sequence[tuple[Any, ...]], title: str) -> list[Any]:
    """What every `(function, *arguments)` returns, in that order, from two processes of one torch thread each.

    Two threads make problems this small slower. Put the longest jobs first, so that neither process ends up alone with one.
    """
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's threads can hang
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(*job) for job in jobs]
        for future in track(as_completed(futures), title, total=len(futures), console=Console(stderr=True)):
            future.result()  # an error shows when it comes, not after the jobs submitted before it
        return [future.result() for future in futures]


# ---- error bars and claims -------------------------------------------------------------------------------------------


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean; nan for a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summary(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """`mean ± standard error`."""
    return f"{np.mean(values):.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_errors_above(higher: Sequence[float] | np.ndarray, lower: Sequence[float] | np.ndarray) -> float:
    """By how many standard errors of the difference the first mean is above the second; inf where neither varies.

    Unpaired, also where both have the same seeds: what the seeds share would make the distance look larger, not smaller.
    """
    difference, error = float(np.mean(higher) - np.mean(lower)), math.hypot(standard_error(higher), standard_error(lower))
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


class Claim(NamedTuple):
    """One sentence of a paper, whether this run bears it out, and by how much."""

    text: str
    holds: bool
    margin: str


def print_claims(claims: Iterable[Claim]) -> None:
    console = Console(highlight=False)
    for claim in claims:
        word = "[green]reproduced[/]" if claim.holds else "[red]not reproduced[/]"
        console.print(f"{word}: {claim.text} ({claim.margin})", soft_wrap=True)


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is text, the others are numbers."""
    console = Console()
    if not console.is_terminal:  # a log has no width: nothing need be folded
        console = Console(width=140)
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save_picture(figure: Figure, output: Path, name: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"{name}.png")
    print(f"picture: {output / name}.png")


def save_results(output: Path, name: str, results: Any, claims: Sequence[Claim], seeds: int, start: float) -> None:
    """Everything that the tables and the README are made from. `start` is `time.perf_counter()` at the start of the run."""
    record = {
        "command": shlex.join(["python", f"examples/papers/{name}.py", *sys.argv[1:]]),
        "seeds": seeds,
        "torch": torch.__version__,
        "sam_fused": sam_fused.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "claims": [claim._asdict() for claim in claims],
        "results": results,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"results: {path} ({record['seconds']:.0f} s)")
