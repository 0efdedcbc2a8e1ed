"""Does a step's optimizer side grow with the number of micro-batches and no faster? Times, a fitted line, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from benchmarks.cases import ParameterSet
from benchmarks.measure import Gradients, build, rounds_of, runner
from benchmarks.micro_batch_variants import GRADIENT_SETS, MicroBatchDriver, baselines, headline, pace
from benchmarks.plot import NO_MATPLOTLIB, find_pyplot
from benchmarks.suite import Settings

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Line:
    """One variant's step on one set: `ms[i]` with `micro_batches[i]`, and the line of least squares through them."""

    set: str
    base: str
    variant: str
    title: str
    form: str
    micro_batches: list[int]
    ms: list[float]
    slope_ms: float
    intercept_ms: float
    r_squared: float
    noisy: bool


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the line of least squares."""
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    left = sum((value - slope * at - intercept) ** 2 for at, value in zip(x, y, strict=True))
    total = sum((value - mean) ** 2 for value in y)
    return slope, intercept, 1 - left / total


def measure_growth(
    parameter_set: ParameterSet,
    base: str,
    chosen: dict[str, str],
    settings: Settings,
    counts: Sequence[int] = COUNTS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Line]:
    """Ours and each baseline in turn, one count after the other. `chosen` names the form of a variant that has several."""
    gradients = Gradients.make(parameter_set.shapes(), settings.seed, GRADIENT_SETS)
    variants = [headline(counts[0]), *baselines(counts[0])]
    drivers: dict[str, MicroBatchDriver] = {}
    forms = {}
    for variant in variants:
        named = {form.name: form for form in variant.forms}
        form = forms[variant.name] = named.get(chosen.get(variant.name, ""), variant.forms[0])
        # Every driver of this benchmark takes another number of micro-batches at any time.
        drivers[variant.name] = cast(MicroBatchDriver, build(form, parameter_set, base, settings.seed))
    ms: dict[str, list[float]] = {name: [] for name in drivers}
    noisy = False
    # A count's share of the time is its share of the work: the deadline leaves each as many rounds.
    for count in counts:
        say(f"{parameter_set.name} {base}: growth, {count} micro-batches")
        for driver in drivers.values():
            driver.micro_batches = count
        runs = {name: runner(driver, gradients) for name, driver in drivers.items()}
        seconds = settings.seconds * count / sum(counts)
        kept, discarded = rounds_of(runs, settings.rounds, seconds, settings.block_seconds, pace=pace(count))
        noisy = noisy or not kept
        for name, found in ms.items():
            found.append(1e3 * statistics.median(figures[name] for figures in kept or discarded))
    return [
        Line(
            parameter_set.name,
            base,
            variant.name,
            variant.title,
            forms[variant.name].name,
            list(counts),
            ms[variant.name],
            *fit(list(counts), ms[variant.name]),
            noisy,
        )
        for variant in variants
    ]


def print_growth(console: Console, lines: list[Line]) -> None:
    """One table per set: ms of a whole step with each number of micro-batches."""
    for name in dict.fromkeys(line.set for line in lines):
        chosen = [line for line in lines if line.set == name]
        title = f"{name}: ms of a whole step's optimizer side with this many micro-batches"
        table = Table(title=title, title_justify="left")
        table.add_column("variant")
        for count in chosen[0].micro_batches:
            table.add_column(str(count), justify="right")
        for column in ("ms per micro-batch", "R²"):
            table.add_column(column, justify="right")
        for line in chosen:
            cells = [f"{ms:.2f}" for ms in line.ms]
            table.add_row(line.title, *cells, f"{line.slope_ms:.3f}", f"{line.r_squared:.4f}{' NOISY' if line.noisy else ''}")
        console.print(table)


def write_growth_png(path: Path, lines: list[Line], subtitle: str) -> str | None:
    """A panel per set: points, and their lines. Returns the reason where no picture can be drawn, else None."""
    pyplot = find_pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    names = list(dict.fromkeys(line.set for line in lines))
    if not names:
        return "no picture: nothing was measured"
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        chosen = [line for line in lines if line.set == name]
        greys = iter(("#505050", "#808080", "#b0b0b0"))
        for line in chosen:
            colour = "#1f77b4" if line.variant.startswith("ours_") else next(greys, "#d0d0d0")
            ends = [min(line.micro_batches), max(line.micro_batches)]
            label = f"{line.title}, R² {line.r_squared:.4f}"
            axis.plot(line.micro_batches, line.ms, "o", markersize=4, color=colour, label=label)
            axis.plot(ends, [line.intercept_ms + line.slope_ms * end for end in ends], linewidth=1, color=colour)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("micro-batches", fontsize=8)
        axis.set_ylabel("ms per step", fontsize=8)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper left")
        axis.tick_params(labelsize=8)
    figure.suptitle(subtitle, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None
