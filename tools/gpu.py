"""`python -m tools.gpu`: builds, tests, checks and measures on the GPU of this machine, within ten minutes.

With the Python that runs it: nothing is installed and no environment is made. Each step has a limit of its own, a step that
fails does not keep the next ones from running, and everything goes into one file, `<card>-<date>.json`: what ran, how that
ended, what did not run and why, and the measurements. The exit status is 0 if nothing failed.

`--rehearse` goes through the same steps without a GPU: what needs one is listed as not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.environment import ROOT
from tools.gpu_machine import describe, find_sanitizer, slug
from tools.gpu_steps import Outcome, Step, run_step

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
SECONDS = 570.0
# Kept for the benchmark, however long the tests take; and what a step gets at least before it is not begun at all.
BENCHMARK_SECONDS, LEAST_SECONDS = 150.0, 10.0
NEEDS_CARD = "needs a CUDA device: this is a rehearsal"

ON_CARD = ("--device=cuda", "--backends=native,triton")
# The same rounding in every run of a matrix product, so that two trainings of one net can be compared bit for bit.
FIXED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# A fresh allocation per tensor, or the sanitizer would take a neighbour's memory for the tensor's own.
NO_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def pytest_step(name: str, limit: float, *arguments: str, processes: int = 0) -> Step:
    """Pytest, in several processes where its plugin for that is there."""
    spread = (f"--numprocesses={processes}", "--dist=loadgroup") if processes and _has("xdist") else ()
    plain = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *spread, *arguments)
    return Step(name, (sys.executable, *plain), limit, variables=FIXED, is_pytest=True)


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def sanitizer_step(tool: str, backend: str, sanitizer: str | None) -> Step:
    suite = (sys.executable, "-m", "tests.gpu.sanitized_suite", backend)
    # torch asks the driver for functions that it may not have; to memcheck each such answer is an error of the program's.
    quiet = ("--report-api-errors=no",) if tool == "memcheck" else ()
    options = (f"--tool={tool}", *quiet, "--error-exitcode=86", "--print-limit=20")
    command = (sanitizer or "compute-sanitizer", *options, *suite)
    reason = None if sanitizer else "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; install the CUDA toolkit's"
    return Step(f"{tool} {backend}", command, 75.0, variables=NO_POOL, not_run=reason)


def plan(machine: dict[str, Any], folder: Path, name: str) -> list[Step]:
    """What runs on a card, in this order."""
    sanitizer = find_sanitizer()
    processes = min(8, max(1, (os.cpu_count() or 2) // 2))
    architecture = {"TORCH_CUDA_ARCH_LIST": machine["capability"]} if machine.get("capability") else {}
    return [
        Step(
            "build",
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            150.0,
            variables={"SAM_FUSED_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 2), **architecture},
        ),
        Step("info", (sys.executable, "-m", "sam_fused.info"), 45.0),
        pytest_step("tests on the card", 180.0, "tests/gpu", processes=processes),
        pytest_step("ops", 150.0, *ON_CARD, "tests/ops", processes=processes),
        pytest_step("optim", 150.0, *ON_CARD, "tests/optim", processes=processes),
        *(sanitizer_step(tool, "native", sanitizer) for tool in ("memcheck", "racecheck")),
        benchmark_step(folder, name),
        sanitizer_step("memcheck", "triton", sanitizer),
    ]


def rehearsal(folder: Path, name: str) -> list[Step]:
    """The same steps over little and on the CPU; what would say nothing there is not run."""
    return [
        Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 150.0, not_run=NEEDS_CARD),
        Step("info", (sys.executable, "-m", "sam_fused.info"), 60.0),
        pytest_step("tests on the card", 120.0, "tests/gpu", "--ignore=tests/gpu/test_rehearsal.py"),
        pytest_step("ops", 120.0, "--backends=foreach", "tests/ops/test_range.py", "-k=rho_zero or by_hand"),
        pytest_step("optim", 120.0, "--backends=foreach", "tests/optim/test_bases.py", "-k=keeps_its_eps"),
        Step("memcheck native", (sys.executable, "-m", "tests.gpu.sanitized_suite", "foreach"), 75.0, not_run=NEEDS_CARD),
        Step("racecheck native", (sys.executable, "-m", "tests.gpu.sanitized_suite", "foreach"), 75.0, not_run=NEEDS_CARD),
        benchmark_step(folder, name, "--rehearse"),
        Step("memcheck triton", (sys.executable, "-m", "tests.gpu.sanitized_suite", "foreach"), 75.0, not_run=NEEDS_CARD),
    ]


def benchmark_step(folder: Path, name: str, *options: str) -> Step:
    command = (sys.executable, "-m", "benchmarks.gpu", f"--output={folder}", f"--name={name}", *options)
    return Step("benchmark", command, 240.0, seconds_option="--seconds", is_benchmark=True)


def limit_of(step: Step, left: float, benchmark_to_come: bool) -> float:
    """The step's own limit, as far as the time goes."""
    return min(step.limit, left - (BENCHMARK_SECONDS if benchmark_to_come and not step.is_benchmark else 0.0))


