"""What the tests of the GPU kernels start from, none of which is a GPU."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cuda_python():
    """An interpreter whose torch is a CUDA build. It builds and imports the CUDA library; no GPU is needed for either."""
    named = os.environ.get("SAM_FUSED_CUDA_PYTHON")
    made = ROOT / ".cuda-venv" / "bin" / "python"
    if named:
        return Path(named)
    if torch.version.cuda is not None:
        return Path(sys.executable)
    if made.exists():
        return made
    pytest.skip("needs a torch with CUDA to build against: `make test-kernels` sets one up, SAM_FUSED_CUDA_PYTHON names one")


@pytest.fixture(scope="session")
def nvcc():
    """The CUDA compiler, for tests that need no torch with CUDA."""
    found = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if not os.path.exists(found):
        pytest.skip("needs nvcc on PATH or in CUDA_HOME, found none")
    return found


@pytest.fixture(scope="module")
def library():
    """The CUDA library's sources, built for the CPU."""
    from tests.kernels import emulated_backend

    return emulated_backend.install(emulated_backend.built_once())


@pytest.fixture
def emulated(library):
    """That library with its blocks as large, and in the order, that they have by default."""
    from tests.kernels import emulated_backend

    library.set_threads_per_block(emulated_backend.THREADS)
    library.set_orders()
    return library
