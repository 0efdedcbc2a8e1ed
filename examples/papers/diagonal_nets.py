"""SAM with one perturbation per example finds sparser solutions [arXiv 2206.06232, Andriushchenko and Flammarion].

    python examples/papers/diagonal_nets.py

The paper claims that what makes SAM generalise is that it perturbs few examples at a time, and proves it for diagonal linear
nets <u * v, x> on sparse regression: gradient flow ends at the interpolating solution that is the sparser the smaller the
initial u, and SAM with a perturbation per example acts like a smaller one, far more so than SAM with one for the whole batch.
As in the paper's theory the perturbation is not normalised: e = rho g.

There are fewer examples than dimensions, so that every method can fit them all; the sparse target tells the solutions apart.
The test loss is 0.5 ||u * v - target||^2, exactly, for standard Gaussian inputs. All in float64, with full batches: a seed
fixes the data and nothing else is random. The first seeds are trained to the end; more of them, for a third of the steps, say
how often it comes out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Reproduction, Table, brief, make_parser, publish, run_jobs
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD
from verdicts import Claim, summary

from sam_fused import SAM, MicroBatchSAM

EXAMPLES, DIMENSION, NONZERO, INITIAL_U, LR = 20, 30, 3, 0.1, 5 / 30
STEPS, MORE_STEPS = 3000, 1000  # of the first seeds, and of all
RECORDS = 60  # points of each curve
MOST = 0.75  # of the seeds
FITS = 0.01  # training loss; a net that says nothing has about 0.5


class Method(NamedTuple):
    name: str
    rho: float
    colour: str

    @property
    def label(self) -> str:
        return f"{self.name}, rho {self.rho:g}" if self.rho else self.name


DESCENT = Method("gradient descent", 0.0, "black")
FULL_BATCH = [
    Method("SAM, full batch", 0.03, "gold"),
    Method("SAM, full batch", 0.1, "orange"),
    Method("SAM, full batch", 0.3, "tab:orange"),
    Method("SAM, full batch", 1.0, "tab:red"),
]
SMALL, LARGE = Method("SAM per example", 0.1, "tab:cyan"), Method("SAM per example", 0.3, "tab:blue")
PER_EXAMPLE = [SMALL, LARGE]
METHODS = [DESCENT, *FULL_BATCH, *PER_EXAMPLE]


class End(NamedTuple):
    """What a net is after `step` steps."""

    step: int
    test_loss: float
    training_loss: float
    off_support: float  # sum |u_i v_i| over the coordinates where the target is zero


class Run(NamedTuple):
    method: Method
    seed: int
    ends: list[End]  # after MORE_STEPS, if there were as many, and after the last step
    steps: list[int]  # of the curve
    test_losses: list[float]


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [example, dimension], y [example] without noise, and the target: unit norm, its first coordinates nonzero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, DIMENSION, generator=generator, dtype=torch.float64)
    target = torch.zeros(DIMENSION, dtype=torch.float64)
    target[:NONZERO] = torch.randn(NONZERO, generator=generator, dtype=torch.float64)
    target /= target.norm()
    return x, x @ target, target


def half_squared_error(net: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean over examples; net is [2, dimension], u and v."""
    u, v = net.unbind()
    return 0.5 * (x @ (u * v) - y).square().mean()


def make_step(method: Method, net: torch.nn.Parameter, x: Tensor, y: Tensor) -> Callable[[], object]:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        loss = half_squared_error(net, x, y)
        loss.backward()
        return loss

    if method in PER_EXAMPLE:
        per_example = MicroBatchSAM([net], SGD, num_micro_batches=EXAMPLES, lr=LR, rho=method.rho, normalize=False)
        return lambda: per_example.step(closure, x, y)

    sam = SAM([net], SGD, lr=LR, rho=method.rho, normalize=False)
    sam.enabled = method != DESCENT

    def step() -> None:
        sam.zero_grad()
        sam.step(lambda: closure(x, y))

    return step