def run_all(steps: Sequence[Step], folder: Path, seconds: float) -> list[Outcome]:
    """One line when a step begins and one when it has ended."""
    started, outcomes = time.monotonic(), []
    for index, step in enumerate(steps):
        left = seconds - (time.monotonic() - started)
        limit = limit_of(step, left, any(later.is_benchmark for later in steps[index + 1 :]))
        print(f"{index + 1}/{len(steps)} {step.name}: {shlex.join(step.command)}", flush=True)
        if step.not_run is None and limit < LEAST_SECONDS:
            step = step.without(f"the time was up: {max(0.0, left):.0f} s were left")
        outcome = run_step(step, folder, limit)
        outcomes.append(outcome)
        print(f"{index + 1}/{len(steps)} {outcome.line()}", flush=True)
    return outcomes


NEEDED = ("torch", "numpy", "pytest", "pytest_timeout", "hypothesis", "rich", "matplotlib", "setuptools", "ninja")


def _missing() -> str | None:
    """What this Python lacks of what the steps import: better said before the build than after it."""
    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"expected a Python with {', '.join(missing)}, found none in {sys.executable}; pip install {' '.join(missing)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description="Builds, tests and measures on this GPU.")
    parser.add_argument("--rehearse", action="store_true", help="go through the same steps without a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together (default: %(default)s)")
    options = parser.parse_args(given)
    started = time.monotonic()
    machine = describe()
    problem = _missing() or (None if options.rehearse else machine["unusable"])
    if problem is not None:
        print(f"tools.gpu: {problem}.", file=sys.stderr)
        return 2
    name = f"{slug('rehearsal' if options.rehearse else machine['card'])}-{time.strftime('%Y-%m-%d', time.gmtime())}"
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sam_fused-gpu-") as scratch:
        folder = Path(scratch)
        steps = rehearsal(folder, name) if options.rehearse else plan(machine, folder, name)
        outcomes = run_all(steps, folder, options.seconds)
        measurements = _measurements(folder / f"{name}.json")
        for suffix in ("csv", "png"):
            if (made := folder / f"{name}.{suffix}").exists():
                shutil.copy(made, options.output / made.name)
    report = {
        "rehearsal": bool(options.rehearse),
        "command": shlex.join(["python", "-m", "tools.gpu", *given]),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine,
        "steps": [outcome.as_dict() for outcome in outcomes],
        "did_not_run": [entry for outcome in outcomes for entry in outcome.did_not_run],
        "measurements": measurements,
    }
    file = options.output / f"{name}.json"
    file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    failed = [outcome.name for outcome in outcomes if outcome.status in ("failed", "timed out")]
    print(f"{len(report['did_not_run'])} things did not run; they are listed in {file.name}")
    print(f"written: {file}; " + (f"FAILED: {', '.join(failed)}" if failed else "nothing failed"))
    return 1 if failed else 0


def _measurements(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the step says why


if __name__ == "__main__":
    sys.exit(main())
