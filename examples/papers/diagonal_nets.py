"""SAM with one perturbation per example finds sparser solutions [arXiv 2206.06232, Andriushchenko and Flammarion].

    python examples/papers/diagonal_nets.py

The paper claims that what makes SAM generalise is that it perturbs few examples at a time, and proves it for diagonal linear
nets <u * v, x> on sparse regression: gradient flow ends at the interpolating solution that is the sparser the smaller the
initial u, and SAM with a perturbation per example acts like a smaller one, far more so than SAM with one for the whole batch.
As in the paper's theory the perturbation is not normalised: e = rho g.

There are fewer examples than dimensions, so that every method can fit them all; the sparse target tells the solutions apart.
The test loss is 0.5 ||u * v - target||^2, exactly, for standard Gaussian inputs. All in float64, with full batches: a seed
fixes the data and nothing else is random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from common import Claim, make_parser, print_claims, print_table, run_jobs, save_picture, save_results, summary
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM

EXAMPLES, DIMENSION, NONZERO, INITIAL_U, LR, STEPS = 20, 30, 3, 0.1, 5 / 30, 3000
RECORDS = 100  # points of each curve


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
PER_EXAMPLE = [Method("SAM per example", 0.1, "tab:cyan"), Method("SAM per example", 0.3, "tab:blue")]
METHODS = [DESCENT, *FULL_BATCH, *PER_EXAMPLE]


class Run(NamedTuple):
    method: Method
    seed: int
    steps: list[int]  # at which the curve was taken
    test_losses: list[float]
    training_loss: float  # at the end
    off_support: float  # sum |u_i v_i| over the coordinates where the target is zero, at the end

    @property
    def test_loss(self) -> float:
        return self.test_losses[-1]


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


def train(method: Method, seed: int, steps: int) -> Run:
    x, y, target = draw(seed)
    net = torch.nn.Parameter(torch.stack([torch.full((DIMENSION,), INITIAL_U), torch.zeros(DIMENSION)]).double())
    step = make_step(method, net, x, y)
    recorded, test_losses = np.unique(np.geomspace(1, steps, RECORDS).astype(int)).tolist(), []
    for number in range(1, steps + 1):
        step()
        if number in recorded:
            test_losses.append(0.5 * (net.detach().prod(dim=0) - target).square().sum().item())
    weights = net.detach().prod(dim=0)
    training_loss = half_squared_error(net.detach(), x, y).item()
    return Run(method, seed, recorded, test_losses, training_loss, weights[NONZERO:].abs().sum().item())


# ---- what came out ---------------------------------------------------------------------------------------------------


def final(runs: list[Run], method: Method) -> np.ndarray:
    """Final test losses, one per seed, in the order of the seeds."""
    return np.array([run.test_loss for run in sorted(runs, key=lambda run: run.seed) if run.method == method])


def check_below(runs: list[Run], lower: Method, higher: Method) -> Claim:
    """Is the test loss lower in every seed? The margin is the seed where it is the least so."""
    ratios = final(runs, higher) / final(runs, lower)
    text = f"{lower.label} has a lower test loss than {higher.label} in every seed"
    margin = f"in {int((ratios > 1).sum())} of {len(ratios)} seeds; {ratios.min():.2f} to {ratios.max():.2f} times lower"
    return Claim(text, bool((ratios > 1).all()), margin)


def check_full_batch(runs: list[Run], per_example: Method) -> Claim:
    """Against the best of the full-batch radii in each seed, chosen by the test loss: in full-batch SAM's favour."""
    best = np.min([final(runs, method) for method in FULL_BATCH], axis=0)
    ratios = best / final(runs, per_example)
    text = f"full-batch SAM, with the best rho for each seed, does not reach {per_example.label}"
    margin = f"in {int((ratios > 1).sum())} of {len(ratios)} seeds; {ratios.min():.2f} to {ratios.max():.2f} times higher"
    return Claim(text, bool((ratios > 1).all()), margin)


def check(runs: list[Run]) -> list[Claim]:
    return [claim for method in PER_EXAMPLE for claim in (check_below(runs, method, DESCENT), check_full_batch(runs, method))]


def print_runs(runs: list[Run]) -> None:
    rows, descent = [], final(runs, DESCENT)
    for method in METHODS:
        group, losses = [run for run in runs if run.method == method], final(runs, method)
        off_support = summary([run.off_support for run in group])
        training_loss = f"{np.mean([run.training_loss for run in group]):.0e}"
        rho, lower = (f"{method.rho:g}", f"{(losses < descent).sum()} of {len(losses)}") if method.rho else ("", "")
        rows.append([method.name, rho, summary(losses, 4), off_support, training_loss, lower])
    title = f"{runs[0].steps[-1]:,} steps, {len(descent)} seeds, mean ± standard error"
    print_table(title, ["method", "rho", "test loss", "off support", "training loss", "lower"], rows)
    print("off support: sum |u v| where the target is zero; lower: seeds with a lower test loss than gradient descent")


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(12, 4.4), dpi=90, layout="constrained")
    curves, ends = figure.subplots(1, 2)
    for method in METHODS:
        group = [run for run in runs if run.method == method]
        median = np.median([run.test_losses for run in group], axis=0)
        curves.loglog(group[0].steps, median, c=method.colour, label=method.label)
        ends.semilogy([run.seed for run in group], [run.test_loss for run in group], "o", c=method.colour, ms=5)
    curves.set(title="Test loss, median over seeds", xlabel="step")
    ends.set(title="Test loss at the end", xlabel="seed")
    ends.set_xticks(range(len(final(runs, DESCENT))))
    curves.legend(fontsize=8)
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds, steps = (2, 250) if options.smoke else (options.seeds, options.steps)
    jobs = [(train, method, seed, steps) for method in reversed(METHODS) for seed in range(seeds)]
    runs = run_jobs(jobs, "Training")

    print_runs(runs)
    claims = check(runs)
    print_claims(claims)
    save_picture(plot(runs), options.output, "diagonal_nets")
    kept = ("seed", "test_loss", "training_loss", "off_support")
    results = [{"method": run.method.label} | {name: getattr(run, name) for name in kept} for run in runs]
    save_results(options.output, "diagonal_nets", results, claims, seeds, start)


if __name__ == "__main__":
    main()
