"""SAM learns the signal where SGD memorises the noise [arXiv 2310.07269, Chen et al.].

    python examples/papers/signal_and_noise.py

The paper claims: where one patch of the data is the label's sign times a fixed signal mu and the other Gaussian noise, SGD
fits the training set of a two-layer ReLU net by memorising the noise if the dimension d is large for the strength ||mu||, so
that the net fails on new data. SAM learns the signal in the same time, because its perturbation keeps the filters from
activating on the noise: the benign region of (d, ||mu||) is larger. The paper's SAM perturbs once per mini-batch; mSAM k, with
k perturbations per mini-batch, stands beside it here.

SAM's training loss is higher than SGD's after the same number of epochs. So the training loss stands beside every accuracy,
and there are rows in which one method is stopped at the training loss that another ended with.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM

PATCHES, FILTERS, TRAINING_SAMPLES, TEST_SAMPLES, BATCH_SIZE = 2, 10, 20, 500, 10
LR, RHO, INITIAL_DEVIATION, EPOCHS = 0.01, 0.03, 1e-3, 100
DIMENSIONS, STRENGTHS = (500, 1000, 2000, 5000, 20_000), (0.5, 0.75, 1.0, 1.5, 2.0)
CELL = (20_000, 1.0)  # where the claims are tested
MICRO_BATCHES = {"mSAM 2": 2, "mSAM 5": 5, "mSAM 10": 10}
METHODS = ("SGD", "SAM", *MICRO_BATCHES)
COLOURS = {"SGD": "tab:grey", "SAM": "tab:orange", "mSAM 5": "tab:blue"}


class Run(NamedTuple):
    """One training run; the activations are one number per epoch, before the first one included."""

    method: str
    seed: int
    dimension: int
    strength: float
    flips: float  # probability of a flipped label
    epochs: int  # that were run
    loss: float  # on the training set, at the end
    accuracy: float  # on clean test data, at the end
    on_noise: list[float]
    on_signal: list[float]


class Data(NamedTuple):
    x: Tensor  # [sample, patch, dimension]
    y: Tensor  # [sample], -1 or 1
    place: Tensor  # [sample], which patch is the signal


def draw(count: int, dimension: int, strength: float, flips: float, generator: torch.Generator) -> Data:
    """The signal is `strength` along the first axis, noise along all others."""
    y = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    x = torch.randn(count, PATCHES, dimension, generator=generator)
    x[..., 0] = 0.0
    rows, place = torch.arange(count), torch.randint(PATCHES, (count,), generator=generator)
    x[rows, place] = 0.0
    x[rows, place, 0] = y * strength
    if flips:
        y = torch.where(torch.rand(count, generator=generator) < flips, -y, y)
    return Data(x, y, place)


def responses(filters: Tensor, x: Tensor) -> Tensor:
    """<w_jr, x_p> for every sample: [sign j, sample, filter r, patch p]; index 0 of j is F_+, 1 is F_-."""
    return torch.einsum("jrd,npd->jnrp", filters, x)


def margins(filters: Tensor, data: Data) -> Tensor:
    """y f(x) with f = F_+ - F_-, F_j = (1 / filters) sum_r sum_p relu(<w_jr, x_p>): the second layer is fixed."""
    plus, minus = responses(filters, data.x).relu().sum((2, 3)).div(FILTERS).unbind(0)
    return data.y * (plus - minus)


def loss_of(filters: Tensor, data: Data) -> Tensor:
    return softplus(-margins(filters, data)).mean()


@torch.no_grad()
def accuracy_of(filters: Tensor, data: Data) -> float:
    return (margins(filters, data) > 0).double().mean().item()


@torch.no_grad()
def activations(filters: Tensor, data: Data) -> tuple[float, float]:
    """Mean of relu(<w, noise>) and of relu(<w, signal>) over samples and the filters of each sample's own sign."""
    rows = torch.arange(len(data.y))
    own = responses(filters, data.x)[(data.y < 0).long(), rows].relu()  # [sample, filter, patch]
    on_signal, on_noise = own[rows, :, data.place], own[rows, :, 1 - data.place]
    return on_noise.mean().item(), on_signal.mean().item()


