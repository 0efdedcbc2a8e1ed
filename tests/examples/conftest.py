"""How tests reach the reproductions' modules."""

import importlib

import pytest

from tests.examples.running import EXAMPLES


@pytest.fixture
def script(monkeypatch):
    """Imports a reproduction by its name, as its own folder sees it."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "papers"))
    pytest.importorskip("torch").set_num_threads(1)  # as the scripts do
    return importlib.import_module
