"""Adversarial training over the last epochs alone does most of what it does all along [arXiv 2410.10373, section 6].

    python examples/papers/late_adversarial.py

The paper carries its finding about SAM over to adversarial training: nets that were trained on clean images, and on PGD's
examples in the last few epochs only, are nearly as robust as nets that were trained on PGD's all along. There is no SAM in
this: the optimizer is SGD throughout, and what is switched on late is the attack.

Digits, pixels from 0 to 1, l_inf attacks of radius 0.1 in 10 steps of 0.02 from a random start. Robust accuracy is against that
attack, on test images, with noise of its own.
"""

from __future__ import annotations

import math
import time
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
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import BATCH_SIZE, LR, MOMENTUM, TASKS, batches, error, smoothed_loss

RADIUS, ATTACK_STEPS, ATTACK_STEP = 0.1, 10, 0.02
METHODS = {"clean": 1.0, "last sixteenth": 15 / 16, "last quarter": 0.75, "always": 0.0}  # when attacks begin
CLEAN, _, QUARTER, ALWAYS = METHODS
CLOSES = 0.8  # of the distance from the clean net's robust accuracy to that of one that was always attacked


class Run(NamedTuple):
    method: str
    seed: int
    robust_accuracy: float
    clean_accuracy: float
    curve: list[float]  # robust accuracy after each epoch


def attack(net: nn.Module, inputs: Tensor, labels: Tensor, noise: torch.Generator) -> Tensor:
    """PGD [1706.06083]: images within RADIUS of `inputs`, and from 0 to 1, with a high loss."""
    attacked = (inputs + RADIUS * (2 * torch.rand(inputs.shape, generator=noise) - 1)).clamp(0, 1)
    for _ in range(ATTACK_STEPS):
        attacked.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(net(attacked), labels), attacked)
        attacked = attacked.detach() + ATTACK_STEP * slope.sign()
        attacked = torch.minimum(torch.maximum(attacked, inputs - RADIUS), inputs + RADIUS).clamp(0, 1)
    return attacked


def robust_accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return 1 - error(net, attack(net, inputs, labels, torch.Generator().manual_seed(0)), labels) / 100


def train(method: str, seed: int, epochs: int) -> Run:
    data = TASKS["digits"].load()
    torch.manual_seed(seed)
    net, order = TASKS["digits"].make_net(), torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    first_attacked, step = METHODS[method] * epochs * math.ceil(len(data.labels) / BATCH_SIZE), 0
    curve = []
    for _ in range(epochs):
        for inputs, labels in batches(data, order):
            if step >= first_attacked:
                inputs = attack(net, inputs, labels, noise)
            optimizer.zero_grad()
            smoothed_loss(net, inputs, labels).backward()
            optimizer.step()
            step += 1
        curve.append(robust_accuracy(net, data.test_inputs, data.test_labels))
    return Run(method, seed, curve[-1], 1 - error(net, data.test_inputs, data.test_labels) / 100, curve)


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(runs: list[Run], method: str, name: str = "robust_accuracy") -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if run.method == method])


def closed(runs: list[Run], method: str) -> float:
    clean, always, own = (collect(runs, name).mean() for name in (CLEAN, ALWAYS, method))
    return float((own - clean) / (always - clean))


def check(runs: list[Run]) -> list[Claim]:
    apart = standard_errors_above(collect(runs, ALWAYS), collect(runs, CLEAN))
    quarter = closed(runs, QUARTER)
    return [
        Claim("adversarial training makes the net robust", apart > 2, f"by {apart:.1f} standard errors, bound 2"),
        Claim(
            f"in the last quarter alone it brings most of that, {CLOSES:.0%} and more",
            quarter >= CLOSES,
            f"{quarter:.0%} of the distance",
        ),
    ]


HEADINGS = ["attacked", "robust accuracy", "clean accuracy", "of the way", "gradients a step"]


def table(runs: list[Run]) -> list[list[str]]:
    """A row for each method."""
    rows = []
    for method, start in METHODS.items():
        share = "" if method in (CLEAN, ALWAYS) else f"{closed(runs, method):.0%}"
        accuracies = (summary(collect(runs, method, name)) for name in ("robust_accuracy", "clean_accuracy"))
        rows.append([method, *accuracies, share, f"{1 + ATTACK_STEPS * (1 - start):.1f}"])
    return rows


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=90, layout="constrained")
    axes = figure.subplots()
    for method, colour in zip(METHODS, ("black", "tab:orange", "tab:green", "tab:blue"), strict=True):
        curves = np.array([run.curve for run in runs if run.method == method])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(axis=0), c=colour, label=method)
        axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, lw=0)
    axes.set(title="Accuracy against PGD (mean, range over seeds)", xlabel="epoch", ylim=(0, 1))
    axes.legend(title="attacked")
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds, epochs = (2, 20) if options.smoke else (options.seeds, options.epochs)
    runs = run_jobs([(train, method, seed, epochs) for method in reversed(METHODS) for seed in range(seeds)], "Training")

    print_table(f"digits, l_inf {RADIUS}, {seeds} seeds, mean ± standard error", HEADINGS, table(runs))
    claims = check(runs)
    print_claims(claims)
    save_picture(plot(runs), options.output, "late_adversarial")
    save_results(options.output, "late_adversarial", [run._asdict() for run in runs], claims, seeds, start)


if __name__ == "__main__":
    main()