def make_optimizer(method: str, filters: torch.nn.Parameter) -> SAM:
    if method in MICRO_BATCHES:
        return MicroBatchSAM([filters], SGD, num_micro_batches=MICRO_BATCHES[method], lr=LR, rho=RHO)
    optimizer = SAM([filters], SGD, lr=LR, rho=RHO)
    optimizer.enabled = method != "SGD"
    return optimizer


def train_epoch(filters: torch.nn.Parameter, optimizer: SAM, data: Data, generator: torch.Generator) -> None:
    def closure(rows: Tensor) -> Tensor:
        loss = loss_of(filters, Data(data.x[rows], data.y[rows], data.place[rows]))
        loss.backward()
        return loss

    for rows in torch.randperm(TRAINING_SAMPLES, generator=generator).split(BATCH_SIZE):
        if isinstance(optimizer, MicroBatchSAM):
            optimizer.step(closure, rows)  # cuts the rows, not the data: the closure draws its samples from them
        else:
            optimizer.step(lambda rows=rows: closure(rows))
        optimizer.zero_grad()


def train(
    method: str, seed: int, dimension: int, strength: float, flips: float = 0.0, epochs: int = EPOCHS, stop_at_loss: float = 0.0
) -> Run:
    """Up to `epochs` epochs, or until the training loss is `stop_at_loss`. All methods of a seed see the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    data = draw(TRAINING_SAMPLES, dimension, strength, flips, generator)
    test = draw(TEST_SAMPLES, dimension, strength, 0.0, generator)
    filters = torch.nn.Parameter(INITIAL_DEVIATION * torch.randn(2, FILTERS, dimension, generator=generator))
    optimizer, active = make_optimizer(method, filters), [activations(filters, data)]
    loss = loss_of(filters, data).item()
    while len(active) <= epochs and loss > stop_at_loss:
        train_epoch(filters, optimizer, data, generator)
        active.append(activations(filters, data))
        loss = loss_of(filters, data).item()
    on_noise, on_signal = map(list, zip(*active, strict=True))
    accuracy = accuracy_of(filters, test)
    return Run(method, seed, dimension, strength, flips, len(active) - 1, loss, accuracy, on_noise, on_signal)


def train_to_the_loss_of(method: str, epochs: int, others: tuple[str, ...], seed: int) -> list[Run]:
    """A long run of `method` in the cell, and the others' runs that stop at the training loss it ended with."""
    reference = train(method, seed, *CELL, epochs=epochs)
    return [reference, *(train(other, seed, *CELL, epochs=2000, stop_at_loss=reference.loss) for other in others)]


# ---- what came out ---------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    cell: list[Run]  # every method and seed at CELL, EPOCHS epochs
    matched: dict[str, list[Run]]  # by the method whose training loss it is: its runs, and those stopped there
    grid: list[Run]
    noisy_labels: list[Run]  # at CELL, one label in ten flipped; only with --full


def collect(runs: list[Run], method: str, name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if run.method == method])


def methods_in(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs))


def check_order(runs: list[Run], lower: str, higher: str) -> Claim:
    above = standard_errors_above(collect(runs, higher, "accuracy"), collect(runs, lower, "accuracy"))
    text = f"at d = {CELL[0]:,}, ||mu|| = {CELL[1]:.0f} {higher} has a higher test accuracy than {lower}"
    return Claim(text, above > 2, f"{above:.1f} standard errors, bound 2")


def check_matched(runs: list[Run], reference: str) -> list[Claim]:
    """Is every other method, stopped at the reference's training loss, less accurate than it?"""
    claims, loss = [], collect(runs, reference, "loss").mean()
    for other in methods_in(runs):
        if other != reference:
            above = standard_errors_above(collect(runs, reference, "accuracy"), collect(runs, other, "accuracy"))
            text = f"at the training loss {loss:.2f}, too, {reference} has a higher test accuracy than {other}"
            claims.append(Claim(text, above > 2, f"{above:.1f} standard errors, bound 2"))
    return claims


