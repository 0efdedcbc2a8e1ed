"""`python -m tools.gpu --rehearse`: the orchestration of `make gpu`, without a GPU and in a temporary folder."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import gpu
from tools.gpu_steps import Step, run_step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The results file, the folder and what was printed: one rehearsal serves all tests."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "tools.gpu", "--rehearse", f"--output={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text()), file, done.stdout


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("rehearsal")]


def test_every_step_is_in_the_results(rehearsed):
    report, _, printed = rehearsed
    # The names of a real run's steps, in its order: a rehearsal that left one out would rehearse something else.
    assert [step["name"] for step in report["steps"]] == [step.name for step in gpu.plan({}, Path("unused"), "unused")]
    for number, step in enumerate(report["steps"], 1):
        assert f"{number}/{len(report['steps'])} {step['name']}: {step['status']} in" in printed
        assert step["status"] in ("passed", "not run") and step["command"]
        assert step["reason"] or step["status"] == "passed", "what did not run has a reason"


def test_what_ran_is_counted_and_what_did_not_is_listed(rehearsed):
    report, _, _ = rehearsed
    steps = {step["name"]: step for step in report["steps"]}
    assert steps["ops"]["counts"]["passed"] > 0 and steps["optim"]["counts"]["passed"] > 0
    listed = {(entry["step"], entry["what"]): entry for entry in report["did_not_run"]}
    for name in ("build", "memcheck native", "racecheck native", "memcheck triton"):
        assert "CUDA" in listed[name, name]["reason"]
    skipped = [entry for entry in report["did_not_run"] if entry["step"] == "tests on the card"]
    assert sum(entry["tests"] for entry in skipped) == steps["tests on the card"]["counts"]["skipped"] > 100
    assert all("no CUDA device" in entry["reason"] for entry in skipped)
    assert any("test_graphs::test_replays_are_the_eager_steps" in entry["what"] for entry in skipped)


def test_the_machine_is_described(rehearsed):
    machine = rehearsed[0]["machine"]
    named = {"card", "driver", "memory_bytes", "cuda_runtime", "torch", "triton", "nvcc", "python", "commit", "dirty"}
    assert named <= machine.keys()
    assert machine["torch"] and machine["python"] and rehearsed[0]["rehearsal"] is True
    assert rehearsed[0]["command"].startswith("python -m tools.gpu --rehearse")


def test_measurements_have_a_figure_or_a_reason(rehearsed):
    report, file, _ = rehearsed
    measured = report["measurements"]
    assert measured["rehearsal"] is True and measured["targets"] == [], "targets are a GPU's"
    assert {row["op"] for row in measured["operations"]} >= {"copy", "grad_norm", "perturb_", "restore_sgd_", "restore_adamw_"}
    assert {row["dtype"] for row in measured["steps"]} == {"fp32", "bf16"}
    for row in (*measured["operations"], *measured["steps"]):
        figure = row["ms"] if "ms" in row else row["median_ms"]
        assert (figure is not None and figure > 0) != (row["reason"] is not None), row
    assert all(row["kernels"] is None and row["peak_extra_bytes"] is None for row in measured["steps"]), "no GPU, no figure"
    with file.with_name(f"{file.stem}.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(measured["operations"]) + len(measured["steps"])


# ---- a step ----------------------------------------------------------------------------------------------------------------


def python(code, limit=30.0, **options):
    return Step("a step", (sys.executable, "-c", code), limit, **options)


def test_a_step_that_fails_says_how(tmp_path):
    outcome = run_step(python("print('the cause'); raise SystemExit(3)"), tmp_path, 30.0)
    assert (outcome.status, outcome.reason) == ("failed", "exit status 3") and "the cause" in outcome.output_tail


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_step_beyond_its_limit_is_stopped_with_its_children(tmp_path):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import subprocess, sys; child = {child}; print(child.pid, flush=True); child.wait()"
    outcome = run_step(python(code), tmp_path, 3.0)
    assert outcome.status == "timed out" and outcome.seconds < 20
    assert outcome.did_not_run[0]["reason"] == outcome.reason
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while lives(int(outcome.output_tail)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(int(outcome.output_tail))


def test_a_failing_step_does_not_keep_the_next_from_running(tmp_path, capsys):
    steps = [python("raise SystemExit(1)"), python("print('still here')")]
    assert [outcome.status for outcome in gpu.run_all(steps, tmp_path, 60.0)] == ["failed", "passed"]
    assert "still here" in capsys.readouterr().out


def test_when_the_time_is_up_the_rest_is_listed(tmp_path):
    outcomes = gpu.run_all([python("pass"), python("pass")], tmp_path, 1.0)
    assert [outcome.status for outcome in outcomes] == ["not run"] * 2
    assert all("time was up" in outcome.did_not_run[0]["reason"] for outcome in outcomes)


def test_time_is_kept_for_the_benchmark():
    tests, benchmark = python("pass", 400.0), python("pass", 240.0, is_benchmark=True)
    assert gpu.limit_of(tests, 500.0, benchmark_to_come=True) == 500.0 - gpu.BENCHMARK_SECONDS
    assert gpu.limit_of(benchmark, 500.0, benchmark_to_come=False) == 240.0
    assert sum(step.limit for step in gpu.plan({}, Path("unused"), "unused") if step.is_benchmark) >= gpu.BENCHMARK_SECONDS


def test_without_a_gpu_a_real_run_is_refused_in_one_sentence(capsys, monkeypatch):
    missing = "expected a CUDA device, torch 2.13.0 sees none"
    monkeypatch.setattr(gpu, "describe", lambda: {"unusable": missing, "card": None})
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"tools.gpu: {missing}") and said.endswith(".") and "\n" not in said
