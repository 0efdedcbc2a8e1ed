"""The README's section about micro-batch SAM, out of a report of `benchmarks.micro_batch`."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import SETS
from benchmarks.report import ratio_cell, set_title

COLUMNS = {
    "naive": "naive mSAM",
    "foreach_inplace": "foreach in place",
    "foreach_swap": "foreach, `p.data` swapped",
}
END_TO_END = {
    "naive_msam": "naive mSAM",
    "foreach_inplace_msam": "foreach in place",
    "foreach_swap_msam": "foreach, `p.data` swapped",
    "sam_fused": "sam_fused",
}
NOT_PUBLISHED = "Micro-batch SAM has not been measured on a quiet machine yet: `python -m benchmarks.micro_batch`."


def micro_batch_section(report: dict[str, Any] | None) -> str:
    """The Markdown between the two marks; one sentence where nothing has been published."""
    if report is None:
        return NOT_PUBLISHED
    machine, run = report["machine"], report["run"]
    lines = [
        "Micro-batch SAM: how many times as long as `MicroBatchSAM.step(closure, *batch)` the optimizer side of a step of K "
        f"micro-batches takes, fp32, SGD, {machine['torch_threads']} threads, medians of alternating rounds; the clearing of "
        f"gradients and the base step are in it. {machine['cpu']}, {machine['cores']} cores, {machine['os']}, torch "
        f"{machine['torch']}; `{run['command']}`; {run['rounds_kept']} rounds kept, {run['rounds_discarded']} discarded as "
        "noisy. A ratio short of this project's goal has the goal beside it.",
        "",
        *_ratios(report),
        "",
        *_end_to_end(report),
        "",
        "In per cent: what the step costs over two steps of plain accumulation over the same micro-batches. "
        f"{_growth(report)} {_memory(report)} All that was measured: "
        "`benchmarks/results/published/micro-batch-2threads.json`, `.csv`, `.png` and `-growth.png`.",
    ]
    return "\n".join(lines)


def _ratios(report: dict[str, Any]) -> list[str]:
    rows = {(row["set"], row["micro_batches"], row["variant"]): row for row in report["rows"]}
    required = {(t["set"], t["micro_batches"], t["variant"]): t["required"] for t in report["targets"]}
    lines = [f"| SGD | K | sam_fused, ms per micro-batch | {' | '.join(COLUMNS.values())} |"]
    lines.append("| --- |" + " --- |" * (2 + len(COLUMNS)))
    for name, count in dict.fromkeys((row["set"], row["micro_batches"]) for row in report["rows"]):
        ours = rows[name, count, report["run"]["headline"]]
        keys = [(name, count, variant) for variant in COLUMNS]
        cells = [ratio_cell(rows.get(key), required.get(key)) for key in keys]
        lines.append(f"| {set_title(SETS[name])} | {count} | {ours['median_ms'] / count:.3g} | {' | '.join(cells)} |")
    return lines


def _end_to_end(report: dict[str, Any]) -> list[str]:
    lines = [f"| whole training step | accumulation, ms | {' | '.join(END_TO_END.values())} |"]
    lines.append("| --- |" + " --- |" * (1 + len(END_TO_END)))
    for net in dict.fromkeys(row["net"] for row in report["end_to_end"]):
        rows = {row["optimizer"]: row for row in report["end_to_end"] if row["net"] == net}
        cells = [
            f"{rows[name]['units_per_s']:.0f} {rows[name]['unit']}/s ({rows[name]['over_twice_base_percent']:+.0f} %)"
            for name in END_TO_END
        ]
        base = rows["sgd_fused_accumulation"]
        threads = f"{base['threads']} thread{'s' if base['threads'] > 1 else ''}"
        lines.append(f"| {base['title']}, {threads} | {base['median_ms']:.3g} | {' | '.join(cells)} |")
    return lines


def _growth(report: dict[str, Any]) -> str:
    lines = [line for line in report["growth"] if line["variant"] == report["run"]["headline"]]
    counts = lines[0]["micro_batches"]
    found = ", ".join(f"{line['r_squared']:.4f} ({SETS[line['set']].title})" for line in lines)
    return f"Our step's time against K, from {counts[0]} to {counts[-1]}, on a straight line: R² = {found}."


def _memory(report: dict[str, Any]) -> str:
    """Bytes per parameter in the largest set, whose tables weigh nothing, with every K."""
    rows = [row for row in report["memory"] if row["variant"] == report["run"]["headline"]]
    largest = max(rows, key=lambda row: row["parameters"])["set"]

    def cells(dtype: str) -> str:
        found = [f"{row['bytes_per_parameter']:.2f}" for row in rows if (row["set"], row["dtype"]) == (largest, dtype)]
        return found[0] if len(set(found)) == 1 else ", ".join(found)

    counts = ", ".join(map(str, dict.fromkeys(row["micro_batches"] for row in rows)))
    return (
        f"Peak memory beside parameters, gradients and the base's state, {SETS[largest].title}, K = {counts}: {cells('fp32')} "
        f"bytes per fp32 parameter, {cells('bf16')} per bf16 parameter."
    )
