"""Publishes a run: `python -m benchmarks.readme [JSON]` copies its files to `benchmarks/results/published` and into its pages.

Without an argument that is the run of `benchmarks.throughput`; `micro-batch-2threads.json`, `late-switch-2threads.json` and
`ascents-2threads.json` beside it are the others. These figures are never typed: `tests/test_readme.py` and
`tests/benchmarks/test_bench_readme.py` hold the README and `docs/choosing.md` to the published files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ascents import ascents_section
from benchmarks.cases import SETS
from benchmarks.late_switch import late_switch_section
from benchmarks.micro_batch_readme import micro_batch_section
from benchmarks.report import ratio_cell, set_title

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2threads.json"
PUBLISHED = RESULTS.parent / "published"

# Columns of the SGD table: a variant and its heading.
COLUMNS = {
    "naive": "naive SAM",
    "pytorch_optimizer_foreach": "pytorch_optimizer 4.1 foreach",
    "foreach_inplace": "foreach in place",
    "foreach_swap": "foreach, `p.data` swapped",
    "torch_compile": "torch.compile",
}
ADAMW_COLUMNS = {"naive": "naive SAM", "foreach_inplace": "foreach in place"}
OURS = "ours_native_first_second"


def _rows(report: dict[str, Any], base: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["set"], row["variant"]): row for row in report["rows"] if row["base"] == base}


def _table(report: dict[str, Any], base: str, columns: dict[str, str]) -> list[str]:
    rows = _rows(report, base)
    required = {(target["set"], target["variant"]): target["required"] for target in report["targets"]} if base == "sgd" else {}
    lines = [f"| {base.upper() if base == 'sgd' else 'AdamW'} | sam_fused, ms | {' | '.join(columns.values())} |"]
    lines.append("| --- |" + " --- |" * (1 + len(columns)))
    for name in dict.fromkeys(row["set"] for row in report["rows"]):
        ours = rows.get((name, OURS))
        if ours is None:
            continue
        cells = [ratio_cell(rows.get((name, variant)), required.get((name, variant))) for variant in columns]
        lines.append(f"| {set_title(SETS[name])} | {ours['median_ms']:.3g} | {' | '.join(cells)} |")
    return lines


def _end_to_end(report: dict[str, Any]) -> list[str]:
    lines = [
        "| whole training step | base step, ms | naive SAM | foreach in place | sam_fused |",
        "| --- | --- | --- | --- | --- |",
    ]
    for net in dict.fromkeys(row["net"] for row in report["end_to_end"]):
        rows = {row["optimizer"]: row for row in report["end_to_end"] if row["net"] == net}
        cells = [
            f"{rows[name]['units_per_s']:.0f} {rows[name]['unit']}/s ({rows[name]['over_twice_base_percent']:+.0f} %)"
            for name in ("naive_sam", "foreach_inplace_sam", "sam_fused")
        ]
        threads = rows["sgd"]["threads"]
        title = f"{rows['sgd']['title']}, {threads} thread{'s' if threads > 1 else ''}"
        lines.append(f"| {title} | {rows['sgd_fused']['median_ms']:.3g} | {' | '.join(cells)} |")
    return lines


def section(report: dict[str, Any]) -> str:
    """The Markdown between the two marks."""
    machine, run = report["machine"], report["run"]
    foreach = ", ".join(
        f"{SETS[target['set']].title} {target['reached']:.1f}x"
        for target in report["targets"]
        if target["variant"] == "naive / our foreach backend" and target["reached"] is not None
    )
    copies = ", ".join(
        f"{SETS[key.split()[0]].title} {figures['copy_gb_per_s']:.0f}"
        for key, figures in report["yardsticks"].items()
        if key.endswith("sgd")
    )
    lines = [
        f"How many times as long as sam_fused's `first_step` + `second_step` the optimizer side of one SAM step takes, fp32, "
        f"{machine['torch_threads']} threads, medians of alternating rounds. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['os']}, torch {machine['torch']}; `{run['command']}`; {run['rounds_kept']} rounds kept, "
        f"{run['rounds_discarded']} discarded as noisy. A ratio short of this project's goal has the goal beside it.",
        "",
        *_table(report, "sgd", COLUMNS),
        "",
        *_table(report, "adamw", ADAMW_COLUMNS),
        "",
        *_end_to_end(report),
        "",
        "In per cent: what the step costs over two fused base steps. A copy of buffers of the set's size ran, in this run, at "
        f"{copies} GB/s. The `foreach` backend, without a compiler, against naive SAM: {foreach}. All that was measured, "
        "with quartiles, element accesses and peak memory: `benchmarks/results/published/cpu-2threads.json`, `.csv`, `.png`.",
    ]
    return "\n".join(lines)


FORMS = {
    "ours_native_first_second": "`first_step`, `second_step`",
    "ours_native_closure": "`step(closure)`, which clears the gradients, too",
    "ours_native_perturbed": "`perturbed()`, whose exit restores",
}


def forms_section(report: dict[str, Any]) -> str:
    """The Markdown of `docs/choosing.md` about the forms of a step."""
    machine, rows = report["machine"], _rows(report, "sgd")
    names = list(dict.fromkeys(row["set"] for row in report["rows"]))
    lines = [
        f"Milliseconds of the optimizer side of a step, SGD with momentum, fp32, {machine['torch_threads']} threads, "
        f"{machine['cpu']}, {machine['cores']} cores; `{report['run']['command']}`:",
        "",
        f"| | accesses of SAM | {' | '.join(set_title(SETS[name]) for name in names)} |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for variant, title in FORMS.items():
        cells = [f"{rows[name, variant]['median_ms']:.3g}" for name in names]
        lines.append(f"| {title} | {rows[names[0], variant]['accesses_sam']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`benchmarks/results/published/{RESULTS.stem}.json` has the quartiles."])


@dataclass(frozen=True)
class Section:
    """A part of a page between `<!-- name:begin -->` and `<!-- name:end -->`, the benchmark and the file that it is from."""

    name: str
    benchmark: str
    stem: str
    render: Callable[[Any], str]
    files: tuple[str, ...] = (".csv", ".png")  # beside the JSON
    page: str = "README.md"

    def published(self) -> Any:
        """The published report, or None where none has been published yet."""
        path = PUBLISHED / f"{self.stem}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


CHOOSING = "docs/choosing.md"
MEASURED = Section("measured", "throughput", RESULTS.stem, section)
FORMS_OF_A_STEP = Section("forms", "throughput", RESULTS.stem, forms_section, page=CHOOSING)
MICRO_BATCH = Section(
    "micro-batch", "micro_batch", "micro-batch-2threads", micro_batch_section, (".csv", ".png", "-growth.png")
)
LATE_SWITCH = Section("late-switch", "late_switch", "late-switch-2threads", late_switch_section, (), CHOOSING)
ASCENTS = Section("ascents", "ascents", "ascents-2threads", ascents_section, (), CHOOSING)
SECTIONS = (MEASURED, FORMS_OF_A_STEP, MICRO_BATCH, LATE_SWITCH, ASCENTS)


def rewritten(page: str, report: Any, part: Section = MEASURED) -> str:
    """The page with the section between its marks replaced."""
    begin, end = f"<!-- {part.name}:begin -->", f"<!-- {part.name}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part.render(report)}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    path = Path(given[0]) if given else RESULTS
    report = json.loads(path.read_text(encoding="utf-8"))
    benchmark = report["run"]["command"].split()[2].removeprefix("benchmarks.")
    PUBLISHED.mkdir(exist_ok=True)
    for part in (part for part in SECTIONS if part.benchmark == benchmark):
        for suffix in (".json", *part.files):
            shutil.copyfile(path.with_name(path.stem + suffix), PUBLISHED / f"{part.stem}{suffix}")
        page = ROOT / part.page
        page.write_text(rewritten(page.read_text(encoding="utf-8"), report, part), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
