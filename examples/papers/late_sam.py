"""SAM in the last quarter of a run brings most of SAM's flatness [arXiv 2410.10373].

    python examples/papers/late_sam.py

The paper claims that SAM over the last epochs alone gives nearly the flatness and generalisation of SAM all along, that SAM at
the beginning followed by SGD loses them, and that SAM, once switched on, stays in the valley that SGD had reached. Here SAM has
the same budget at the end and at the beginning, a quarter of the steps. The nets of a seed start from the same weights and see
the same batches, so that the one with SAM late is the one without SAM up to the switch.

Flatness is the top eigenvalue of the Hessian of the mean cross-entropy over the training points. The claims are worked out on
mnist1d and on digits at a constant learning rate. With a cosine schedule the last quarter is trained with hardly any learning
rate: that table is there as a warning. Error bars are over initialisation and batches, on one fixed data set.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from common import Reproduction, Table, draw_bar, make_parser, publish, run_jobs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training import ALWAYS, NEVER, TASKS, Recipe, report, smoothed_loss, train
from verdicts import BOUND, Claim, Share, claim_above, distances, share_of_the_way, standard_errors_above, summary

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
# A line from SGD's weights leads out of the valley where the loss on it rises above both ends by more than this, in the mean
# over seeds. SAM all along, which parted from SGD at the first step, is what it looks like to be somewhere else.
SAME_VALLEY = 0.02
POINTS = 21
MEASURES = {"eigenvalue": "top eigenvalue", "test_error": "test error in %"}


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
    line: list[float]  # training loss from SGD's weights (t = 0) to this method's (t = 1)


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
        runs.append(Run(setting, name, seed, **report(net, data), line=list(line.losses)))
    return runs


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(runs: list[Run], setting: Setting, method: str, name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs if (run.setting, run.method) == (setting, method)])


def closed(runs: list[Run], setting: Setting, method: str, name: str = "eigenvalue") -> Share:
    """Which share of the distance from SGD's mean to SAM's the method's mean has come."""
    return share_of_the_way(*(collect(runs, setting, m, name) for m in (SGD, SAM, method)))


def barriers(runs: list[Run], setting: Setting, method: str) -> np.ndarray:
    """How far the loss on the line from SGD's weights rises above the higher one of its ends."""
    lines = collect(runs, setting, method, "line")
    return lines.max(axis=1) - np.maximum(lines[:, 0], lines[:, -1])


def check_setting(runs: list[Run], setting: Setting) -> list[Claim]:
    sgd, sam = (collect(runs, setting, method, "eigenvalue") for method in (SGD, SAM))
    late, early = closed(runs, setting, LATE), closed(runs, setting, EARLY)
    here, elsewhere = barriers(runs, setting, LATE), barriers(runs, setting, SAM)
    return [
        claim_above(f"{setting.task}: SAM's top eigenvalue is below SGD's", sgd, sam),
        Claim(
            f"{setting.task}: SAM in the last quarter brings most of that, {LATE_CLOSES:.0%} and more",
            late.value >= LATE_CLOSES,
            f"{late} of the way",
        ),
        Claim(
            f"{setting.task}: SAM in the first quarter, then SGD, keeps {EARLY_CLOSES:.0%} of it at most",
            early.value <= EARLY_CLOSES,
            f"{early} of the way",
        ),
        Claim(
            f"{setting.task}: SAM in the last quarter stays in SGD's valley: the loss between rises by {SAME_VALLEY} at most",
            bool(here.mean() <= SAME_VALLEY),
            f"{summary(here)} in the mean; at most {SAME_VALLEY} in {(here <= SAME_VALLEY).sum()} of {len(here)} seeds",
        ),
        Claim(
            f"{setting.task}: SAM all along is somewhere else: the loss between it and SGD rises by more",
            bool(elsewhere.mean() > SAME_VALLEY),
            f"{summary(elsewhere)} in the mean; above {SAME_VALLEY} in {(elsewhere > SAME_VALLEY).sum()} of {len(here)} seeds",
        ),
    ]


def report_setting(runs: list[Run], setting: Setting) -> list[Claim]:
    """What the paper says of generalisation, held against the same bounds."""
    sgd, sam = (collect(runs, setting, method, "test_error") for method in (SGD, SAM))
    lower = claim_above(f"{setting.task}: SAM has the lower test error", sgd, sam)
    if not lower.holds:
        return [lower._replace(margin=f"{lower.margin}: no power to say anything of late and early")]
    late, early = (closed(runs, setting, method, "test_error") for method in (LATE, EARLY))
    return [
        lower,
        Claim(
            f"{setting.task}: SAM in the last quarter brings {LATE_CLOSES:.0%} and more of that, in the first at most half",
            late.value >= LATE_CLOSES and early.value <= EARLY_CLOSES,
            f"{late} and {early} of the way",
        ),
    ]


