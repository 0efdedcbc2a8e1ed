"""Every Python block of the README runs, in order, in one namespace; every command it shows exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.readme import PUBLISHED, rewritten
from tests.markdown import blocks, run_python_blocks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order() -> None:
    assert len(blocks(README, "python")) >= 3
    namespace = run_python_blocks(ROOT / "README.md")
    assert namespace["loss"].item() > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["bench", "test"])
def test_make_targets_shown_exist_and_are_python_commands(target: str) -> None:
    assert f"make {target}" in README and f"python3 -m tools.dev {target}" in README
    recipe = re.search(rf"^{target}:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None and f"-m tools.dev {target}" in recipe.group(1)


def test_the_measured_figures_are_those_of_the_published_run() -> None:
    report = json.loads((PUBLISHED / "cpu-2threads.json").read_text())
    assert rewritten(README, report) == README
    assert report["run"]["command"] == "python -m benchmarks.throughput" and not report["machine"]["git_modified"]
    assert {row["base"] for row in report["rows"]} == {"sgd", "adamw"} and len(report["targets"]) >= 15


def test_files_named_exist() -> None:
    for path in re.findall(r"`((?:docs|sam_fused|examples|benchmarks|csrc)/[\w./-]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