def check_activations(runs: list[Run]) -> Claim:
    sgd_noise, sam_noise = (collect(runs, method, "on_noise")[:, -1] for method in ("SGD", "SAM"))
    sgd_signal, sam_signal = (collect(runs, method, "on_signal")[:, -1] for method in ("SGD", "SAM"))
    above = min(standard_errors_above(sgd_noise, sam_noise), standard_errors_above(sam_signal, sgd_signal))
    less, more = sgd_noise.mean() / sam_noise.mean(), sam_signal.mean() / sgd_signal.mean()
    text = "SAM's filters are less active than SGD's on the training samples' noise, and more on the signal"
    return Claim(text, above > 2, f"{less:.1f} times less, {more:.1f} times more; {above:.0f} standard errors, bound 2")


def check_region(grid: list[Run]) -> Claim:
    """The benign region: the cells of the grid with a mean test accuracy above 95 %."""
    cells = {method: int((heat_map(grid, method, "accuracy") > 0.95).sum()) for method in COLOURS}
    counts = ", ".join(f"{method} {count}" for method, count in cells.items())
    total = len(DIMENSIONS) * len(STRENGTHS)
    holds = cells["SGD"] < cells["SAM"]
    return Claim("the benign region, above 95 %, is larger for SAM than for SGD", holds, f"{counts} of {total} cells")


def check(results: Results) -> list[Claim]:
    claims = [check_order(results.cell, "SGD", "SAM"), check_order(results.cell, "SAM", "mSAM 5")]
    for reference, runs in results.matched.items():
        claims += check_matched(runs, reference)
    claims.append(check_activations(results.cell))
    return claims + ([check_region(results.grid)] if results.grid else [])


def row_of(runs: list[Run], method: str, label: str) -> list[str]:
    epochs = collect(runs, method, "epochs")
    accuracy, loss = summary(collect(runs, method, "accuracy")), summary(collect(runs, method, "loss"))
    return [label, f"{epochs.mean():.0f}", accuracy, loss]


def print_results(results: Results) -> None:
    headings = ["method", "epochs", "test accuracy", "training loss"]
    title = f"d = {CELL[0]:,}, ||mu|| = {CELL[1]:.0f}, mean ± standard error of {{}} seeds"
    rows = [row_of(results.cell, method, method) for method in methods_in(results.cell)]
    print_table(title.format(len(collect(results.cell, "SAM", "seed"))), headings, rows)
    if results.noisy_labels:
        rows = [row_of(results.noisy_labels, method, method) for method in METHODS]
        print_table("the same, one training label in ten flipped", headings, rows)
    rows = []
    for reference, runs in results.matched.items():
        stopped = [(method, f"{method}, stopped at {reference}'s loss") for method in methods_in(runs) if method != reference]
        rows += [row_of(runs, method, label) for method, label in [(reference, reference), *stopped]]
    print_table("the same, at equal training loss", headings, rows)
    for method in COLOURS if results.grid else ():
        print_heat_map(results.grid, method)


def print_heat_map(grid: list[Run], method: str) -> None:
    accuracy, loss = heat_map(grid, method, "accuracy"), heat_map(grid, method, "loss")
    rows = [[f"{dimension:,}"] for dimension in DIMENSIONS]
    for (row, _), value in np.ndenumerate(accuracy):
        rows[row].append(f"{value:.2f} ({loss[row, len(rows[row]) - 1]:.2f})")
    print_table(f"{method}: test accuracy (training loss) over d and ||mu||", ["d", *map(str, STRENGTHS)], rows)


def heat_map(grid: list[Run], method: str, name: str) -> np.ndarray:
    """Means over seeds: [dimension, strength]."""
    runs = [run for run in grid if run.method == method]

    def mean(dimension: int, strength: float) -> float:
        return float(np.mean([getattr(run, name) for run in runs if (run.dimension, run.strength) == (dimension, strength)]))

    return np.array([[mean(dimension, strength) for strength in STRENGTHS] for dimension in DIMENSIONS])


