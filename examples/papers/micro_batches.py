"""One perturbation per micro-batch, on a small classification task [arXiv 2302.09693].

    python examples/papers/micro_batches.py

The paper claims that mSAM, SAM with a perturbation for each of m micro-batches of a batch, finds flatter minima and generalises
better than SAM, and both than SGD; over image and language tasks that take days. Here it is mnist1d, generated data, and 4,000
training points: what can be shown is mSAM against SGD, and what is measured of mSAM against SAM is printed whatever it is.

Flatness is the top eigenvalue of the Hessian of the mean cross-entropy over the training points.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from common import (
    Claim,
    make_parser,
    print_claims,
    print_table,
    run_jobs,
    save_picture,
    save_results,
    standard_errors_above,
    summary,
)
from matplotlib.figure import Figure
from training import BATCH_SIZE, NEVER, TASKS, Recipe, report, train

TASK = "mnist1d"
METHODS = {"SGD": NEVER, "SAM": Recipe()} | {f"mSAM {count}": Recipe(micro_batches=count) for count in (2, 4)}
MORE = {f"mSAM {count}": Recipe(micro_batches=count) for count in (10, 20, 50)}
SGD, SAM = "SGD", "SAM"
MEASURES = {"test_error": "test error", "eigenvalue": "top eigenvalue"}
# In standard errors of the difference.
BOUND = 2


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


def compare(runs: list[Run], lower: str, higher: str) -> list[Claim]:
    """Is the mean of `lower` below by more than two standard errors, in each measure?"""
    claims = []
    for name, measure in MEASURES.items():
        apart = standard_errors_above(collect(runs, higher, name), collect(runs, lower, name))
        margin = f"by {apart:.1f} standard errors of the difference, bound {BOUND}"
        claims.append(Claim(f"the {measure} of {lower} is below that of {higher}", apart > BOUND, margin))
    return claims


def check(runs: list[Run]) -> list[Claim]:
    return [claim for method in methods_of(runs) if method.startswith("mSAM") for claim in compare(runs, method, SGD)]


def check_against_sam(runs: list[Run]) -> list[Claim]:
    """What the paper claims beyond, reported whatever it is."""
    if SAM not in methods_of(runs):
        return []
    return [claim for method in methods_of(runs) if method.startswith("mSAM") for claim in compare(runs, method, SAM)]


HEADINGS = ["method", "samples a perturbation", "test error %", "top eigenvalue", "training error %", "training loss"]


def table(runs: list[Run]) -> list[list[str]]:
    """A row for each method."""
    rows = []
    for method in methods_of(runs):
        cells = [summary(collect(runs, method, name), digits) for name, digits in (("test_error", 2), ("eigenvalue", 2))]
        train_cells = [summary(collect(runs, method, name), digits) for name, digits in (("train_error", 2), ("train_loss", 4))]
        size = BATCH_SIZE // (METHODS | MORE)[method].micro_batches
        rows.append([method, "" if method == SGD else str(size), *cells, *train_cells])
    return rows


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 4), dpi=90, layout="constrained")
    for axes, (name, measure) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, method in enumerate(methods_of(runs)):
            values = collect(runs, method, name)
            axes.bar(place, values.mean(), color="tab:blue" if place else "black", alpha=0.4)
            axes.plot([place] * len(values), values, "o", c="black", ms=4)
        axes.set_xticks(range(len(methods_of(runs))), methods_of(runs))
        axes.set(title=f"{measure[0].upper()}{measure[1:]}{' in %' if name == 'test_error' else ''}, {TASK}")
        axes.grid(alpha=0.3, axis="y")
    return figure


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help=f"{', '.join(MORE)} as well: slow")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = 3 if options.smoke else options.seeds
    chosen = [SGD, "mSAM 4"] if options.smoke else [*METHODS, *(MORE if options.full else ())]
    runs = run_jobs(
        [(train_one, method, seed, options.epochs) for method in reversed(chosen) for seed in range(seeds)], "Training"
    )

    print_table(f"{TASK}, generated data, {seeds} seeds, mean ± standard error", HEADINGS, table(runs))
    claims = check(runs)
    print_claims([*claims, *(reported := check_against_sam(runs))])
    save_picture(plot(runs), options.output, "micro_batches")
    results = {
        "claims against SAM": [claim._asdict() for claim in reported],
        "runs": [run._asdict() for run in runs],
    }
    save_results(options.output, "micro_batches", results, claims, seeds, start)


if __name__ == "__main__":
    main()
