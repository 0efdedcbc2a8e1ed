"""Code blocks of Markdown pages, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for _, body in _found(text, language)]


def run_python_blocks(page: Path) -> dict[str, object]:
    """Runs a page's Python blocks top to bottom in one namespace and returns it. Tracebacks name the page and its own lines."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, block in _found(page.read_text(encoding="utf-8"), "python"):
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    return namespace


def _found(text: str, language: str) -> list[tuple[int, str]]:
    """The lines before each block, and the block."""
    matches = re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in matches]
