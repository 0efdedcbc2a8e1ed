"""Which doors and backends can be tested here, and processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sam_fused.ops.backends import available_backends
from tests.devices import default


def _exists(item):
    """False for combinations of parameters that mean nothing: nobody should have to read that they were skipped."""
    chosen = getattr(getattr(item, "callspec", None), "params", {})
    # torch's multi-tensor calls promote mixed dtypes of one parameter by their own rules.
    mixed = "weight" in chosen and "other" in chosen and chosen["weight"] != chosen["other"]
    return not (mixed and chosen.get("backend") == "foreach")


def pytest_collection_modifyitems(config, items):
    absent = [item for item in items if not _exists(item)]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if _exists(item)]


def skip_if_missing(runner: str) -> None:
    backend = {"prepared": "native"}.get(runner, runner.removeprefix("prepared-"))
    reason = available_backends(default())[backend]
    if reason is not None:
        pytest.skip(f"no {backend} backend: {reason}")


@pytest.fixture
def runner(request):
    skip_if_missing(request.param)
    return request.param


@pytest.fixture
def backend(request):
    skip_if_missing(request.param)
    return request.param


@pytest.fixture
def needs_native():
    skip_if_missing("native")


@pytest.fixture(autouse=True)
def _one_thread(_seed_and_threads):
    """Torch's own kernels start a parallel region per tiny tensor, which on busy cores takes longer than all tests together."""
    torch.set_num_threads(1)


@pytest.fixture
def in_a_process_of_its_own():
    """Runs code where a crash is a failed test and not the end of all tests, and where the environment can be chosen."""

    def run(code: str, **environment: str) -> str:
        there = "" if default().type == "cpu" else f"import torch; torch.set_default_device('{default()}')\n"
        done = subprocess.run(
            [sys.executable, "-c", there + textwrap.dedent(code)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run
