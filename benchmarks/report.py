"""The results: rows, the required ratios beside the reached ones, and their table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import ParameterSet

# Variant over ours, optimizer side of one step, SGD with momentum and weight decay, two threads.
REQUIRED: dict[str, dict[str, float]] = {
    "resnet50": {
        "naive": 2.6,
        "pytorch_optimizer_foreach": 3.0,
        "foreach_inplace": 1.6,
        "foreach_swap": 1.15,
        "torch_compile": 1.4,
    },
    "lora": {
        "naive": 4.5,
        "pytorch_optimizer_foreach": 7.0,
        "foreach_inplace": 3.0,
        "foreach_swap": 2.0,
        "torch_compile": 2.5,
    },
    "tiny": {
        "naive": 8.0,
        "pytorch_optimizer_foreach": 7.0,
        "foreach_inplace": 3.3,
        "foreach_swap": 3.0,
        "torch_compile": 5.0,
    },
}
# The foreach backend, which users without a compiler get: at most 5 % slower than naive on every set.
FOREACH_MINIMUM = 0.95


@dataclass
class Row:
    """One variant on one parameter set. Where it could not run, `reason` says why and the figures are None.

    Times and accesses are those of a whole step, of however many micro-batches.
    """

    set: str
    base: str
    variant: str
    title: str
    form: str
    call_form: str
    backend: str
    tensors: int
    parameters: int
    threads: int
    micro_batches: int = 1
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    ratio_to_ours: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    rounds_kept: int = 0
    rounds_discarded: int = 0
    noisy: bool = False
    accesses_sam: int | None = None
    accesses_with_base: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    peak_extra_bytes: int | None = None
    trials_ms: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class Target:
    """A required ratio and the reached one. `verdict` is PASS, short, "too noisy" or "not measured"."""

    set: str
    variant: str
    required: float
    reached: float | None
    verdict: str
    micro_batches: int = 1


def judge(
    set_name: str, variant: str, required: float, reached: float | None, noisy: bool = False, micro_batches: int = 1
) -> Target:
    """PASS where the reached ratio, unrounded, is at least the required one; no round that was quiet, no verdict."""
    if reached is None:
        verdict = "not measured"
    elif noisy:
        verdict = "too noisy"
    else:
        verdict = "PASS" if reached >= required else "short"
    return Target(set_name, variant, required, reached, verdict, micro_batches)


def targets(rows: list[Row], required_ratios: dict[str, dict[str, float]] = REQUIRED) -> list[Target]:
    """Every required ratio of the sets that were measured with SGD, in the table's order."""
    found = {(row.set, row.micro_batches, row.variant): row for row in rows if row.base == "sgd"}
    judged = []
    for set_name, micro_batches in dict.fromkeys((row.set, row.micro_batches) for row in rows if row.base == "sgd"):
        for variant, required in required_ratios.get(set_name, {}).items():
            row = found.get((set_name, micro_batches, variant))
            reached, noisy = (row.ratio_to_ours, row.noisy) if row else (None, False)
            judged.append(judge(set_name, variant, required, reached, noisy, micro_batches))
    return judged


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The whole report, keys in a fixed order, for machines and for later comparison."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    """The rows of the optimizer side alone, one line each."""
    names = [column.name for column in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            values["trials_ms"] = "; ".join(f"{name} {ms:.3f}" for name, ms in row.trials_ms.items())
            writer.writerow(values)


def ratio_cell(row: dict[str, Any] | None, required: float | None = None) -> str:
    """A cell of a Markdown table: the ratio, with the required one beside it where it fell short."""
    if row is None or row["ratio_to_ours"] is None:
        return "-"
    short = required is not None and row["ratio_to_ours"] < required
    return f"{row['ratio_to_ours']:.2f}x" + (f" (goal {required:g}x)" if short else "")


def set_title(parameter_set: ParameterSet) -> str:
    """A parameter set in a Markdown table."""
    count = "" if "tensors" in parameter_set.title else f", {parameter_set.tensors} tensors"
    return f"{parameter_set.title}{count}, {parameter_set.parameters / 1e6:.3g} M parameters"


def _number(value: float | None, pattern: str, share: float = 1.0) -> str:
    return "-" if value is None else format(value * share, pattern)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def table_key(row: Row) -> tuple[str, str, int]:
    """What the rows of one table have in common."""
    return row.set, row.base, row.micro_batches


def title_of(row: Row) -> str:
    """Of the table and of the picture's panel that a row stands in."""
    split = f", {row.micro_batches} micro-batches, figures per micro-batch" if row.micro_batches > 1 else ""
    return f"{row.set}: {row.tensors} tensors, {row.parameters:,} parameters, {row.base}{split}"


