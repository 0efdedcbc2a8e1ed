"""Train a small conv net on scikit-learn's digits with SGD and with SAM, and look at what SAM changes.

    python examples/train_digits.py --seeds 4 --output digits.png

prints a table (mean ± standard error over seeds) and writes a picture. It needs scikit-learn, which brings the data
(1,797 real 8x8 images: nothing is downloaded), matplotlib and rich.

What to expect: digits saturate at about 1 % wrong, four of the 360 test images, so the difference in accuracy has little
statistical power here, whichever way it falls. The loss rises less around SAM's weights, both within rho and, in the mean
over seeds, along a random direction; part of that is SAM's lower training loss. Per epoch SAM takes twice the gradients.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_fused import SAM

COLOURS = {"SGD": "tab:blue", "SAM": "tab:orange"}
BATCH_SIZE = 64  # 1,078 training images: sixteen full batches and an uneven last one of 54
PROBE_SEED = 0  # every net is probed along the same Gaussian draw, scaled to its own filters
PROBE_DISTANCES = torch.linspace(-0.6, 0.6, 21).tolist()  # at 1 the direction's filters are as long as the net's own


class Split(NamedTuple):
    images: Tensor  # [N, 1, 8, 8] float32
    labels: Tensor  # [N] int64


class Run(NamedTuple):
    """What one training run leaves behind; errors are fractions."""

    method: str
    curves: list[tuple[float, float, float]]  # at the start and after each epoch: training loss, test loss, test error
    validation_error: float
    landscape: list[float]  # training loss at PROBE_DISTANCES
    sharpness: float  # on the training set, at the end
    free_sharpness: float  # mean over the last epoch's steps
    seconds: float  # in training steps alone


def load_splits(seed: int) -> list[Split]:
    """Training, validation and test images, 60 : 20 : 20, classes balanced, fixed by the seed."""
    pixels, targets = load_digits(return_X_y=True)
    train, rest = train_test_split(np.arange(len(targets)), test_size=0.4, stratify=targets, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=targets[rest], random_state=seed)
    images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8), torch.from_numpy(targets)
    images = (images - images[train].mean()) / images[train].std()  # of the training part: the others stay unseen
    return [Split(images[part], labels[part]) for part in (train, validation, test)]


def make_net() -> nn.Sequential:
    # No batch norm: SAM's second, perturbed pass would feed its running statistics too.
    first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
    hidden = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*hidden, nn.Linear(64 * 2 * 2, 10))


def make_optimizer(method: str, model: nn.Module, lr: float, rho: float) -> torch.optim.Optimizer:
    if method == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=lr, momentum=0.9, weight_decay=5e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split) -> None:
    """One step on one batch, the same for both optimizers: SGD calls the closure once, SAM twice."""

    def closure() -> float:
        loss = cross_entropy(model(data.images), data.labels)
        loss.backward()
        return loss  # type: ignore[return-value]  # torch annotates a float and passes the tensor on

    optimizer.zero_grad()  # SAM clears the gradients between its two passes by itself
    optimizer.step(closure)


def loss_rise(optimizer: SAM) -> float:
    """How much higher the loss was at the perturbed weights of the last step: both losses are there, nothing is run."""
    assert optimizer.losses is not None, "no step yet"
    return (optimizer.losses.perturbed - optimizer.losses.clean).item()


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, order: torch.Generator) -> float:
    """One pass over the shuffled data; returns the mean loss rise of its steps (nan for SGD, which measures none)."""
    model.train()
    readings = []
    for batch in torch.randperm(len(data.labels), generator=order).split(BATCH_SIZE):
        step(model, optimizer, Split(data.images[batch], data.labels[batch]))
        readings.append(loss_rise(optimizer) if isinstance(optimizer, SAM) else math.nan)
    return sum(readings) / len(readings)


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Mean loss and error fraction."""
    model.eval()
    logits = model(data.images)
    wrong = logits.argmax(dim=1) != data.labels
    return cross_entropy(logits, data.labels).item(), wrong.float().mean().item()


def filter_normalised_direction(model: nn.Module, seed: int) -> list[Tensor]:
    """A Gaussian direction whose every filter is as long as the net's own (Li et al., arXiv 1712.09913, section 4).

    Without it a net could look flat only because its weights are large. Biases stay where they are, as in the paper.
    """
    direction, generator = [], torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        ratio = torch.zeros(len(weight))
        if weight.dim() > 1:
            ratio = weight.detach().flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        direction.append(noise * ratio.view(-1, *[1] * (weight.dim() - 1)))
    return direction


@torch.no_grad()
def loss_along(model: nn.Module, data: Split, direction: list[Tensor], distances: list[float]) -> list[float]:
    """The loss at `weights + distance * direction`; the weights are bit for bit the old ones afterwards."""
    parameters = list(model.parameters())
    saved = [weight.clone() for weight in parameters]  # subtracting the step again would leave rounding errors behind
    losses = []
    try:
        for distance in distances:
            for weight, origin, towards in zip(parameters, saved, direction, strict=True):
                weight.copy_(origin + distance * towards)
            losses.append(evaluate(model, data)[0])
    finally:
        for weight, origin in zip(parameters, saved, strict=True):
            weight.copy_(origin)
    return losses


