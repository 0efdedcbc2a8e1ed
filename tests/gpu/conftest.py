"""Tests that need a CUDA device: skipped, with the reason, where there is none. The tools around them need nothing."""

from pathlib import Path

import pytest
import torch

from sam_fused.ops.backends import available_backends
from tests.gpu.problems import BACKENDS, DEVICE

HERE = Path(__file__).parent
NEEDS_NOTHING = ("test_rehearsal.py", "test_targets.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and item.path.name not in NEEDS_NOTHING:
            item.add_marker(pytest.mark.gpu)


def cuda_missing() -> str | None:
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is built for the CPU alone"
    return None if torch.cuda.is_available() else "no CUDA device: torch sees none, check the driver with nvidia-smi"


@pytest.fixture(autouse=True)
def _needs_a_device(request):
    if request.path.name not in NEEDS_NOTHING and (reason := cuda_missing()) is not None:
        pytest.skip(reason)
    yield


@pytest.fixture(params=BACKENDS)
def kernels(request):
    """A backend with kernels of its own. That it serves the card is a test's to say: here a missing one is skipped."""
    reason = available_backends(DEVICE)[request.param]
    if reason is not None:
        pytest.skip(f"no {request.param} backend: {reason}")
    return request.param


@pytest.fixture
def two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    return torch.device("cuda", 0), torch.device("cuda", 1)
