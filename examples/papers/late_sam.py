"""A few epochs of SAM at the end of a run do most of what SAM does [arXiv 2410.10373].

    python examples/papers/late_sam.py

The paper claims that SAM over the last epochs alone gives nearly the flatness and generalisation of SAM all along, that SAM at
the beginning followed by SGD loses them, and that SAM, once switched on, stays in the valley that SGD had reached. Here SAM has
the same budget at the end and at the beginning, a quarter of the steps. The nets of a seed start from the same weights and see
the same batches, so that the one with SAM late is the one without SAM up to the switch.

Flatness is the top eigenvalue of the Hessian of the mean cross-entropy over the training points. The claims are worked out on
mnist1d and on digits at a constant learning rate. With a cosine schedule the last quarter is trained with hardly any learning
rate: that table is there as a warning.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

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
from training import ALWAYS, NEVER, TASKS, Recipe, report, smoothed_loss, train

from sam_fused import sharpness

METHODS = {
    "SGD": NEVER,
    "SAM": ALWAYS,
    "SAM, last quarter": Recipe(start=0.75),
    "SAM, first quarter": Recipe(stop=0.25),
}
SGD, SAM, LATE, EARLY = METHODS
COLOURS = dict(zip(METHODS, ("black", "tab:blue", "tab:green", "tab:orange"), strict=True))
# Of the distance from SGD's top eigenvalue to SAM's.
LATE_CLOSES, EARLY_CLOSES = 0.75, 0.5
# A line from SGD's weights leads out of the valley where the loss on it rises above both ends by more than this. SAM all along,
# which parted from SGD at the first step, is what it looks like to be somewhere else, in the mean over seeds.
SAME_VALLEY = 0.02
POINTS = 21


class Setting(NamedTuple):
    """What all methods have in common."""

    task: str
    cosine: bool

    @property
    def label(self) -> str:
        return f"{self.task}, {'cosine' if self.cosine else 'constant'} learning rate"


SETTINGS = [Setting("mnist1d", False), Setting("digits", False), Setting("mnist1d", True)]


class Run(NamedTuple):
    setting: Setting
    method: str
    seed: int
    test_error: float  # per cent
    train_error: float
    train_loss: float
    eigenvalue: float
    line: tuple[float, ...]  # training loss from SGD's weights (t = 0) to this method's (t = 1)


def train_seed(setting: Setting, seed: int, epochs: int) -> list[Run]:
    """All methods with one seed, and the lines between them."""
    data = TASKS[setting.task].load()
    nets = {name: train(setting.task, recipe._replace(cosine=setting.cosine), seed, epochs) for name, recipe in METHODS.items()}
    batch = [(data.inputs, data.labels)]
    loss = sharpness.batch_loss(lambda net, batch: smoothed_loss(net, *batch))
    surface = sharpness.LossSurface(nets[SGD], loss, batch, progress=False)
    runs = []
    for name, net in nets.items():
        line = sharpness.between(surface, nets[SGD].state_dict(), net.state_dict(), positions=POINTS)
        runs.append(Run(setting, name, seed, **report(net, data), line=line.losses))
    return runs


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(runs: list[Run], setting: Setting, method: str, name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if (run.setting, run.method) == (setting, method)])


def closed(runs: list[Run], setting: Setting, method: str, name: str = "eigenvalue") -> float:
    """Which share of the distance from SGD's mean to SAM's the method's mean has come."""
    sgd, sam, own = (collect(runs, setting, m, name).mean() for m in (SGD, SAM, method))
    return float((sgd - own) / (sgd - sam))


def barriers(runs: list[Run], setting: Setting, method: str) -> np.ndarray:
    """How far the loss on the line from SGD's weights rises above the higher one of its ends."""
    lines = collect(runs, setting, method, "line")
    return lines.max(axis=1) - np.maximum(lines[:, 0], lines[:, -1])


def check(runs: list[Run], setting: Setting) -> list[Claim]:
    apart = standard_errors_above(*(collect(runs, setting, method, "eigenvalue") for method in (SGD, SAM)))
    late, early = closed(runs, setting, LATE), closed(runs, setting, EARLY)
    here, elsewhere = barriers(runs, setting, LATE), barriers(runs, setting, SAM)
    return [
        Claim(
            f"{setting.task}: SAM's top eigenvalue is below SGD's",
            apart > 2,
            f"by {apart:.1f} standard errors of the difference, bound 2",
        ),
        Claim(
            f"{setting.task}: SAM in the last quarter brings most of that, {LATE_CLOSES:.0%} and more",
            late >= LATE_CLOSES,
            f"{late:.0%} of the distance",
        ),
        Claim(
            f"{setting.task}: SAM in the first quarter, then SGD, keeps {EARLY_CLOSES:.0%} of it at most",
            early <= EARLY_CLOSES,
            f"{early:.0%} of the distance",
        ),
        Claim(
            f"{setting.task}: switched on late, SAM stays in SGD's valley, where SAM all along is somewhere else",
            bool(here.max() <= SAME_VALLEY < elsewhere.mean()),
            f"the loss between them rises by at most {here.max():.4f}, bound {SAME_VALLEY}, to SAM all along by "
            f"{summary(elsewhere)}",
        ),
    ]


