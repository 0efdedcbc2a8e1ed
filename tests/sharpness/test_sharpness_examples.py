"""The page's code and the docstrings' examples run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

from sam_fused import sharpness
from tests.markdown import run_python_blocks

pytestmark = pytest.mark.cpu_only

MODULES = [module.name for module in pkgutil.iter_modules(sharpness.__path__)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharpness.md"


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    names = {"torch": torch, **{name: getattr(sharpness, name) for name in sharpness.__all__}}
    found = doctest.testmod(importlib.import_module(f"sam_fused.sharpness.{module}"), extraglobs=names)
    assert found.failed == 0


def test_the_page(capsys):
    namespace = run_python_blocks(PAGE)
    assert namespace["report"].worst >= namespace["report"].ascent > 0
    assert "top eigenvalues" in capsys.readouterr().out