def sharpness(model: nn.Module, data: Split, rho: float) -> float:
    """Rise of the loss on all of `data` from the weights to SAM's perturbed point, for a net trained in any way."""
    model.eval()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.0)  # lr 0: measures and moves nothing
    step(model, optimizer, data)
    return loss_rise(optimizer)


def train(method: str, seed: int, epochs: int, lr: float, rho: float) -> Run:
    torch.manual_seed(seed)  # both methods start from the same weights and see the same batches in the same order
    train_set, validation_set, test_set = load_splits(seed)
    model, order = make_net(), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(method, model, lr, rho)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    curves, rise, seconds = [(evaluate(model, train_set)[0], *evaluate(model, test_set))], math.nan, 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        rise = train_epoch(model, optimizer, train_set, order)
        seconds += time.perf_counter() - start
        scheduler.step()
        curves.append((evaluate(model, train_set)[0], *evaluate(model, test_set)))
    landscape = loss_along(model, train_set, filter_normalised_direction(model, PROBE_SEED), PROBE_DISTANCES)
    validation_error = evaluate(model, validation_set)[1]
    return Run(method, curves, validation_error, landscape, sharpness(model, train_set, rho), rise, seconds)


def train_all(seeds: int, epochs: int, lr: float, rho: float) -> list[Run]:
    """Every method and seed, in two processes of one torch thread each: two threads make nets this small slower."""
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's threads can hang
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(train, method, seed, epochs, lr, rho) for seed in range(seeds) for method in COLOURS]
        list(track(as_completed(jobs), "Training", total=len(jobs), console=Console(stderr=True)))
        return [job.result() for job in jobs]


def collect(runs: list[Run], method: str, name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if run.method == method])


def summary(values: np.ndarray, digits: int = 2) -> str:
    """`mean ± standard error`; the error of a single value is nan."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def print_table(runs: list[Run], rho: float) -> None:
    table = Table("optimizer", title=f"digits, {len(runs) // 2} seeds, mean ± standard error")
    for heading in ("test\naccuracy %", "validation\naccuracy %", "loss rise at\nrho, x 1000", "seconds in\nsteps"):
        table.add_column(heading, justify="right")
    for method in COLOURS:
        test = summary(100 - 100 * collect(runs, method, "curves")[:, -1, 2])
        validation = summary(100 - 100 * collect(runs, method, "validation_error"))
        rise = summary(1000 * collect(runs, method, "sharpness"))
        table.add_row(method, test, validation, rise, summary(collect(runs, method, "seconds"), digits=1))
    Console().print(table)
    free = summary(1000 * collect(runs, "SAM", "free_sharpness"))
    print(f"Loss rise at rho = {rho}: above, over the whole training set. Read at no cost by SAM's own steps, over the")
    print(f"batches of the last epoch: {free} x 1/1000 (higher: every batch has its own steepest direction).")


def plot(runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    losses, errors, landscape = figure.subplots(1, 3)
    for method, colour in COLOURS.items():
        train_loss, test_loss, test_error = collect(runs, method, "curves").mean(axis=0).T  # [seed, epoch, curve]
        losses.plot(train_loss, "--", c=colour, label=f"{method}, training")
        losses.plot(test_loss, c=colour, label=f"{method}, test")
        errors.plot(100 * test_error, c=colour, label=method)
        profiles = collect(runs, method, "landscape")
        landscape.plot(PROBE_DISTANCES, profiles.mean(axis=0), c=colour, label=f"{method}, mean (thin: each seed)")
        landscape.plot(PROBE_DISTANCES, profiles.T, c=colour, alpha=0.3, lw=0.8)
    losses.set(title="Loss, mean over seeds", xlabel="epoch", yscale="log")
    errors.set(title="Test error in %, mean over seeds", xlabel="epoch", ylim=(0, 10))
    landscape.set(title="Training loss along a random direction", xlabel="distance / length of each filter", ylim=0)
    for axes in (losses, errors, landscape):
        axes.legend()
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Chosen by validation loss on seeds 100 to 103 from lr 0.02, 0.05, 0.1 (the best for both) and rho 0.02 to 0.2.
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--rho", type=float, default=0.1, help="radius of SAM's ball (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.05, help="of both optimizers (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_digits.png")
    parser.add_argument("--smoke", action="store_true", help="two seeds, five epochs: is everything installed?")
    options = parser.parse_args()
    seeds, epochs = (2, 5) if options.smoke else (options.seeds, options.epochs)
    runs = train_all(seeds, epochs, options.lr, options.rho)
    print_table(runs, options.rho)
    plot(runs, options.output)


if __name__ == "__main__":
    main()
