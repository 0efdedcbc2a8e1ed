"""What every test starts from."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """The same random numbers whichever tests run, and torch's thread count as it was found."""
    # Not imported here: some tests never need torch, and importing it takes longer than they do.
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
