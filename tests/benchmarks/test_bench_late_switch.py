"""Whole runs with SAM late: what is timed, that every run is the same run of a net that trains, and the table it gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import late_switch
from benchmarks.late_switch import NOT_PUBLISHED, STARTS, TITLES, BaseRuns, SAMRuns, late_switch_section, measure
from benchmarks.nets import NETS, Task
from benchmarks.readme import LATE_SWITCH

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8


def counted() -> tuple[Task, list[int]]:
    """A net of two layers with batch norm, and how often its loss was asked for."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    calls: list[int] = []

    def loss(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return torch.nn.functional.cross_entropy(model(x), y)

    return Task(model, (torch.randn(12, 6), torch.randint(0, 3, (12,))), loss), calls


def runs_of(name: str, task: Task) -> Any:
    return BaseRuns(task, STEPS) if name == "base" else SAMRuns(task, STEPS, STARTS[name])


@pytest.mark.parametrize(("name", "gradients"), [("base", 8), ("off", 8), ("late", 10), ("always", 16)])
def test_a_run_has_the_gradients_of_its_name(name: str, gradients: int) -> None:
    task, calls = counted()
    run = runs_of(name, task)
    for _ in range(2):
        calls.clear()
        assert run() > 0 and len(calls) == gradients


@pytest.mark.parametrize("name", TITLES)
def test_every_run_is_the_same_run(name: str) -> None:
    """Weights, running statistics and momentum start again; what has been left of them would show."""
    task, _ = counted()
    run = runs_of(name, task)
    ends = []
    for _ in range(3):
        run()
        ends.append([tensor.clone() for tensor in (*task.model.parameters(), *task.model.buffers())])
    for first, *others in zip(*ends, strict=True):
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(ends[0][0], run._start[0])


def test_sam_that_is_never_on_is_the_base() -> None:
    ends = []
    for name in ("base", "off"):
        task, _ = counted()
        runs_of(name, task)()
        ends.append([p.detach() for p in task.model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TITLES)
def test_a_net_that_does_not_train_is_no_measurement(name: str) -> None:
    task, _ = counted()
    task.batch[0].fill_(torch.inf)
    with pytest.raises(RuntimeError, match="expected a net that trains"):
        runs_of(name, task)()


def test_a_step_without_an_ascent_is_no_step_of_sam() -> None:
    """The first pass of the second step overflows, and the second pass does not: the loss stays finite."""
    task, calls = counted()

    def overflowing(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = task.loss(model, x, y)
        if len(calls) == 3:
            loss.register_hook(lambda grad: grad * torch.inf)
        return loss

    with pytest.raises(RuntimeError, match="expected an ascent in every step"):
        runs_of("always", Task(task.model, task.batch, overflowing))()


def test_rows_are_ratios_to_the_base_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [{"base": 1.0, "late": 1.3, "always": 2.0, "off": 1.0}, {"base": 2.0, "late": 2.4, "always": 4.4, "off": 2.0}]
    monkeypatch.setattr(late_switch, "rounds_of", lambda *_, **__: ([], rounds))
    rows = {row.optimizer: row for row in measure(NETS["tiny_mlp"], 1, 1, 2, 1.0, 0)}
    assert rows["late"].ratio == pytest.approx(1.25) and rows["always"].ratio == pytest.approx(2.1)
    assert (rows["late"].ratio_q1, rows["late"].ratio_q3) == pytest.approx((1.225, 1.275))
    assert rows["late"].noisy and (rows["late"].rounds_kept, rows["late"].rounds_discarded) == (0, 2)


def test_the_command_and_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert late_switch.main(["--smoke", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "late-switch-2threads-smoke.json").read_text(encoding="utf-8"))
    assert {row["optimizer"] for row in report["rows"]} == set(TITLES)
    for row in report["rows"]:
        row.update(ratio=1.31, ratio_q1=1.3, ratio_q3=1.32, rounds_kept=5, rounds_discarded=2, noisy=False)
    text = late_switch_section(report)
    assert "| 1.310 (1.300 to 1.320) | 1.310 (goal 1.27) (1.300 to 1.320) | 1.310 (1.300 to 1.320) | 5 of 7 |" in text
    assert late_switch_section(None) == NOT_PUBLISHED and "python -m benchmarks.late_switch" in NOT_PUBLISHED


def test_the_published_run_reaches_the_goal_where_gradients_are_the_step() -> None:
    """On the two nets whose step is not the host's: SAM over the last quarter, and one that is never on costs nothing."""
    report = LATE_SWITCH.published()
    found = {(row["net"], row["optimizer"]): row for row in report["rows"]}
    assert {net for net, _ in found} == set(late_switch.STEPS) and report["goal"] == 1.27
    for net in ("resnet20", "encoder"):
        assert 1.2 < found[net, "late"]["ratio"] <= 1.27 and found[net, "off"]["ratio"] < 1.02
        assert not any(found[net, name]["noisy"] for name in TITLES)
