"""Adversarial training over the last epochs alone does most of what it does all along [arXiv 2410.10373].

    python examples/papers/late_adversarial.py

The paper carries its finding about SAM over to adversarial training: nets that were trained on clean images, and on PGD's
examples in the last few epochs only, are nearly as robust as nets that were trained on PGD's all along. There is no SAM in
this: the optimizer is SGD throughout, and what is switched on late is the attack.

Digits, pixels from 0 to 1, l_inf attacks of radius 0.1 in 10 steps of 0.02 from a random start. Robust accuracy is against that
attack, on test images, with noise of its own. Error bars are over initialisation and batches, on one fixed split.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Reproduction, Table, brief, make_parser, publish, run_jobs
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import BATCH_SIZE, LR, MOMENTUM, TASKS, batches, error, smoothed_loss
from verdicts import BOUND, Claim, Share, claim_above, distances, share_of_the_way, standard_errors_above, summary

RADIUS, ATTACK_STEPS, ATTACK_STEP = 0.1, 10, 0.02
CURVE_EVERY = 3  # epochs: an attack on the test images takes as long as several epochs on clean ones
METHODS = {"clean": 1.0, "last sixteenth": 15 / 16, "last quarter": 0.75, "always": 0.0}  # when attacks begin
CLEAN, _, QUARTER, ALWAYS = METHODS
COLOURS = dict(zip(METHODS, ("black", "tab:orange", "tab:green", "tab:blue"), strict=True))
CLOSES = 0.8  # of the distance from the clean net's robust accuracy to that of one that was always attacked


class Run(NamedTuple):
    method: str
    seed: int
    robust_accuracy: float
    clean_accuracy: float
    epochs: list[int]  # of the curve
    curve: list[float]  # robust accuracy after them


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
    measured, curve = [], []
    for epoch in range(1, epochs + 1):
        for inputs, labels in batches(data, order):
            if step >= first_attacked:
                inputs = attack(net, inputs, labels, noise)
            optimizer.zero_grad()
            smoothed_loss(net, inputs, labels).backward()
            optimizer.step()
            step += 1
        if epoch % CURVE_EVERY == 0 or epoch == epochs:
            measured.append(epoch)
            curve.append(robust_accuracy(net, data.test_inputs, data.test_labels))
    return Run(method, seed, curve[-1], 1 - error(net, data.test_inputs, data.test_labels) / 100, measured, brief(curve))


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(runs: list[Run], method: str, name: str = "robust_accuracy") -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if run.method == method])


def closed(runs: list[Run], method: str) -> Share:
    return share_of_the_way(*(collect(runs, name) for name in (CLEAN, ALWAYS, method)))


def check(runs: list[Run]) -> list[Claim]:
    quarter = closed(runs, QUARTER)
    return [
        claim_above("adversarial training makes the net robust", collect(runs, ALWAYS), collect(runs, CLEAN)),
        Claim(
            f"in the last quarter alone it brings most of that, {CLOSES:.0%} and more",
            quarter.value >= CLOSES,
            f"{quarter} of the way",
        ),
    ]


def report(runs: list[Run]) -> list[Claim]:
    """What it costs on clean images: not the paper's claim, but what one would ask."""
    claims, clean = [], collect(runs, CLEAN, "clean_accuracy")
    for method, start in METHODS.items():
        own = collect(runs, method, "clean_accuracy")
        if start < 1 and len(own):
            when = "all along" if method == ALWAYS else f"in the {method}"
            text = f"attacks {when} cost no accuracy on clean images"
            lower = own.mean() < clean.mean()
            apart = f"lower {distances(clean, own)}" if lower else f"higher {distances(own, clean)}"
            margin = f"{own.mean():.3f} against {clean.mean():.3f} without attacks, {apart}"
            claims.append(Claim(text, standard_errors_above(clean, own) <= BOUND, margin))
    return claims


HEADINGS = ["attacked", "robust accuracy", "of the way", "clean accuracy", "gradients a step"]


def tables(runs: list[Run]) -> list[Table]:
    rows = []
    for method, start in METHODS.items():
        if len(collect(runs, method)):
            share = "" if method in (CLEAN, ALWAYS) else str(closed(runs, method))
            robust, clean = (summary(collect(runs, method, name)) for name in ("robust_accuracy", "clean_accuracy"))
            rows.append([method, robust, share, clean, f"{1 + ATTACK_STEPS * (1 - start):.1f}"])
    title = f"digits, l_inf {RADIUS}, {len(collect(runs, CLEAN))} seeds, mean ± standard error"
    return [Table(title, HEADINGS, rows)]


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(8, 4.6), dpi=90, layout="constrained")
    axes = figure.subplots()
    # The net that is never attacked is the late ones' until they are: on top, and dashed, so that both are seen.
    for method in reversed(METHODS):
        curves, dashes = collect(runs, method, "curve"), "--" if method == CLEAN else "-"
        if len(curves):
            epochs = collect(runs, method, "epochs")[0]
            axes.plot(epochs, curves.mean(axis=0), dashes, c=COLOURS[method], label=method, lw=1.6)
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=COLOURS[method], alpha=0.13, lw=0)
    axes.set(title="Digits, against PGD: mean and range over seeds", xlabel="epoch", ylabel="robust accuracy", ylim=(0, 1))
    axes.legend(title="attacked", loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def restore(results: list[dict[str, Any]]) -> list[Run]:
    return [Run(**run) for run in results]


REPRODUCTION = Reproduction("late_adversarial", restore, tables, check, report, plot)


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = 2 if options.smoke else options.seeds
    methods = (ALWAYS, QUARTER, CLEAN) if options.smoke else tuple(reversed(METHODS))
    runs = run_jobs([(train, method, seed, options.epochs) for method in methods for seed in range(seeds)], "Training")
    publish(REPRODUCTION, runs, options.output, seeds, start)


if __name__ == "__main__":
    main()
