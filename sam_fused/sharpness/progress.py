"""A progress bar over the batches of a measurement: tqdm's where it is installed and somebody watches, else none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """One bar at a time. A stage inside another one counts into the outer one's bar.

    Args:
        shown: False for no bar at all.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    @contextmanager
    def stage(self, name: str, batches: int | None) -> Iterator[None]:
        """Inside, ``advance()`` moves a bar called ``name`` towards ``batches``; None: nobody knows how many."""
        if not self._shown or self._bar is not None:
            yield
            return
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:  # a bar is a comfort, nothing to fail for
            yield
            return
        # disable=None: silent unless stderr is a terminal.
        self._bar = tqdm(total=batches, desc=name, unit="batch", leave=False, disable=None)
        try:
            yield
        finally:
            bar, self._bar = self._bar, None
            bar.close()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()
