"""One thread: with two, nets as small as these take several times as long."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Of the module's scope, so that its fixtures have it too: another number of threads gives other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
