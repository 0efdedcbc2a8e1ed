"""SAM learns the signal where SGD memorises the noise [arXiv 2310.07269, Chen et al.].

    python examples/papers/signal_and_noise.py

The paper claims: where one patch of the data is the label's sign times a fixed signal mu and the other Gaussian noise, SGD
fits the training set of a two-layer ReLU net by memorising the noise if the dimension d is large for the strength ||mu||, so
that the net fails on new data. SAM learns the signal in the same time, because its perturbation keeps the filters from
activating on the noise: the benign region of (d, ||mu||) is larger. The paper's SAM perturbs once per mini-batch; mSAM k, with
k perturbations per mini-batch, stands beside it here.

SAM's training loss is higher than SGD's after the same number of epochs. So the training loss stands beside every accuracy,
and there are rows in which one method is stopped at the first step that brings it to the training loss another ended with.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Reproduction, Table, brief, make_parser, publish, run_jobs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import SGD
from verdicts import BOUND, Claim, claim_above, distances, standard_errors_above, summary

from sam_fused import SAM, MicroBatchSAM

PATCHES, FILTERS, TRAINING_SAMPLES, TEST_SAMPLES, BATCH_SIZE = 2, 10, 20, 500, 10
LR, RHO, INITIAL_DEVIATION, EPOCHS = 0.01, 0.03, 1e-3, 100
# Wide enough for the edge of SGD's benign region to be on it, and not only SAM's.
DIMENSIONS, STRENGTHS = (100, 500, 2000, 5000, 20_000), (0.5, 1.0, 2.0, 4.0, 8.0)
BENIGN = 0.95
CELL = (20_000, 1.0)  # where the claims are tested
MICRO_BATCHES = {"mSAM 2": 2, "mSAM 5": 5, "mSAM 10": 10}
METHODS = ("SGD", "SAM", *MICRO_BATCHES)
COLOURS = {"SGD": "tab:grey", "SAM": "tab:orange", "mSAM 5": "tab:blue"}


class Run(NamedTuple):
    """One training run; the activations are one number per epoch, before the first one included, or those at the end alone."""

    method: str
    seed: int
    dimension: int
    strength: float
    flips: float  # probability of a flipped label
    steps: int  # that were run
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


def take_step(filters: torch.nn.Parameter, optimizer: SAM, data: Data, rows: Tensor) -> None:
    def closure(rows: Tensor) -> Tensor:
        loss = loss_of(filters, Data(data.x[rows], data.y[rows], data.place[rows]))
        loss.backward()
        return loss

    if isinstance(optimizer, MicroBatchSAM):
        optimizer.step(closure, rows)  # cuts the rows, not the data: the closure draws its samples from them
    else:
        optimizer.step(lambda: closure(rows))
    optimizer.zero_grad()


def train(
    method: str, seed: int, dimension: int, strength: float, flips: float = 0.0, epochs: int = EPOCHS, stop_at_loss: float = 0.0
) -> Run:
    """`epochs` epochs, or up to the first step after which the training loss is `stop_at_loss` or less.

    All methods of a seed see the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    data = draw(TRAINING_SAMPLES, dimension, strength, flips, generator)
    test = draw(TEST_SAMPLES, dimension, strength, 0.0, generator)
    filters = torch.nn.Parameter(INITIAL_DEVIATION * torch.randn(2, FILTERS, dimension, generator=generator))
    optimizer, active, steps, there = make_optimizer(method, filters), [activations(filters, data)], 0, False
    while len(active) <= epochs and not there:
        for rows in torch.randperm(TRAINING_SAMPLES, generator=generator).split(BATCH_SIZE):
            take_step(filters, optimizer, data, rows)
            steps += 1
            there = stop_at_loss > 0 and loss_of(filters, data).item() <= stop_at_loss
            if there:
                break
        active.append(activations(filters, data))
    on_noise, on_signal = map(brief, zip(*active, strict=True))
    loss, accuracy = loss_of(filters, data).item(), accuracy_of(filters, test)
    return Run(method, seed, dimension, strength, flips, steps, loss, accuracy, on_noise, on_signal)


def train_briefly(*arguments: Any, **settings: Any) -> Run:
    """`train` without the activations over time."""
    run = train(*arguments, **settings)
    return run._replace(on_noise=run.on_noise[-1:], on_signal=run.on_signal[-1:])


def train_to_the_loss_of(method: str, epochs: int, others: tuple[str, ...], seed: int) -> list[Run]:
    """A long run of `method` in the cell, and the others' runs that stop at the training loss it ended with."""
    reference = train_briefly(method, seed, *CELL, epochs=epochs)
    return [reference, *(train_briefly(other, seed, *CELL, epochs=2000, stop_at_loss=reference.loss) for other in others)]


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
    text = f"at d = {CELL[0]:,}, ||mu|| = {CELL[1]:g} {higher} has a higher test accuracy than {lower}"
    return claim_above(text, collect(runs, higher, "accuracy"), collect(runs, lower, "accuracy"))


