"""The command line: what it plans, and one smoke run of the real command."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import throughput
from benchmarks.report import REQUIRED, Row
from benchmarks.throughput import file_stem, parser, plan

ROOT = Path(__file__).resolve().parents[2]


def test_default_plan_holds_every_required_ratio() -> None:
    steps = {(set_name, base): [v.name for v in chosen] for set_name, base, chosen in plan(parser().parse_args([]))}
    for set_name, required in REQUIRED.items():
        assert set(required) <= set(steps[set_name, "sgd"])
        assert {"naive", "foreach_inplace"} <= set(steps[set_name, "adamw"])
    assert "ours_reference_first_second" in steps["tiny", "sgd"]
    assert "ours_reference_first_second" not in steps["resnet50", "sgd"]


def test_full_plan_holds_every_set_with_both_bases() -> None:
    steps = {(set_name, base): chosen for set_name, base, chosen in plan(parser().parse_args(["--full"]))}
    assert len(steps) == 10
    assert all("torch_compile" in [variant.name for variant in chosen] for chosen in steps.values())


def test_only_a_default_run_writes_the_published_name() -> None:
    stems = [
        file_stem(parser().parse_args(line.split()))
        for line in ("", "--threads 4", "--full", "--smoke", "--sets tiny", "--bases sgd", "--nets", "--variants naive")
    ]
    assert stems[:4] == ["cpu-2threads", "cpu-4threads", "cpu-2threads-full", "cpu-2threads-smoke"]
    assert set(stems[4:]) == {"cpu-2threads-partial"}


@pytest.mark.parametrize("line", ["--threads 0", "--rounds -1", "--seconds 0", "--full --smoke", "--sets imagenet"])
def test_a_wrong_argument_ends_with_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        throughput.main(line.split())
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_smoke_run_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.throughput", "--smoke", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "cpu-1threads-smoke"
    report = json.loads(stem.with_suffix(".json").read_text())

    run, machine = report["run"], report["machine"]
    assert run["command"].startswith("python -m benchmarks.throughput --smoke --threads 1")
    assert run["rounds_kept"] + run["rounds_discarded"] > 0
    assert f"{run['rounds_kept']} rounds kept, {run['rounds_discarded']} discarded" in done.stdout
    assert {"cpu", "cores", "l3_bytes", "memory_bytes", "os", "python", "torch", "sam_fused", "git_commit"} <= set(machine)
    assert machine["torch_threads"] == 1

    rows = {row["variant"]: row for row in report["rows"]}
    measured = [row for row in rows.values() if row["reason"] is None]
    assert {"naive", "foreach_inplace", "foreach_swap", "ours_foreach_first_second"} <= {row["variant"] for row in measured}
    copy = report["yardsticks"]["smoke sgd"]["copy_gb_per_s"]
    for row in measured:
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert 0 < row["ratio_q1"] <= row["ratio_to_ours"] <= row["ratio_q3"]
        assert row["threads"] == 1 and row["rounds_kept"] + row["rounds_discarded"] > 0
        assert row["noisy"] is (row["rounds_kept"] == 0)
        assert row["peak_extra_bytes"] >= 4 * row["parameters"]  # every form holds one copy, of w or of w + e
        if row["accesses_with_base"] is not None:
            moved = 4 * row["parameters"] * row["accesses_with_base"]
            assert row["gb_per_s"] == pytest.approx(moved / row["median_ms"] / 1e6)
            assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / copy)
    assert all(row["reason"] for row in rows.values() if row["median_ms"] is None)

    net = {row["optimizer"]: row for row in report["end_to_end"]}
    assert set(net) == {"sgd", "sgd_fused", "naive_sam", "foreach_inplace_sam", "sam_fused"}
    assert all(row["threads"] == 1 and row["units_per_s"] > 0 for row in net.values())
    assert net["sgd"]["over_twice_base_percent"] is None and net["sam_fused"]["over_twice_base_percent"] is not None

    with stem.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == [row["variant"] for row in report["rows"]]
    assert list(lines[0]) == list(Row.__dataclass_fields__)
    assert float(lines[1]["median_ms"]) == report["rows"][1]["median_ms"]
    assert stem.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
