"""All tests of the operations over the emulated CUDA library, in processes of their own: sanitized, and at full size.

The library that the other tests of this folder load has small tables, so that usual lists overflow them, and so has the
sanitized one. The sizes that users get are the other process's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import build_emulated, emulated_backend

ROOT = Path(__file__).parents[2]


def run_tests(environment, *arguments):
    """Runs pytest; returns how many tests passed. Anything but passed tests is a failure of this one."""
    command = [sys.executable, "-m", "pytest", *arguments, "--backends", emulated_backend.NAME, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--timeout=600"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    counted = dict(re.findall(r"(\d+) (\w+)", done.stdout.strip().splitlines()[-1]))
    by_name = {name: int(number) for number, name in counted.items()}
    assert by_name.keys() <= {"passed", "deselected", "warnings", "warning"}, by_name
    return by_name["passed"]


@pytest.mark.timeout(1200)
def test_the_operations_under_the_sanitizers():
    """Every access of every kernel inside its tensor, its table and its shared memory, and aligned."""
    files = ("tests/ops", "tests/kernels/test_emulated_accumulators.py")
    assert run_tests(build_emulated.sanitizer_environment(), *files) > 600


@pytest.mark.timeout(600)
def test_the_operations_with_the_arguments_that_users_get():
    environment = {**os.environ, emulated_backend.SIZES_VARIABLE: "full"}
    files = ("tests/ops/test_range.py", "tests/kernels/full_size.py", "tests/ops/test_matrix.py::test_large")
    assert run_tests(environment, *files) > 130
