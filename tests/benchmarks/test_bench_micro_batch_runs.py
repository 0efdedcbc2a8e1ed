"""How micro-batch SAM grows in time and memory, whole training steps, and the command that measures it all."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import micro_batch
from benchmarks.cases import DEFAULT_SETS, SETS
from benchmarks.endtoend import Step
from benchmarks.micro_batch import REQUIRED, file_stem, parser, plan
from benchmarks.micro_batch_endtoend import contest, pieces
from benchmarks.micro_batch_growth import COUNTS, fit, measure_growth
from benchmarks.micro_batch_memory import measure_low_memory, measure_memory, summing_in_grad, wide_mlp
from benchmarks.micro_batch_variants import headline, ours
from benchmarks.nets import NETS, Task
from benchmarks.report import Row, targets
from benchmarks.suite import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]


def assert_close(reached: list[Tensor], wanted: list[Tensor]) -> None:
    for here, there in zip(reached, wanted, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-6)


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_a_line_is_fitted_and_a_curve_is_not_one() -> None:
    assert fit([1, 2, 4], [3, 5, 9]) == pytest.approx((2.0, 1.0, 1.0))
    assert fit([1, 2, 3], [1.0, 2.0, 2.0]) == pytest.approx((0.5, 2 / 3, 0.75))
    assert fit(COUNTS, [count**2 for count in COUNTS])[2] < 0.95 < 0.999 < fit(COUNTS, [3 * c + 1 for c in COUNTS])[2]


def test_growth_measures_each_count_with_the_chosen_form() -> None:
    said: list[str] = []
    settings = Settings(rounds=1, seconds=1.0, block_seconds=0.001)
    lines = measure_growth(SETS["smoke"], "sgd", {"foreach_swap": "kept copies"}, settings, (1, 12), said.append)
    assert [line.variant for line in lines] == [headline(1).name, "naive", "foreach_inplace", "foreach_swap"]
    assert [line.form for line in lines][2:] == ["fresh sums", "kept copies"]
    assert len(said) == 2
    for line in lines:
        assert line.micro_batches == [1, 12] and line.ms[1] > line.ms[0] > 0
        assert line.slope_ms == pytest.approx((line.ms[1] - line.ms[0]) / 11) and line.r_squared == pytest.approx(1.0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_ours_holds_a_backup_and_fp32_sums_whatever_the_number_of_micro_batches() -> None:
    if ours("native", "closure", 1).why_not() is not None:
        pytest.skip("the foreach backend has temporaries of its own")
    rows = measure_memory(SETS["smoke"], "sgd", [2, 9], 0)
    parameters, largest = SETS["smoke"].parameters, max(map(prod, SETS["smoke"].shapes()))
    per_parameter = {
        ("fp32", "ours_native_closure"): 4 + 4,
        ("fp32", "ours_native_micro_batch"): 4 + 4,
        ("bf16", "ours_native_closure"): 2 + 4,
        ("bf16", "ours_native_micro_batch"): 2 + 4 + 2,  # `.grad` shows the sums in the parameters' dtype
    }
    assert {(row.dtype, row.variant) for row in rows} == set(per_parameter)
    for row in rows:
        held = per_parameter[row.dtype, row.variant] * parameters
        # By hand what `.grad` holds is compared with the sum's rounding, a tensor at a time.
        compared = 8 * largest if (row.dtype, row.variant) == ("bf16", "ours_native_micro_batch") else 0
        # Cache-line gaps, tables of addresses and scalars are on top.
        assert held <= row.extra_bytes < held + 8192 + compared
        assert row.bytes_per_parameter == row.extra_bytes / parameters
    for key in per_parameter:
        few, many = (row.extra_bytes for row in rows if (row.dtype, row.variant) == key)
        assert abs(many - few) < 1024


def trained(task: Task, make: Callable[[Task], Step]) -> list[Tensor]:
    step = make(task)
    for _ in range(3):
        step()
    return [p.detach().double() for p in task.model.parameters()]


def seeded(make: Callable[[], Task]) -> Task:
    torch.manual_seed(0)
    return make()


def test_the_prototype_without_accumulators_is_micro_batch_sam_and_needs_as_much_memory() -> None:
    def make() -> Task:
        return wide_mlp(torch.float32)

    wanted = trained(seeded(make), contest(4).optimizers["sam_fused"])
    assert_close(trained(seeded(make), lambda task: summing_in_grad(task, 4)), wanted)
    wide, halves = measure_low_memory(0, ["wide_mlp", "wide_mlp_bf16"])
    assert wide.sums_in_grad_peak_bytes == pytest.approx(wide.accumulators_peak_bytes, rel=0.02)
    # Momentum, backup, sums, gradients; in halves the accumulators alone have four bytes.
    assert wide.accumulators_peak_bytes == pytest.approx(4 * wide.parameter_bytes, rel=0.1)
    assert halves.accumulators_peak_bytes == pytest.approx(5 * halves.parameter_bytes, rel=0.1)
    assert halves.sums_in_grad_peak_bytes == pytest.approx(4 * halves.parameter_bytes, rel=0.1)


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_whole_training_steps_of_all_forms_reach_the_same_weights() -> None:
    """And the base, which perturbs nothing, other ones: it is timed with the same micro-batches."""
    steps = contest(4).optimizers
    found = {name: trained(seeded(NETS["tiny_mlp"].make), make) for name, make in steps.items()}
    plain = found.pop("sgd_fused_accumulation")
    wanted = found["sam_fused"]
    for weights in found.values():
        assert_close(weights, wanted)
    assert max((a - b).abs().max() for a, b in zip(plain, wanted, strict=True)) > 1e-4


def test_pieces_are_the_batch_in_equal_parts() -> None:
    task = seeded(NETS["encoder"].make)
    parts = list(pieces(task, 4))
    assert [tuple(part.shape) for part in parts[0]] == [(8, 32), (8,)]
    assert all(
        torch.equal(torch.cat(column), whole) for column, whole in zip(zip(*parts, strict=True), task.batch, strict=True)
    )
    loss = task.loss(task.model, *task.batch)
    loss.backward()
    assert loss.ndim == 0 and all(p.grad is not None for p in task.model.parameters())


# ---- the command -----------------------------------------------------------------------------------------------------


def test_default_plan_holds_every_required_ratio_at_every_count() -> None:
    steps = {(name, count): [v.name for v in chosen] for name, count, chosen in plan(parser().parse_args([]))}
    assert set(REQUIRED) == set(DEFAULT_SETS) and set(steps) == {(name, k) for name in REQUIRED for k in (4, 8, 32)}
    for (name, _), chosen in steps.items():
        assert set(REQUIRED[name]) <= set(chosen) and "ours_native_micro_batch" in chosen
    assert next(iter(steps))[0] == "tiny"


def test_a_brief_plan_is_one_count_and_the_baselines() -> None:
    steps = plan(parser().parse_args(["--brief"]))
    assert [(name, count) for name, count, _ in steps] == [("tiny", 8), ("lora", 8), ("resnet50", 8)]
    assert {variant.name for _, _, chosen in steps for variant in chosen} == {"naive", "foreach_inplace", "foreach_swap"}


def test_only_a_default_run_writes_the_published_name() -> None:
    lines = ("", "--threads 4", "--brief", "--smoke", "--sets tiny", "--counts 4", "--nets", "--variants naive --brief")
    stems = [file_stem(parser().parse_args(line.split())) for line in lines]
    assert stems[:2] == ["micro-batch-2threads", "micro-batch-4threads"]
    assert stems[2:4] == ["micro-batch-2threads-brief", "micro-batch-2threads-smoke"]
    assert set(stems[4:]) == {"micro-batch-2threads-partial"}


@pytest.mark.parametrize("line", ["--threads 0", "--counts 4 0", "--seconds -1", "--brief --smoke", "--sets imagenet"])
def test_a_wrong_argument_ends_with_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        micro_batch.main(line.split())
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_ratio_is_judged_at_every_count() -> None:
    def row(count: int, ratio: float) -> Row:
        return Row("tiny", "sgd", "naive", "naive", "f", "phases", "torch", 1, 1, 2, micro_batches=count, ratio_to_ours=ratio)

    judged = [t for t in targets([row(4, 8.0), row(8, 7.9)], REQUIRED) if t.variant == "naive"]
    assert [(t.micro_batches, t.required, t.verdict) for t in judged] == [(4, 8.0, "PASS"), (8, 8.0, "short")]


def test_smoke_run_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.micro_batch", "--smoke", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "micro-batch-1threads-smoke"
    report = json.loads(stem.with_suffix(".json").read_text())
    run = report["run"]
    assert run["command"] == f"python -m benchmarks.micro_batch --smoke --threads 1 --output {tmp_path}"
    assert run["headline"] == headline(1).name and report["machine"]["torch_threads"] == 1
    assert f"{run['rounds_kept']} rounds kept, {run['rounds_discarded']} discarded" in done.stdout

    rows = {(row["micro_batches"], row["variant"]): row for row in report["rows"]}
    variants = {"naive", "foreach_inplace", "foreach_swap", "ours_foreach_closure", run["headline"]}
    for count in (2, 3):
        ours_row = rows[count, run["headline"]]
        # The table's time is the step's over K.
        assert f"│ {ours_row['median_ms'] / count:.3f} │" in done.stdout
        assert ours_row["ratio_to_ours"] == 1.0
        copy = report["yardsticks"][f"smoke sgd {count}"]["copy_gb_per_s"]
        for variant in variants:
            row = rows[count, variant]
            assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["noisy"] is (row["rounds_kept"] == 0)
            assert 0 < row["ratio_q1"] <= row["ratio_to_ours"] <= row["ratio_q3"]
            # A copy of the weights and the sums, whatever the form.
            assert row["peak_extra_bytes"] >= 2 * 4 * row["parameters"]
            if row["accesses_with_base"] is not None:
                moved = 4 * row["parameters"] * row["accesses_with_base"]
                assert row["gb_per_s"] == pytest.approx(moved / row["median_ms"] / 1e6)
                assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / copy)
        assert set(rows[count, "foreach_swap"]["trials_ms"]) == {"fresh copies", "kept copies", "out= loops"}

    assert {line["variant"] for line in report["growth"]} == variants - {"ours_foreach_closure"} | {run["headline"]}
    assert all(line["micro_batches"] == [1, 2, 4] and line["r_squared"] <= 1 for line in report["growth"])
    assert {(row["dtype"], row["micro_batches"]) for row in report["memory"]} == {
        (d, k) for d in ("fp32", "bf16") for k in (2, 3)
    }
    assert [row["net"] for row in report["low_memory"]] == ["wide_mlp"]
    net = {row["optimizer"]: row for row in report["end_to_end"]}
    assert set(net) == set(contest(4).optimizers)
    assert net["sgd_fused_accumulation"]["over_twice_base_percent"] is None
    for row in net.values():
        assert row["median_ms"] > 0 and row["title"].endswith(", 4 micro-batches")

    with stem.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == [row["variant"] for row in report["rows"]]
    assert list(lines[0]) == list(Row.__dataclass_fields__)
    for suffix in (".png", "-growth.png"):
        assert stem.with_name(stem.name + suffix).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