def train(method: Method, seed: int, stops: tuple[int, ...]) -> Run:
    """As many steps as the last of `stops`; what the net is like at each of them."""
    x, y, target = draw(seed)
    net = torch.nn.Parameter(torch.stack([torch.full((DIMENSION,), INITIAL_U), torch.zeros(DIMENSION)]).double())
    step = make_step(method, net, x, y)
    recorded, losses, ends = np.unique(np.geomspace(1, stops[-1], RECORDS).astype(int)).tolist(), [], []
    for number in range(1, stops[-1] + 1):
        step()
        weights = net.detach().prod(dim=0)
        if number in recorded:
            losses.append(0.5 * (weights - target).square().sum().item())
        if number in stops:
            test_loss = 0.5 * (weights - target).square().sum().item()
            training_loss = half_squared_error(net.detach(), x, y).item()
            ends.append(End(number, test_loss, training_loss, weights[NONZERO:].abs().sum().item()))
    return Run(method, seed, ends, recorded, brief(losses))


# ---- what came out ---------------------------------------------------------------------------------------------------


def stops_of(runs: list[Run]) -> list[int]:
    """The last step of the runs that went furthest, and that of all the others before it, if there are any."""
    return sorted({run.ends[-1].step for run in runs}, reverse=True)


def collect(runs: list[Run], stop: int, method: Method, name: str = "test_loss") -> np.ndarray:
    """After `stop` steps, one value for each seed that was trained for as many, in the order of the seeds."""
    own = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
    return np.array([getattr(end, name) for run in own for end in run.ends if end.step == stop])


def best_full_batch(runs: list[Run], stop: int) -> np.ndarray:
    """The best of the full-batch radii in each seed, chosen by the test loss: in full-batch SAM's favour."""
    return np.min([collect(runs, stop, method) for method in FULL_BATCH], axis=0)


def compare(runs: list[Run], stop: int, lower: Method, share: float) -> list[Claim]:
    """Is its test loss lower than the others' in `share` of the seeds at least?"""
    others = {DESCENT.name: collect(runs, stop, DESCENT), "full-batch SAM with the best rho": best_full_batch(runs, stop)}
    claims = []
    for name, losses in others.items():
        ratios = losses / collect(runs, stop, lower)
        seeds, wins = len(ratios), int((ratios > 1).sum())
        where = f"in every one of {seeds} seeds" if share == 1 else f"in {share:.0%} of {seeds} seeds and more"
        claims.append(
            Claim(
                f"{lower.label}, has a lower test loss than {name} {where}, after {stop:,} steps",
                wins >= share * seeds,
                f"in {wins} of {seeds}; {np.median(ratios):.2f} times lower in the median, from {ratios.min():.2g} to "
                f"{ratios.max():.3g}",
            )
        )
    return claims


def check(runs: list[Run]) -> list[Claim]:
    """The smaller rho, at which all fits the data."""
    return [claim for stop in stops_of(runs) for claim in compare(runs, stop, SMALL, MOST)]


def report(runs: list[Run]) -> list[Claim]:
    """The larger rho, near the edge of stability, and how far "every seed" goes."""
    last = stops_of(runs)[-1]
    claims = [claim for stop in stops_of(runs) for claim in compare(runs, stop, LARGE, MOST)]
    claims += [claim for method in PER_EXAMPLE for claim in compare(runs, last, method, 1)]
    for method in PER_EXAMPLE:
        losses = collect(runs, last, method, "training_loss")
        fits, text = losses < FITS, f"{method.label}, fits the training data in every one of {len(losses)} seeds"
        margin = f"training loss below {FITS} in {fits.sum()}, largest {losses.max():.1g}, after {last:,} steps"
        claims.append(Claim(text, bool(fits.all()), margin))
    return claims


HEADINGS = ["method", "test loss", "median", "off support", "training loss", "lower"]