def print_rows(console: Console, rows: list[Row]) -> None:
    """One table per parameter set, base and number of micro-batches; times and accesses are divided by the latter."""
    for key in dict.fromkeys(map(table_key, rows)):
        chosen = [row for row in rows if table_key(row) == key]
        first = chosen[0]
        table = Table(title=f"{title_of(first)}, {first.threads} threads", title_justify="left", caption_justify="left")
        table.add_column("variant")
        table.add_column("form")
        for column in ("ms", "quartiles", "x ours", "quartiles", "accesses", "GB/s", "% copy", "peak MiB", "rounds"):
            table.add_column(column, justify="right")
        for row in chosen:
            if row.reason is not None:
                table.add_row(row.title, f"[yellow]{row.reason}[/yellow]")
                continue
            share = 1 / row.micro_batches
            table.add_row(
                row.title,
                row.form,
                _number(row.median_ms, ".3f", share),
                f"{_number(row.q1_ms, '.3f', share)}..{_number(row.q3_ms, '.3f', share)}",
                _number(row.ratio_to_ours, ".2f"),
                f"{_number(row.ratio_q1, '.2f')}..{_number(row.ratio_q3, '.2f')}",
                f"{_number(row.accesses_sam, '.3g', share)} ({_number(row.accesses_with_base, '.3g', share)})",
                _number(row.gb_per_s, ".1f"),
                _number(row.percent_of_copy, ".0f"),
                _mebibytes(row.peak_extra_bytes),
                f"{row.rounds_kept}+{row.rounds_discarded}{' NOISY' if row.noisy else ''}",
            )
        console.print(table)


def print_targets(console: Console, judged: list[Target]) -> None:
    """Required beside reached. A ratio that fell short stands in the table like the others."""
    if not judged:
        return
    split = any(target.micro_batches > 1 for target in judged)
    table = Table(title="required ratios, SGD, x ours", title_justify="left")
    for column in ("set", "variant"):
        table.add_column(column)
    for column in (*(("micro-batches",) if split else ()), "required", "reached", ""):
        table.add_column(column, justify="right")
    for target in judged:
        colour = {"PASS": "green", "short": "red"}.get(target.verdict, "yellow")
        table.add_row(
            target.set,
            target.variant,
            *((str(target.micro_batches),) if split else ()),
            f"{target.required:.2f}",
            _number(target.reached, ".2f"),
            f"[{colour}]{target.verdict}[/{colour}]",
        )
    console.print(table)


def print_end_to_end(console: Console, rows: list[dict[str, Any]], over: str = "over twice SGD") -> None:
    """Whole training steps; `over` says what the percentages compare with."""
    for net in dict.fromkeys(row["net"] for row in rows):
        chosen = [row for row in rows if row["net"] == net]
        table = Table(title=f"end to end: {chosen[0]['title']}, {chosen[0]['threads']} threads", title_justify="left")
        for column in ("optimizer", "ms per step", "quartiles", f"{chosen[0]['unit']}/s", over, "rounds"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in chosen:
            if row["reason"] is not None:
                table.add_row(row["optimizer"], f"[yellow]{row['reason']}[/yellow]")
                continue
            percent = row["over_twice_base_percent"]
            table.add_row(
                row["optimizer"],
                f"{row['median_ms']:.3f}",
                f"{row['q1_ms']:.3f}..{row['q3_ms']:.3f}",
                f"{row['units_per_s']:.0f}",
                "-" if percent is None else f"{percent:+.1f} %",
                f"{row['rounds_kept']}+{row['rounds_discarded']}{' NOISY' if row['noisy'] else ''}",
            )
        console.print(table)
