"""A step of a GPU run: a process with a limit, what it counted, and what it left out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.environment import ROOT

# The end of a failed step's output that goes into the results.
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Step:
    """A command. `not_run` is the reason why it cannot be run here."""

    name: str
    command: tuple[str, ...]
    limit: float
    variables: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None
    is_pytest: bool = False
    is_benchmark: bool = False
    seconds_option: str | None = None

    def without(self, reason: str) -> Step:
        """The step, not to be run."""
        return replace(self, not_run=reason)


@dataclass
class Outcome:
    """How a step ended: `status` is "passed", "failed", "timed out" or "not run"."""

    name: str
    command: str
    status: str
    reason: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    limit: float = 0.0
    output_tail: str | None = None
    did_not_run: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """For the terminal."""
        counted = ", ".join(f"{number} {what}" for what, number in self.counts.items() if number)
        details = "; ".join(filter(None, (counted, self.reason)))
        return f"{self.name}: {self.status} in {self.seconds:.1f} s" + (f" ({details})" if details else "")

    def as_dict(self) -> dict[str, Any]:
        """For the results; what did not run is listed there once, for all steps."""
        return {name: value for name, value in vars(self).items() if name != "did_not_run"}


def run_step(step: Step, folder: Path, limit: float) -> Outcome:
    """Runs it, at most `limit` seconds, its children included. `folder` holds what it writes for us."""
    outcome = Outcome(step.name, " ".join(step.command), "not run", step.not_run, limit=round(limit, 1))
    if step.not_run is not None:
        outcome.did_not_run.append({"step": step.name, "what": step.name, "reason": step.not_run})
        return outcome
    stem = re.sub(r"\W+", "-", step.name)
    report, left_out = folder / f"{stem}.xml", folder / f"{stem}-left-out.txt"
    command = list(step.command)
    if step.is_pytest:
        command += [f"--junitxml={report}", f"--left-out={left_out}"]
    if step.seconds_option:
        command.append(f"{step.seconds_option}={max(1.0, limit - 20.0):.0f}")  # the last thing begun has to end, too
    started = time.monotonic()
    status, output = _run(command, {**step.variables, "PYTHONPATH": _path()}, limit, folder / f"{stem}.log")
    outcome.seconds = round(time.monotonic() - started, 1)
    outcome.status = "timed out" if status is None else "passed" if status == 0 else "failed"
    if step.is_pytest:
        _read(outcome, report, left_out)
    if outcome.status in ("failed", "timed out"):
        outcome.reason = f"exit status {status}" if status is not None else f"stopped after {limit:.0f} s"
        outcome.output_tail = output[-TAIL_CHARACTERS:]
        print(outcome.output_tail, flush=True)
        if status is None:
            what = f"{step.name}: what was still to come when it was stopped"
            outcome.did_not_run.append({"step": step.name, "what": what, "reason": outcome.reason})
    elif not step.is_pytest:
        print(output, flush=True)
    return outcome


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _run(command: list[str], variables: dict[str, str], limit: float, log: Path) -> tuple[int | None, str]:
    """Its exit status, None where it had to be stopped, and what it printed: through a file, which no pipe can block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:
            _stop(process)
            raise
        if status is None:
            _stop(process)
    return status, log.read_text(encoding="utf-8", errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: they share a session of their own."""
    for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _read(outcome: Outcome, report: Path, left_out: Path) -> None:
    """Counts, and every test that was skipped or left out with its reason."""
    try:
        cases = ElementTree.parse(report).findall(".//testcase")
    except (OSError, ElementTree.ParseError):
        outcome.counts = {}
        return
    counts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif (skip := case.find("skipped")) is not None:
            counts["skipped"] += 1
            name = f"{case.get('classname')}::{(case.get('name') or '').split('[')[0]}"
            reasons[name, skip.get("message") or ""] += 1
        else:
            counts["passed"] += 1
    names = left_out.read_text(encoding="utf-8").split("\n")[:-1] if left_out.exists() else []
    for name in names:
        counts["left out"] += 1
        reasons[name.split("[")[0], "about the CPU (cpu_only)"] += 1
    outcome.counts = {name: counts[name] for name in ("passed", "failed", "skipped", "left out")}
    outcome.did_not_run += [
        {"step": outcome.name, "what": what, "tests": number, "reason": reason} for (what, reason), number in reasons.items()
    ]
    if outcome.status == "passed" and not counts["passed"]:
        outcome.status, outcome.reason = "not run", "every test of it was skipped"