def table(runs: list[Run], stop: int) -> Table:
    rows, descent = [], collect(runs, stop, DESCENT)
    for method in METHODS:
        losses, training_losses = (collect(runs, stop, method, name) for name in ("test_loss", "training_loss"))
        off_support = summary(collect(runs, stop, method, "off_support"))
        lower = f"{(losses < descent).sum()} of {len(losses)}" if method.rho else ""
        training_loss = f"{np.median(training_losses):.0e}, {training_losses.max():.0e}"
        rows.append([method.label, summary(losses, 4), f"{np.median(losses):.4f}", off_support, training_loss, lower])
    title = f"After {stop:,} steps, {len(descent)} seeds, mean ± standard error, training loss median and largest"
    return Table(title, HEADINGS, rows)


def by_seed(runs: list[Run]) -> Table:
    stop = stops_of(runs)[0]
    rows = [[method.label, *(f"{loss:.5f}" for loss in collect(runs, stop, method))] for method in METHODS]
    seeds = len(rows[0]) - 1
    return Table(f"Test loss after {stop:,} steps, by seed", ["method", *(f"seed {seed}" for seed in range(seeds))], rows)


def tables(runs: list[Run]) -> list[Table]:
    return [*(table(runs, stop) for stop in stops_of(runs)), by_seed(runs)]


def plot(runs: list[Run]) -> Figure:
    figure, stop = Figure(figsize=(12, 4.6), dpi=90, layout="constrained"), stops_of(runs)
    curves, ends = figure.subplots(1, 2)
    for place, method in enumerate(METHODS):
        longest = [run for run in runs if run.method == method and run.ends[-1].step == stop[0]]
        losses = np.array([run.test_losses for run in longest])
        curves.loglog(longest[0].steps, np.median(losses, axis=0), c=method.colour, label=method.label)
        if method in (DESCENT, *PER_EXAMPLE):  # the bands of the others would cover each other
            curves.fill_between(longest[0].steps, losses.min(axis=0), losses.max(axis=0), color=method.colour, alpha=0.12, lw=0)
        final = collect(runs, stop[-1], method)
        spread = np.linspace(-0.25, 0.25, len(final)) if len(final) > 1 else np.zeros(1)
        ends.semilogy(place + spread, final, "o", c=method.colour, ms=3.5)
        ends.hlines(np.median(final), place - 0.35, place + 0.35, color=method.colour, lw=2)
    curves.set(title=f"Median and range over {len(longest)} seeds", xlabel="step", ylabel="test loss")
    ends.set(title=f"After {stop[-1]:,} steps, {len(final)} seeds and their median", ylabel="test loss")
    names = [re.sub(r"(,| per|gradient) ", r"\1\n", method.label) for method in METHODS]
    ends.set_xticks(range(len(METHODS)), names, fontsize=8)
    curves.legend(fontsize=8, loc="lower left")
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    return figure


def restore(results: list[dict[str, Any]]) -> list[Run]:
    def read(run: dict[str, Any]) -> Run:
        return Run(**run | {"method": Method(**run["method"]), "ends": [End(**end) for end in run["ends"]]})

    return [read(run) for run in results]


REPRODUCTION = Reproduction("diagonal_nets", restore, tables, check, report, plot)


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--more-seeds", type=int, default=20, help=f"of these, for {MORE_STEPS:,} steps (default: %(default)s)")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds, more, stops = (2, 2, (250,)) if options.smoke else (options.seeds, options.more_seeds, (MORE_STEPS, STEPS))
    jobs = [(train, method, seed, stops) for method in reversed(METHODS) for seed in range(seeds)]
    jobs += [(train, method, seed, stops[:1]) for method in reversed(METHODS) for seed in range(seeds, more)]
    publish(REPRODUCTION, run_jobs(jobs, "Training"), options.output, seeds, start)


if __name__ == "__main__":
    main()