def check_matched(runs: list[Run], reference: str) -> list[Claim]:
    """Is every other method, stopped at the reference's training loss, less accurate than it?"""
    claims, loss = [], collect(runs, reference, "loss").mean()
    for other in methods_in(runs):
        if other != reference:
            text = f"stopped at {reference}'s training loss, {other} has a lower test accuracy than {reference}"
            claim = claim_above(text, collect(runs, reference, "accuracy"), collect(runs, other, "accuracy"))
            losses = f"training losses {collect(runs, other, 'loss').mean():.3f} and {loss:.3f}"
            claims.append(claim._replace(margin=f"{claim.margin}; {losses}"))
    return claims


def check_activations(runs: list[Run]) -> list[Claim]:
    sgd_noise, sam_noise = (collect(runs, method, "on_noise")[:, -1] for method in ("SGD", "SAM"))
    sgd_signal, sam_signal = (collect(runs, method, "on_signal")[:, -1] for method in ("SGD", "SAM"))
    less, more = sgd_noise.mean() / sam_noise.mean(), sam_signal.mean() / sgd_signal.mean()
    return [
        Claim(
            "SAM's filters are less active than SGD's on the training samples' noise",
            standard_errors_above(sgd_noise, sam_noise) > BOUND,
            f"{less:.1f} times less; {distances(sgd_noise, sam_noise)}",
        ),
        Claim(
            "SAM's filters are more active than SGD's on the signal",
            standard_errors_above(sam_signal, sgd_signal) > BOUND,
            f"{more:.1f} times more; {distances(sam_signal, sgd_signal)}",
        ),
    ]


def check_region(grid: list[Run]) -> Claim:
    """The benign region: the cells of the grid with a mean test accuracy above BENIGN.

    That it grows, and all of its edge moves, is seen where SGD has one on the grid.
    """
    benign = {method: heat_map(grid, method, "accuracy") > BENIGN for method in COLOURS}
    sgd, sam = benign["SGD"], benign["SAM"]
    lost = int((sgd & ~sam).sum())
    counts = ", ".join(f"{method} {cells.sum()}" for method, cells in benign.items())
    return Claim(
        f"the benign region, a test accuracy above {BENIGN:.0%}, is larger for SAM than for SGD, and contains it",
        bool(0 < sgd.sum() < sam.sum() and not lost),
        f"{counts} of {sgd.size} cells; {lost} of SGD's are not SAM's",
    )


def check(results: Results) -> list[Claim]:
    return [
        check_order(results.cell, "SGD", "SAM"),
        check_order(results.cell, "SAM", "mSAM 5"),
        *(claim for reference, runs in results.matched.items() for claim in check_matched(runs, reference)),
        *check_activations(results.cell),
        check_region(results.grid),
    ]


def report(results: Results) -> list[Claim]:
    """SAM fits the training set besides, says the paper. A net that says nothing has a loss of ln 2."""
    losses = np.array([run.loss for run in results.grid if run.method == "SAM"])
    return [
        Claim(
            "after the same epochs SAM fits the training set as SGD does, to a loss below 0.1 on the whole grid",
            bool((losses < 0.1).all()),
            f"SAM's loss is {losses.min():.2f} to {losses.max():.2f}; ln 2 is 0.69",
        )
    ]


HEADINGS = ["method", "steps", "test accuracy", "training loss"]


def row_of(runs: list[Run], method: str, label: str) -> list[str]:
    steps = collect(runs, method, "steps").mean()
    return [label, f"{steps:.0f}", summary(collect(runs, method, "accuracy")), summary(collect(runs, method, "loss"))]


def tables(results: Results) -> list[Table]:
    seeds = len(collect(results.cell, "SAM", "seed"))
    what = f"d = {CELL[0]:,}, ||mu|| = {CELL[1]:g}, {seeds} seeds, mean ± standard error"
    made = [Table(f"After {EPOCHS} epochs, {what}", HEADINGS, [row_of(results.cell, m, m) for m in methods_in(results.cell)])]
    if results.noisy_labels:
        rows = [row_of(results.noisy_labels, method, method) for method in METHODS]
        made.append(Table(f"One training label in ten flipped, {what}", HEADINGS, rows))
    rows = []
    for reference, runs in results.matched.items():
        stopped = [(method, f"{method}, stopped at {reference}'s loss") for method in methods_in(runs) if method != reference]
        rows += [row_of(runs, method, label) for method, label in [(reference, reference), *stopped]]
    made.append(Table(f"At equal training loss, {what}", HEADINGS, rows))
    made.append(activation_table(results.cell))
    return [*made, *(heat_map_table(results.grid, method) for method in COLOURS)]


def activation_table(runs: list[Run]) -> Table:
    rows = []
    for method in methods_in(runs):
        noise, signal = (collect(runs, method, name)[:, -1] for name in ("on_noise", "on_signal"))
        rows.append([method, summary(noise, 2), summary(signal, 4)])
    title = f"Mean activation on the training samples after {EPOCHS} epochs, mean ± standard error"
    return Table(title, ["method", "on their noise", "on the signal"], rows)


