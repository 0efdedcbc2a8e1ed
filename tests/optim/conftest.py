"""Fixtures of the optimizer tests."""

import pytest
import torch

from sam_fused.ops.backends import available_backends
from tests.optim.helpers import FORMS


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    monkeypatch.delenv("SAM_FUSED_BACKEND", raising=False)
    torch.manual_seed(0)
    # With two threads nets as small as these take several times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend(request):
    reason = available_backends(torch.get_default_device())[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def fast_backend():
    """The best backend here, for what does not depend on it: named, because choosing one may warn that native is missing."""
    served = available_backends(torch.get_default_device())
    return next(name for name in ("native", "triton", "foreach") if served[name] is None)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param