def report_cosine(runs: list[Run], setting: Setting) -> list[Claim]:
    """The warning, in the terms of the claim that it takes back."""
    late, (late_values, early_values) = (
        closed(runs, setting, LATE),
        (collect(runs, setting, method, "eigenvalue") for method in (LATE, EARLY)),
    )
    return [
        Claim(
            f"{setting.label}: SAM in the last quarter brings {LATE_CLOSES:.0%} of SAM's flatness and more",
            late.value >= LATE_CLOSES,
            f"{late} of the way",
        ),
        Claim(
            f"{setting.label}: SAM in the last quarter brings more flatness than in the first",
            standard_errors_above(early_values, late_values) > BOUND,
            distances(early_values, late_values),
        ),
    ]


def settings_in(runs: list[Run]) -> list[Setting]:
    return [setting for setting in SETTINGS if len(collect(runs, setting, SGD, "seed"))]


def check(runs: list[Run]) -> list[Claim]:
    return [claim for setting in settings_in(runs) if not setting.cosine for claim in check_setting(runs, setting)]


def report_claims(runs: list[Run]) -> list[Claim]:
    claims = []
    for setting in settings_in(runs):
        claims += (report_cosine if setting.cosine else report_setting)(runs, setting)
    return claims


HEADINGS = ["method", "top eigenvalue", "of the way", "test error %", "training loss", "barrier"]


def table(runs: list[Run], setting: Setting) -> Table:
    rows = []
    for method in METHODS:
        share = "" if method in (SGD, SAM) else str(closed(runs, setting, method))
        eigenvalue, test = (summary(collect(runs, setting, method, name), 2) for name in ("eigenvalue", "test_error"))
        barrier = "" if method == SGD else summary(barriers(runs, setting, method), 3)
        rows.append([method, eigenvalue, share, test, summary(collect(runs, setting, method, "train_loss"), 4), barrier])
    seeds = len(collect(runs, setting, SGD, "seed"))
    title = f"{setting.label}{', a warning' if setting.cosine else ''}, {seeds} seeds, mean ± standard error"
    return Table(title, HEADINGS, rows)


def tables(runs: list[Run]) -> list[Table]:
    return [table(runs, setting) for setting in settings_in(runs)]


def draw_bars(axes: Axes, runs: list[Run], setting: Setting, name: str) -> None:
    for place, (method, colour) in enumerate(COLOURS.items()):
        draw_bar(axes, place, collect(runs, setting, method, name), colour)
    axes.set(title=setting.label.replace(", ", "\n"), ylabel=MEASURES[name])
    axes.set_xticks(range(len(METHODS)), [method.replace(", ", ",\n") for method in METHODS], fontsize=7)


def draw_lines(axes: Axes, runs: list[Run], setting: Setting) -> None:
    for method in (SAM, EARLY, LATE):
        lines = collect(runs, setting, method, "line")
        axes.plot(np.linspace(0, 1, lines.shape[1]), lines.T, c=COLOURS[method], lw=1, alpha=0.8)
        axes.plot([], [], c=COLOURS[method], label=f"to {method}")
    axes.set(title=f"From SGD's weights (0)\n{setting.task}", xlabel="position on the line", ylabel="training loss")
    axes.set_ylim(top=axes.get_ylim()[1] + 0.35 * np.ptp(axes.get_ylim()))  # the legend's place
    axes.legend(fontsize=8, loc="upper left")


def plot(runs: list[Run]) -> Figure:
    """A column for each setting: flatness and test error. Beside them the lines of those without a cosine."""
    shown = settings_in(runs)
    constant = [setting for setting in shown if not setting.cosine]
    figure = Figure(figsize=(3.6 * (len(shown) + 1) + 0.8, 7.2), dpi=80, layout="constrained")
    panels = figure.subplots(2, len(shown) + 1, squeeze=False)
    for column, setting in enumerate(shown):
        for row, name in enumerate(MEASURES):
            draw_bars(panels[row, column], runs, setting, name)
    for axes, setting in zip(panels[:, -1], constant, strict=False):
        draw_lines(axes, runs, setting)
    for axes in panels[len(constant) :, -1]:
        axes.remove()
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis="y")
    return figure


def restore(results: list[dict[str, Any]]) -> list[Run]:
    return [Run(**run | {"setting": Setting(**run["setting"])}) for run in results]


REPRODUCTION = Reproduction("late_sam", restore, tables, check, report_claims, plot)


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
    publish(REPRODUCTION, runs, options.output, seeds, start)


if __name__ == "__main__":
    main()
