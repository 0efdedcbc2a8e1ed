"""The GPU benchmark's rows, the targets beside what was reached, and their tables, CSV and picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# What the project set out to reach, on the class of card that has 4.8 TB/s.
COPY_PERCENT = 90.0
COPY_SETS = ("resnet50", "gpt_1b")
MOST_LAUNCHES = 4
MOST_HOST_MS = 0.2
HOST_SET = "resnet50"
NAIVE_RATIO = {"tiny": 10.0, "lora": 10.0, "gpt_1b": 2.0}
COMPILE_RATIO = 1.2


@dataclass
class KernelRow:
    """One operation of one backend over one set, second-level cache cold."""

    set: str
    dtype: str
    backend: str
    op: str
    tensors: int
    parameters: int
    bytes: int
    ms: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    reason: str | None = None


@dataclass
class StepRow:
    """The optimizer side of one SAM step by one variant. Where it was not measured, `reason` says why."""

    set: str
    dtype: str
    base: str
    variant: str
    title: str
    tensors: int
    parameters: int
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    ratio_to_ours: float | None = None
    host_ms: float | None = None
    kernels: int | None = None
    copies: int | None = None
    peak_extra_bytes: int | None = None
    rounds: int = 0
    noisy: bool = False
    reason: str | None = None
    remark: str | None = None


@dataclass
class Target:
    """`verdict` is "reached", "not reached" or "not measured"."""

    what: str
    required: str
    found: float | None
    verdict: str


def _judged(what: str, required: str, found: float | None, reached: bool | None) -> Target:
    verdict = "not measured" if found is None else "reached" if reached else "not reached"
    return Target(what, required, found, verdict)


def _at_least(what: str, bound: float, found: float | None) -> Target:
    return _judged(what, f">= {bound:g}", found, found is not None and found >= bound)


def _at_most(what: str, bound: float, found: float | None) -> Target:
    return _judged(what, f"<= {bound:g}", found, found is not None and found <= bound)


def targets(kernels: Sequence[KernelRow], steps: Sequence[StepRow], ours: Sequence[str]) -> list[Target]:
    """Every target, for every row it is about, in the order of the rows. `ours` are our variants, the headline first."""
    judged = []
    for kernel in kernels:
        if kernel.set in COPY_SETS and kernel.op != "restore_":
            what = f"{kernel.set} {kernel.dtype} {kernel.backend} {kernel.op}: % of copy"
            judged.append(_at_least(what, COPY_PERCENT, kernel.percent_of_copy))
    for step in steps:
        name = f"{step.set} {step.dtype} {step.base} {step.variant}"
        if step.variant in ours:
            launched = None if step.kernels is None or step.copies is None else float(step.kernels + step.copies)
            judged.append(_at_most(f"{name}: launches", MOST_LAUNCHES, launched))
            if step.set == HOST_SET:
                judged.append(_at_most(f"{name}: host ms", MOST_HOST_MS, step.host_ms))
        elif step.variant == "naive" and step.set in NAIVE_RATIO:
            judged.append(_at_least(f"{name} / ours", NAIVE_RATIO[step.set], step.ratio_to_ours))
        elif step.variant == "torch_compile":
            form = step.title.partition(", ")[2]  # each of its forms has a row, and the target is about all of them
            judged.append(_at_least(f"{name} {form} / ours".replace("  ", " "), COMPILE_RATIO, step.ratio_to_ours))
    return judged


def write_csv(path: Path, kernels: Sequence[KernelRow], steps: Sequence[StepRow]) -> None:
    """One line per row: `kind` tells an operation from a step, columns that a kind has not stay empty."""
    names = ["kind", *dict.fromkeys(column.name for row in (KernelRow, StepRow) for column in fields(row))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"kind": "operation", **asdict(row)} for row in kernels)
        writer.writerows({"kind": "step", **asdict(row)} for row in steps)


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def print_tables(console: Console, kernels: Sequence[KernelRow], steps: Sequence[StepRow], judged: Sequence[Target]) -> None:
    """Operations, steps, targets."""
    table = Table(title="operations, second-level cache cold", title_justify="left")
    for column in ("set", "dtype", "backend", "operation", "MB", "ms", "GB/s", "% copy"):
        table.add_column(column)
    for row in kernels:
        figures = [_number(row.ms, ".4f"), _number(row.gb_per_s, ".0f"), _number(row.percent_of_copy, ".1f")]
        what = [row.set, row.dtype, row.backend, row.op, f"{row.bytes / 1e6:.1f}"]
        table.add_row(*what, *(figures if row.reason is None else [row.reason]))
    console.print(table)
    table = Table(title="optimizer side of one step, device idle before and after", title_justify="left")
    for column in ("set", "dtype", "base", "variant", "ms", "x ours", "host ms", "kernels+copies", "peak MiB", "rounds"):
        table.add_column(column)
    for step in steps:
        peak = None if step.peak_extra_bytes is None else step.peak_extra_bytes / 2**20
        values = [_number(step.median_ms, ".4f"), _number(step.ratio_to_ours, ".2f"), _number(step.host_ms, ".4f")]
        values += [f"{_number(step.kernels, 'd')}+{_number(step.copies, 'd')}", _number(peak, ".1f"), str(step.rounds)]
        table.add_row(step.set, step.dtype, step.base, step.title, *(values if step.reason is None else [step.reason]))
    console.print(table)
    for target in judged:
        console.print(f"{target.verdict:12} {target.what}: required {target.required}, found {_number(target.found, '.4g')}")


def write_png(path: Path, kernels: Sequence[KernelRow], steps: Sequence[StepRow], subtitle: str) -> str | None:
    """GB/s of the operations beside the copy's, and the steps' ratios to ours. Returns why there is none, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {f"{r.set} {r.dtype} {r.op} {r.backend}": r.percent_of_copy for r in kernels if r.percent_of_copy}
    ratios = {f"{s.set} {s.dtype} {s.base} {s.title}": s.ratio_to_ours for s in steps if s.ratio_to_ours}
    panels = [("per cent of a device copy", 100.0, bars), ("times ours", 1.0, ratios)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return "no picture: nothing was measured"
    heights = [2 + len(panel[2]) for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 0.8 + 0.24 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for (label, line, values), axis in zip(panels, axes[:, 0], strict=True):
        axis.barh(list(values)[::-1], list(values.values())[::-1], color="#1f77b4")
        axis.axvline(line, color="#404040", linewidth=0.8)
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(subtitle, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None


def as_json(rows: Sequence[KernelRow | StepRow | Target]) -> list[dict[str, Any]]:
    """Rows as JSON holds them."""
    return [asdict(row) for row in rows]
