"""Every Python block of the documentation runs, in order, in one namespace per page; what pages link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.markdown import blocks, run_python_blocks

ROOT = Path(__file__).resolve().parents[1]
LOOPS = ROOT / "docs" / "loops"
INDEX = LOOPS / "README.md"
PAGES = sorted(page for page in LOOPS.glob("*.md") if page != INDEX)
# docs/sharpness.md is run by its package's tests.
RUN = [*PAGES, ROOT / "docs" / "variants.md", ROOT / "docs" / "choosing.md"]
READ = [INDEX, *RUN, ROOT / "docs" / "sharpness.md", ROOT / "README.md", ROOT / "examples" / "papers" / "README.md"]


def name_of(page: Path) -> str:
    return "-".join(page.relative_to(ROOT).with_suffix("").parts)


def links(page: Path) -> list[str]:
    """Relative ones, without what comes after a #."""
    found = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [link for link in found if "://" not in link]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page: Path) -> None:
    assert blocks(page.read_text(encoding="utf-8"), "python"), "a page without anything to run shows nothing"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with two, models as small as these take several times as long
    try:
        run_python_blocks(page)
    finally:
        torch.set_num_threads(threads)


def test_the_index_has_every_page_once_and_no_other() -> None:
    listed = [link for link in links(INDEX) if "/" not in link]
    assert sorted(listed) == sorted(page.name for page in PAGES)


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for link, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            target = page if not link else page.parent / link
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            # As GitHub makes an anchor of a heading.
            assert heading in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings], (link, heading)


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_files_named_exist(page: Path) -> None:
    for path in re.findall(r"`((?:docs|sam_fused|examples|benchmarks|csrc|tests)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).is_file(), path
