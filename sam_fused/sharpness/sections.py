"""Sections of the landscape, as data: the losses along a line and over a plane, to keep as JSON and to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records

LINES = ("along", "between")
PLANES = ("random", "eigenvectors", "given")


@dataclass(frozen=True)
class Line(records.Record):
    """Losses along a line. Where the loss overflowed they are inf or NaN.

    Attributes:
        positions: in units of the direction; between checkpoints 0 is the first and 1 the second.
        losses: one per position.
        kind: ``"along"`` a direction or ``"between"`` checkpoints.

    Example:
        >>> line = Line((0.0, 1.0), (0.5, 0.25), kind="between")
        >>> Line.from_json(line.to_json()) == line
        True
    """

    KIND = "line"

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    kind: str = "along"

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Line:
        positions, losses = (records.floats(content.pop(name)) for name in ("positions", "losses"))
        line = cls(positions, losses, content.pop("kind"), **content)  # what is left over is refused
        if len(line.positions) != len(line.losses) or line.kind not in LINES:
            raise ValueError(line.kind)
        return line

    def plot(self, path: str | Path) -> Path:
        """The loss by position as a picture, in the format of the path's suffix, PNG without one. Needs matplotlib.

        Returns:
            Path: of the file that was written.
        """
        from .pictures import draw_line

        return draw_line(self, Path(path))


@dataclass(frozen=True)
class Plane(records.Record):
    """Losses over a plane. Where the loss overflowed they are inf or NaN.

    Attributes:
        first: positions along the first direction.
        second: positions along the second.
        losses: ``losses[i][j]`` at ``first[i]`` and ``second[j]``.
        kind: what the directions were: ``"random"``, ``"eigenvectors"`` or ``"given"``.
        filter_normalized: whether they were scaled filter by filter. Eigenvectors so scaled are none any more, nor orthogonal.
        eigenvalues: of the eigenvectors that the directions were, or were scaled from; empty for others.

    Example:
        >>> grid = Plane((-1.0, 1.0), (-1.0, 1.0), ((2.0, 2.0), (2.0, 3.0)))
        >>> Plane.from_json(grid.to_json()) == grid
        True
    """

    KIND = "plane"

    first: tuple[float, ...]
    second: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    kind: str = "given"
    filter_normalized: bool = False
    eigenvalues: tuple[float, ...] = ()

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Plane:
        rows = tuple(map(records.floats, content.pop("losses")))
        first, second, eigenvalues = (records.floats(content.pop(name)) for name in ("first", "second", "eigenvalues"))
        kind, filter_normalized = content.pop("kind"), bool(content.pop("filter_normalized"))
        plane = cls(first, second, rows, kind, filter_normalized, eigenvalues, **content)
        if [len(row) for row in rows] != [len(second)] * len(first) or plane.kind not in PLANES:
            raise ValueError(plane.kind)
        return plane

    def plot(self, path: str | Path) -> Path:
        """Contours as a picture, in the format of the path's suffix, PNG without one. Needs matplotlib.

        Half of the colours are for the lower half of the cells. The scale ends below cells that are far above all others, and
        where the loss was not finite the picture is hatched.

        Returns:
            Path: of the file that was written.
        """
        from .pictures import draw_plane

        return draw_plane(self, Path(path))
