"""Measured tables are written from published files, and `make bench` prints both benchmarks."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.micro_batch_readme import NOT_PUBLISHED, micro_batch_section
from benchmarks.readme import MICRO_BATCH, SECTIONS, rewritten
from tools import dev

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", SECTIONS, ids=lambda part: part.name)
def test_the_readme_says_what_was_published_and_nothing_else(part: Any) -> None:
    report, page = part.published(), (ROOT / part.page).read_text(encoding="utf-8")
    assert rewritten(page, report, part) == page
    if report is not None:
        assert not report["machine"]["git_modified"] and "--" not in report["run"]["command"]


def micro_batch_report() -> dict[str, Any]:
    def row(name: str, count: int, variant: str, ms: float, ratio: float | None) -> dict[str, Any]:
        return {"set": name, "micro_batches": count, "variant": variant, "median_ms": ms, "ratio_to_ours": ratio}

    def net(optimizer: str, ms: float, over: float | None) -> dict[str, Any]:
        shared = {"net": "n", "title": "Net, 4 micro-batches", "unit": "images", "threads": 2}
        return {**shared, "optimizer": optimizer, "median_ms": ms, "units_per_s": 32e3 / ms, "over_twice_base_percent": over}

    ours = "ours_native_closure"
    rows = [row("tiny", count, ours, 2.0 * count, 1.0) for count in (4, 32)]
    rows += [row("tiny", count, "naive", 16.0 * count, 7.996) for count in (4, 32)]
    rows.append(row("tiny", 4, "foreach_swap", 6.0, 3.0))
    memory = [
        {"set": name, "parameters": p, "dtype": dtype, "micro_batches": k, "variant": ours, "bytes_per_parameter": b + extra}
        for name, p, extra in (("tiny", 10, 0.3), ("resnet50", 99, 0.001))
        for dtype, b in (("fp32", 8.0), ("bf16", 6.0))
        for k in (4, 32)
    ]
    return {
        "run": {"command": "python -m benchmarks.micro_batch", "headline": ours, "rounds_kept": 11, "rounds_discarded": 2},
        "machine": {"torch_threads": 2, "cpu": "CPU", "cores": 2, "os": "Linux", "torch": "2.13.0"},
        "rows": rows,
        "targets": [
            {"set": "tiny", "micro_batches": k, "variant": v, "required": r}
            for k in (4, 32)
            for v, r in (("naive", 8.0), ("foreach_swap", 3.0))
        ],
        "growth": [
            {"set": "tiny", "variant": ours, "micro_batches": [1, 32], "r_squared": 0.99987},
            {"set": "tiny", "variant": "naive", "micro_batches": [1, 32], "r_squared": 0.5},
        ],
        "memory": memory,
        "end_to_end": [
            net("sgd_fused_accumulation", 10.0, None),
            net("naive_msam", 25.0, 25.0),
            net("foreach_inplace_msam", 22.0, 10.0),
            net("foreach_swap_msam", 22.0, 10.0),
            net("sam_fused", 20.4, 2.0),
        ],
    }


def test_the_section_holds_every_count_with_goals_where_a_ratio_falls_short() -> None:
    text = micro_batch_section(micro_batch_report())
    assert "11 rounds kept, 2 discarded" in text
    assert "| 120 tiny tensors, 0.172 M parameters | 4 | 2 | 8.00x (goal 8x) | - | 3.00x |" in text
    assert "| 120 tiny tensors, 0.172 M parameters | 32 | 2 | 8.00x (goal 8x) | - | - |" in text
    assert "| Net, 4 micro-batches, 2 threads | 10 | 1280 images/s (+25 %) |" in text and "1569 images/s (+2 %) |" in text
    assert "from 1 to 32, on a straight line: R² = 0.9999 (120 tiny tensors)." in text
    # Of the set whose tables of addresses weigh nothing.
    assert "ResNet-50, K = 4, 32: 8.00 bytes per fp32 parameter, 6.00 per bf16 parameter" in text


def test_memory_that_grows_with_the_count_would_be_seen() -> None:
    report = micro_batch_report()
    report["memory"][5]["bytes_per_parameter"] = 12.0
    assert "8.00, 12.00 bytes per fp32 parameter" in micro_batch_section(report)


def test_nothing_published_is_said() -> None:
    assert micro_batch_section(None) == NOT_PUBLISHED


def test_publishing_copies_the_files_and_rewrites_its_section_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n<!-- measured:begin -->\nb\n<!-- measured:end -->\n<!-- micro-batch:begin -->\nc\n<!-- micro-batch:end -->\nd\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PUBLISHED", tmp_path / "published")
    assert MICRO_BATCH.published() is None
    stem = tmp_path / "micro-batch-2threads-partial"
    stem.with_suffix(".json").write_text(json.dumps(micro_batch_report()))
    for suffix in (".csv", ".png", "-growth.png"):
        stem.with_name(stem.name + suffix).write_text(suffix)
    assert readme.main([str(stem.with_suffix(".json"))]) == 0
    found = (tmp_path / "README.md").read_text()
    assert found == text.replace("\nc\n", f"\n{micro_batch_section(micro_batch_report())}\n")
    names = {path.name: path.read_text() for path in (tmp_path / "published").iterdir()}
    assert set(names) == {f"micro-batch-2threads{suffix}" for suffix in (".json", ".csv", ".png", "-growth.png")}
    assert names["micro-batch-2threads-growth.png"] == "-growth.png" and MICRO_BATCH.published() == micro_batch_report()


@pytest.mark.parametrize(
    ("extra", "status", "modules"),
    [
        ([], 0, ["benchmarks.throughput", "benchmarks.micro_batch"]),
        (["--full"], 0, ["benchmarks.throughput"]),
        ([], 3, ["benchmarks.throughput"]),
    ],
)
def test_make_bench_goes_on_with_micro_batches_in_brief(
    extra: list[str], status: int, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []

    class Here:
        def run(self, *command: str) -> int:
            ran.append(command)
            return status

    monkeypatch.setattr(dev, "prepare", lambda extras: Here())
    for name in ("install_peers", "ensure_built"):
        monkeypatch.setattr(dev, name, lambda environment: None)
    assert dev.bench(extra) == status
    assert [command[1] for command in ran] == modules
    assert ran[0][2:] == tuple(extra) and ran[-1][2:] in ((), ("--brief",), ("--full",))
