"""Proves the GPU kernels without a GPU: five proofs, each of them pytest in one process or more, and one summary.

Several processes, because a process either interprets Triton kernels or compiles them. A test that is skipped is a proof
that was not given, so here it counts as a failure, and its reason is in the summary.
"""

from __future__ import annotations

import glob
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tools.environment import ROOT, CannotSetUp, Environment, prepare_cuda

REPORTS = ROOT / ".dev" / "kernels"


@dataclass(frozen=True)
class Run:
    """One pytest process over the files that the patterns match."""

    files: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proof:
    """One of the ways in which the kernels are proven."""

    name: str
    runs: tuple[Run, ...]
    needs_cuda_torch: bool = False


TWO_AT_A_TIME = ("--numprocesses=2", "--dist=loadgroup")

# What the optimizer makes of the kernels where its path differs: every variant, alone and over micro-batches.
VARIANTS = (
    "tests/optim/test_variants.py",
    "tests/optim/test_variant_edges.py",
    "tests/optim/test_sam_on.py",
    "tests/optim/test_two_losses.py",
    "tests/optim/test_variant_scaling.py",
)

PROOFS = (
    Proof("planner", (Run(("tests/csrc/test_plan.py",)),)),
    Proof("shared-math", (Run(("tests/csrc/test_element.py", "tests/kernels/test_shared_math.py")),)),
    Proof(
        "emulation",
        (
            Run(("tests/kernels/test_emulation.py", "tests/kernels/test_emulated_*.py"), options=TWO_AT_A_TIME),
            Run(VARIANTS, options=("--backends=emulated", *TWO_AT_A_TIME)),
        ),
    ),
    Proof("wheel", (Run(("tests/kernels/test_wheel_*.py",)),), needs_cuda_torch=True),
    Proof(
        "triton",
        (
            Run(("tests/kernels/test_triton_interpreted.py",), {"TRITON_INTERPRET": "1"}, TWO_AT_A_TIME),
            # Without the tests that take a step for each of its lines: interpreted, that is an hour.
            Run(VARIANTS, {"TRITON_INTERPRET": "1"}, ("--backends=triton", "-k=not interrupted", *TWO_AT_A_TIME)),
            Run(("tests/kernels/test_triton_backend.py", "tests/kernels/test_triton_compiled.py"), {"TRITON_INTERPRET": "0"}),
        ),
    ),
)


@dataclass
class Outcome:
    """What pytest counted, and what has to be said about it."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        for name in ("passed", "failed", "skipped", "errors", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.remarks += other.remarks

    @property
    def is_proof(self) -> bool:
        return self.passed > 0 and self.failed + self.skipped + self.errors == 0

    def counts(self) -> str:
        errors = "error" if self.errors == 1 else "errors"
        counted = {"failed": self.failed, "passed": self.passed, "skipped": self.skipped, errors: self.errors}
        said = [f"{number} {name}" for name, number in counted.items() if number] or ["no tests ran"]
        return f"{', '.join(said)} in {self.seconds:.2f}s"


def chosen(names: Sequence[str]) -> list[Proof]:
    """The proofs with these names or numbers, all of them without any."""
    known = {proof.name: proof for proof in PROOFS} | {str(number): proof for number, proof in enumerate(PROOFS, 1)}
    unknown = [name for name in names if name not in known]
    if unknown:
        choice = ", ".join(f"{number} {proof.name}" for number, proof in enumerate(PROOFS, 1))
        raise CannotSetUp(f"test-kernels expected names or numbers of proofs ({choice}), got {unknown[0]!r}")
    wanted = [known[name] for name in names]
    return [proof for proof in PROOFS if not names or proof in wanted]


def prove(environment: Environment, names: Sequence[str]) -> int:
    """Gives the proofs and returns the exit status: 0 if every one of them was given."""
    proofs = chosen(names)
    if any(proof.needs_cuda_torch for proof in proofs):
        cuda_python = str(prepare_cuda(environment))
        environment = replace(environment, variables={**environment.variables, "SAM_FUSED_CUDA_PYTHON": cuda_python})
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    outcomes = [_give(environment, proof) for proof in proofs]
    total = Outcome()
    print()
    for proof, outcome in zip(proofs, outcomes, strict=True):
        print(
            f"proof {PROOFS.index(proof) + 1}, {proof.name}: {'given' if outcome.is_proof else 'NOT GIVEN'}: {outcome.counts()}"
        )
        for remark in outcome.remarks:
            print(f"    {remark}")
        total.add(outcome)
    print(f" {total.counts()} ".center(80, "="), flush=True)
    return 0 if all(outcome.is_proof for outcome in outcomes) else 1


def _give(environment: Environment, proof: Proof) -> Outcome:
    outcome = Outcome()
    for number, run in enumerate(proof.runs, 1):
        print(f"\nproof {PROOFS.index(proof) + 1}, {proof.name}", flush=True)
        outcome.add(_pytest(environment, run, REPORTS / f"{proof.name}-{number}.xml"))
    return outcome


def _pytest(environment: Environment, run: Run, report: Path) -> Outcome:
    files, absent = [], []
    for pattern in run.files:
        found = sorted(glob.glob(pattern, root_dir=ROOT))
        files += found
        absent += [] if found else [pattern]
    if absent:
        return Outcome(errors=1, remarks=[f"expected tests in {', '.join(absent)}, found no such file"])
    started = time.monotonic()
    changed = replace(environment, variables={**environment.variables, **run.variables})
    status = changed.run("-m", "pytest", f"--junitxml={report}", *run.options, *files)
    return _read(report, status, time.monotonic() - started)


def _read(report: Path, status: int, seconds: float) -> Outcome:
    try:
        cases = ElementTree.parse(report).findall(".//testcase")
    except (OSError, ElementTree.ParseError):
        return Outcome(errors=1, seconds=seconds, remarks=[f"pytest ended with status {status} and without a report"])
    outcome = Outcome(seconds=seconds)
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if (problem := case.find("failure")) is not None or (problem := case.find("error")) is not None:
            outcome.failed += problem.tag == "failure"
            outcome.errors += problem.tag == "error"
            outcome.remarks.append(f"{problem.tag}: {name}")
        elif (skip := case.find("skipped")) is not None:
            outcome.skipped += 1
            outcome.remarks.append(f"not run: {name}: {skip.get('message')}")
        else:
            outcome.passed += 1
    if status != 0 and outcome.is_proof:
        outcome.errors += 1
        outcome.remarks.append(f"pytest ended with status {status}")
    return outcome
