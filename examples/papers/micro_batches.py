"""One perturbation per micro-batch, on a small classification task [arXiv 2302.09693].

    python examples/papers/micro_batches.py

The paper claims that mSAM, SAM with a perturbation for each of m micro-batches of a batch, finds flatter minima and generalises
better than SAM, and both than SGD; over image and language tasks that take days. Here it is mnist1d, generated data, and 4,000
training points: what can be shown is mSAM against SGD, and what is measured of mSAM against SAM is printed whatever it is.

Flatness is the top eigenvalue of the Hessian of the mean cross-entropy over the training points. Error bars are over
initialisation and batches, on one fixed data set. The bound is for the distance as if seeds had nothing in common; the distance
paired by seed stands beside it.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from common import Reproduction, Table, draw_bar, make_parser, publish, run_jobs
from matplotlib.figure import Figure
from training import BATCH_SIZE, NEVER, TASKS, Recipe, report, train
from verdicts import Claim, claim_above, summary

TASK = "mnist1d"
METHODS = {"SGD": NEVER, "SAM": Recipe()} | {f"mSAM {count}": Recipe(micro_batches=count) for count in (2, 4)}
MORE = {f"mSAM {count}": Recipe(micro_batches=count) for count in (10, 20, 50)}
SGD, SAM = "SGD", "SAM"
MEASURES = {"test_error": "test error", "eigenvalue": "top eigenvalue"}
UNITS = {"test_error": " in %", "eigenvalue": ""}


class Run(NamedTuple):
    method: str
    seed: int
    test_error: float  # per cent
    train_error: float
    train_loss: float
    eigenvalue: float


def train_one(method: str, seed: int, epochs: int) -> Run:
    net = train(TASK, (METHODS | MORE)[method], seed, epochs)
    return Run(method, seed, **report(net, TASKS[TASK].load()))


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(runs: list[Run], method: str, name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if run.method == method])


def methods_of(runs: list[Run]) -> list[str]:
    return [method for method in METHODS | MORE if any(run.method == method for run in runs)]


def compare(runs: list[Run], higher: str) -> list[Claim]:
    """Is mSAM's mean below, in each measure, for each number of micro-batches?"""
    return [
        claim_above(f"the {what} of {lower} is below that of {higher}", collect(runs, higher, name), collect(runs, lower, name))
        for lower in methods_of(runs)
        if lower.startswith("mSAM")
        for name, what in MEASURES.items()
    ]


def check(runs: list[Run]) -> list[Claim]:
    return compare(runs, SGD)


def report_claims(runs: list[Run]) -> list[Claim]:
    """What the paper claims beyond."""
    return compare(runs, SAM) if SAM in methods_of(runs) else []


HEADINGS = ["method", "samples a perturbation", "test error %", "top eigenvalue", "training error %", "training loss"]


def tables(runs: list[Run]) -> list[Table]:
    rows = []
    for method in methods_of(runs):
        digits = {"test_error": 2, "eigenvalue": 2, "train_error": 2, "train_loss": 4}
        size = BATCH_SIZE // (METHODS | MORE)[method].micro_batches
        cells = [summary(collect(runs, method, name), places) for name, places in digits.items()]
        rows.append([method, "" if method == SGD else str(size), *cells])
    seeds = len(collect(runs, SGD, "seed"))
    return [Table(f"{TASK}, generated data, {seeds} seeds, mean ± standard error", HEADINGS, rows)]


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 4), dpi=90, layout="constrained")
    for axes, (name, measure) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, method in enumerate(methods_of(runs)):
            draw_bar(axes, place, collect(runs, method, name), "black" if method == SGD else "tab:blue")
        axes.set_xticks(range(len(methods_of(runs))), methods_of(runs))
        axes.set(title=f"{TASK}: mean ± standard error, each seed", ylabel=measure + UNITS[name])
        axes.grid(alpha=0.3, axis="y")
    return figure


def restore(results: list[dict[str, Any]]) -> list[Run]:
    return [Run(**run) for run in results]


REPRODUCTION = Reproduction("micro_batches", restore, tables, check, report_claims, plot)


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help=f"{', '.join(MORE)} as well: slow")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = 3 if options.smoke else options.seeds
    chosen = [SGD, "mSAM 2"] if options.smoke else [*METHODS, *(MORE if options.full else ())]
    jobs = [(train_one, method, seed, options.epochs) for method in reversed(chosen) for seed in range(seeds)]
    publish(REPRODUCTION, run_jobs(jobs, "Training"), options.output, seeds, start)


if __name__ == "__main__":
    main()