def axes_of(grid: list[Run]) -> tuple[list[int], list[float]]:
    return sorted({run.dimension for run in grid}), sorted({run.strength for run in grid})


def heat_map_table(grid: list[Run], method: str) -> Table:
    dimensions, strengths = axes_of(grid)
    loss, rows = heat_map(grid, method, "loss"), []
    for row, dimension in enumerate(dimensions):
        accuracies = [summary(in_cell(grid, method, dimension, strength, "accuracy"), 2) for strength in strengths]
        rows.append([f"{dimension:,}", *(f"{text} ({loss[row, column]:.2f})" for column, text in enumerate(accuracies))])
    seeds = len({run.seed for run in grid})
    title = f"{method}, {seeds} seeds: test accuracy ± standard error (training loss) over d and ||mu||"
    return Table(title, ["d", *(f"{strength:g}" for strength in strengths)], rows)


def in_cell(grid: list[Run], method: str, dimension: int, strength: float, name: str) -> list[float]:
    cell = (method, dimension, strength)
    return [getattr(run, name) for run in grid if (run.method, run.dimension, run.strength) == cell]


def heat_map(grid: list[Run], method: str, name: str) -> np.ndarray:
    """Means over seeds: [dimension, strength]."""
    dimensions, strengths = axes_of(grid)
    return np.array([[np.mean(in_cell(grid, method, d, mu, name)) for mu in strengths] for d in dimensions])


def draw_heat_map(axes: Axes, grid: list[Run], method: str) -> None:
    accuracy, loss = heat_map(grid, method, "accuracy"), heat_map(grid, method, "loss")
    dimensions, strengths = axes_of(grid)
    axes.imshow(accuracy, vmin=0.5, vmax=1.0, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(accuracy):
        text, colour = f"{value:.2f}\n({loss[row, column]:.2f})", "black" if value > 0.75 else "white"
        axes.text(column, row, text, ha="center", va="center", c=colour, fontsize=8, weight="bold" if value > BENIGN else None)
    axes.set(title=f"{method}: test accuracy (training loss)", xlabel="||mu||", ylabel="d")
    axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.set_yticks(range(len(dimensions)), list(map(str, dimensions)))


def draw_activations(axes: Axes, runs: list[Run], name: str) -> None:
    for method, colour in COLOURS.items():
        curves = collect(runs, method, name)
        epochs = np.arange(curves.shape[1])
        axes.semilogy(epochs, curves.mean(axis=0), c=colour, label=method)
        axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel="mean activation")
    axes.grid(alpha=0.3)


def plot(results: Results) -> Figure:
    figure = Figure(figsize=(14, 7.6), dpi=80, layout="constrained")
    maps = figure.subfigures(2, 1)
    for axes, method in zip(maps[0].subplots(1, 3), COLOURS, strict=True):
        draw_heat_map(axes, results.grid, method)
    panels = maps[1].subplots(1, 2)
    where = f"d = {CELL[0]:,}, ||mu|| = {CELL[1]:g} (mean, range over seeds)"
    for axes, name, what in zip(panels, ("on_noise", "on_signal"), ("noise", "the signal"), strict=True):
        draw_activations(axes, results.cell, name)
        axes.set_title(f"On {what}, {where}")
    panels[1].legend(loc="lower right")
    return figure


def restore(results: dict[str, Any]) -> Results:
    cell, grid, noisy = ([Run(**run) for run in results[name]] for name in ("cell", "grid", "noisy_labels"))
    matched = {method: [Run(**run) for run in runs] for method, runs in results["matched"].items()}
    return Results(cell, matched, grid, noisy)


REPRODUCTION = Reproduction("signal_and_noise", restore, tables, check, report, plot)


def run_all(options: argparse.Namespace) -> Results:
    """Every run; `--smoke` is the cell, short runs to equal loss and four cells of the grid."""
    seeds = range(2 if options.smoke else options.seeds)
    methods = ("SGD", "SAM", "mSAM 5") if options.smoke else METHODS
    grid_seeds = 1 if options.smoke else 5 if options.full else 2
    dimensions, strengths = (part[1::2] if options.smoke else part for part in (DIMENSIONS, STRENGTHS))
    long = {"SAM": (150, ("SGD",))} if options.smoke else {"mSAM 5": (300, ("SGD", "SAM")), "SAM": (600, ("SGD",))}
    matched = [(train_to_the_loss_of, method, *how, seed) for method, how in long.items() for seed in seeds]
    cell = [(train, method, seed, *CELL) for method in methods for seed in seeds]
    noisy = [(train_briefly, method, seed, *CELL, 0.1) for method in METHODS for seed in seeds] if options.full else []
    grid = [
        (train_briefly, method, seed, d, mu)
        for d in reversed(dimensions)
        for mu in strengths
        for method in COLOURS
        for seed in range(grid_seeds)
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
    publish(REPRODUCTION, results, options.output, len(collect(results.cell, "SAM", "seed")), start)


if __name__ == "__main__":
    main()