def draw_heat_map(axes: Axes, grid: list[Run], method: str) -> None:
    accuracy, loss = heat_map(grid, method, "accuracy"), heat_map(grid, method, "loss")
    axes.imshow(accuracy, vmin=0.5, vmax=1.0, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(accuracy):
        text, colour = f"{value:.2f}\n({loss[row, column]:.2f})", "black" if value > 0.75 else "white"
        axes.text(column, row, text, ha="center", va="center", c=colour, fontsize=7)
    axes.set(title=f"{method}: test accuracy (training loss)", xlabel="||mu||", ylabel="d")
    axes.set_xticks(range(len(STRENGTHS)), list(map(str, STRENGTHS)))
    axes.set_yticks(range(len(DIMENSIONS)), list(map(str, DIMENSIONS)))


def draw_activations(axes: Axes, runs: list[Run]) -> None:
    for method, colour in COLOURS.items():
        axes.semilogy(collect(runs, method, "on_noise").mean(axis=0), c=colour, label=f"{method}, on noise")
        axes.semilogy(collect(runs, method, "on_signal").mean(axis=0), "--", c=colour, label=f"{method}, on signal")
    axes.set(title=f"Mean activation at d = {CELL[0]:,}", xlabel="epoch")
    axes.legend(fontsize=7)


def plot(results: Results) -> Figure:
    figure = Figure(figsize=(17, 4.2), dpi=85, layout="constrained")
    *maps, last = figure.subplots(1, 4)
    for axes, method in zip(maps, COLOURS, strict=True):
        draw_heat_map(axes, results.grid, method)
    draw_activations(last, results.cell)
    return figure


def record(results: Results) -> dict[str, object]:
    """For the JSON: numbers per run, activations as means over seeds at the end."""
    drop = {"on_noise", "on_signal"}

    def brief(run: Run) -> dict[str, object]:
        return {name: value for name, value in run._asdict().items() if name not in drop}

    active = {m: [collect(results.cell, m, name)[:, -1].mean() for name in ("on_noise", "on_signal")] for m in COLOURS}
    return {
        "cell": [brief(run) for run in results.cell],
        "matched loss": {reference: [brief(run) for run in runs] for reference, runs in results.matched.items()},
        "noisy labels": [brief(run) for run in results.noisy_labels],
        "activation on noise and on signal at the end": active,
        "grid": [brief(run) for run in results.grid],
    }


def run_all(options: argparse.Namespace) -> Results:
    """Every run; `--smoke` is the cell, with short runs to equal loss."""
    seeds = range(2 if options.smoke else options.seeds)
    methods = ("SGD", "SAM", "mSAM 5") if options.smoke else METHODS
    grid_seeds = 0 if options.smoke else 5 if options.full else 2
    long = {"SAM": (150, ("SGD",))} if options.smoke else {"mSAM 5": (300, ("SGD", "SAM")), "SAM": (600, ("SGD",))}
    matched = [(train_to_the_loss_of, method, *how, seed) for method, how in long.items() for seed in seeds]
    cell = [(train, method, seed, *CELL) for method in methods for seed in seeds]
    noisy = [(train, method, seed, *CELL, 0.1) for method in METHODS for seed in seeds] if options.full else []
    grid = [
        (train, m, seed, d, mu) for d in reversed(DIMENSIONS) for mu in STRENGTHS for m in COLOURS for seed in range(grid_seeds)
    ]
    runs = iter(run_jobs([*matched, *cell, *noisy, *grid], "Training"))
    groups = list(islice(runs, len(matched)))
    return Results(
        matched={method: [run for group in groups if group[0].method == method for run in group] for method in long},
        cell=list(islice(runs, len(cell))),
        noisy_labels=list(islice(runs, len(noisy))),
        grid=list(runs),
    )


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--full", action="store_true", help="five seeds in the heat maps, and rows with flipped labels")
    options = parser.parse_args()
    start = time.perf_counter()
    results = run_all(options)

    print_results(results)
    claims = check(results)
    print_claims(claims)
    if results.grid:
        save_picture(plot(results), options.output, "signal_and_noise")
    save_results(options.output, "signal_and_noise", record(results), claims, len(collect(results.cell, "SAM", "seed")), start)


if __name__ == "__main__":
    main()