def check_errors(runs: list[Run], setting: Setting) -> list[Claim]:
    """What the paper says of generalisation, held against the same bounds: reported, whatever it is."""
    apart = standard_errors_above(*(collect(runs, setting, method, "test_error") for method in (SGD, SAM)))
    if apart <= 2:
        return [
            Claim(
                f"{setting.task}: SAM has the lower test error",
                False,
                f"by {apart:.1f} standard errors, bound 2: no power to say anything of late and early",
            )
        ]
    late, early = (closed(runs, setting, method, "test_error") for method in (LATE, EARLY))
    return [
        Claim(f"{setting.task}: SAM has the lower test error", True, f"by {apart:.1f} standard errors, bound 2"),
        Claim(
            f"{setting.task}: SAM in the last quarter brings {LATE_CLOSES:.0%} and more of that, in the first at most half",
            late >= LATE_CLOSES and early <= EARLY_CLOSES,
            f"{late:.0%} and {early:.0%} of the distance",
        ),
    ]


HEADINGS = ["method", "top eigenvalue", "of the way", "test error %", "training loss", "barrier"]


def table(runs: list[Run], setting: Setting) -> list[list[str]]:
    """A row for each method."""
    rows = []
    for method in METHODS:
        share = "" if method in (SGD, SAM) else f"{closed(runs, setting, method):.0%}"
        eigenvalue, test = (summary(collect(runs, setting, method, name), 2) for name in ("eigenvalue", "test_error"))
        barrier = "" if method == SGD else summary(barriers(runs, setting, method), 3)
        rows.append([method, eigenvalue, share, test, summary(collect(runs, setting, method, "train_loss"), 4), barrier])
    return rows


def plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(14, 4.2), dpi=80, layout="constrained")
    shown = [setting for setting in SETTINGS if len(collect(runs, setting, SGD, "seed"))]
    *bars, lines = figure.subplots(1, len(shown) + 1)
    for setting, axes in zip(shown, bars, strict=True):
        for place, (method, colour) in enumerate(COLOURS.items()):
            values = collect(runs, setting, method, "eigenvalue")
            axes.bar(place, values.mean(), color=colour, alpha=0.5)
            axes.plot([place] * len(values), values, "o", c=colour, ms=4)
        axes.set(title=f"Top eigenvalue\n{setting.label}")
        axes.set_xticks(range(len(METHODS)), [name.replace(", ", ",\n") for name in METHODS], fontsize=8)
    for method in (LATE, EARLY, SAM):
        lines.plot(np.linspace(0, 1, POINTS), collect(runs, shown[0], method, "line").T, c=COLOURS[method], lw=1)
        lines.plot([], [], c=COLOURS[method], label=f"to {method}")
    lines.set(title=f"Training loss from SGD's weights\n{shown[0].label}", xlabel="position on the line")
    lines.legend(fontsize=8)
    for axes in (*bars, lines):
        axes.grid(alpha=0.3, axis="y")
    return figure


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--task", choices=TASKS, help="only this one, without the cosine schedule (default: all)")
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = 2 if options.smoke else options.seeds
    task = "digits" if options.smoke else options.task
    settings = [setting for setting in SETTINGS if task is None or setting == Setting(task, False)]
    jobs = [(train_seed, setting, seed, options.epochs) for seed in range(seeds) for setting in settings]
    jobs.sort(key=lambda job: job[1].task, reverse=True)  # mnist1d takes longer
    runs = [run for group in run_jobs(jobs, "Training") for run in group]

    for setting in settings:
        print_table(f"{setting.label}, {seeds} seeds, mean ± standard error", HEADINGS, table(runs, setting))
    constant = [setting for setting in settings if not setting.cosine]
    claims = [claim for setting in constant for claim in check(runs, setting)]
    print_claims([*claims, *(reported := [claim for setting in constant for claim in check_errors(runs, setting)])])
    save_picture(plot(runs), options.output, "late_sam")
    results: dict[str, Any] = {
        "claims about test errors": [claim._asdict() for claim in reported],
        "runs": [run._asdict() | {"setting": run.setting.label} for run in runs],
    }
    save_results(options.output, "late_sam", results, claims, seeds, start)


if __name__ == "__main__":
    main()
