"""A progress bar over the batches of a measurement: tqdm's where it is installed and somebody watches, else none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import checks


class Progress:
    """One bar at a time. A stage inside another one counts into the outer one's bar, and is named beside it.

    Args:
        shown: True: a bar, whoever watches; None: one if tqdm is installed and stderr is a terminal, or in a notebook; False:
            none.

    Raises:
        ModuleNotFoundError: a bar is asked for, and tqdm is not installed.
        TypeError: something else.
    """

    def __init__(self, shown: bool | None) -> None:
        if shown is not None and not isinstance(shown, bool):
            raise TypeError(f"progress: expected True, False or None, got {type(shown).__name__}: pass one of these.")
        if shown:
            checks.package("tqdm.auto", "a progress bar")
        self._shown = shown
        self._name = ""
        self._bar: Any = None

    @contextmanager
    def stage(self, name: str | None, batches: int | None) -> Iterator[None]:
        """Inside, ``advance()`` moves a bar called ``name`` towards ``batches``, at most so many; None: nobody knows."""
        if self._bar is not None:
            with self._nested(name, batches):
                yield
            return
        self._name = name or "pass"
        self._bar = self._made(batches)
        try:
            yield
        finally:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.close()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    @contextmanager
    def _nested(self, name: str | None, batches: int | None) -> Iterator[None]:
        bar = self._bar
        if name is not None:
            bar.set_description(f"{self._name}: {name}")
        before = bar.n
        yield
        if batches is not None and bar.total is not None:  # it took fewer or more: the outer bar ends where its end is
            bar.total += bar.n - before - batches

    def _made(self, batches: int | None) -> Any:
        if self._shown is False:
            return None
        try:
            from tqdm.auto import tqdm

            # A notebook's stderr is no terminal, but its bars are widgets. None: silent unless stderr is a terminal.
            watched = self._shown or any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
            return tqdm(total=batches, desc=self._name, unit="batch", leave=False, disable=False if watched else None)
        except ImportError:  # also of the notebook's widgets: a bar is a comfort, nothing to fail for
            return None
