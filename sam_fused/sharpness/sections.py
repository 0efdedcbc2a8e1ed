"""Sections of the landscape, as data: the losses along a line and over a plane, to keep as JSON and to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from . import records

LINES = ("along", "between")
PLANES = ("random", "eigenvectors", "given")


@dataclass(frozen=True)
class Line:
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

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    kind: str = "along"

    def to_json(self, path: str | Path | None = None) -> str:
        """The line as JSON, which is also written to ``path`` if there is one; inf and NaN as strings."""
        return records.write("line", asdict(self), path)

    @classmethod
    def from_json(cls, source: str | Path) -> Line:
        """A line from what ``to_json`` gave: the text, or a path to it.

        Raises:
            OSError: there is no such file.
            ValueError: it is something else.
        """
        return records.read("line", source, lambda content: cls._checked(**content))

    @classmethod
    def _checked(cls, positions: list[object], losses: list[object], kind: str) -> Line:
        if len(positions) != len(losses) or kind not in LINES:
            raise ValueError(kind)
        return cls(records.floats(positions), records.floats(losses), kind)

    def plot(self, path: str | Path) -> Path:
        """The loss by position as a picture, in the format of the path's suffix, PNG without one. Needs matplotlib.

        Returns:
            Path: of the file that was written.
        """
        from .pictures import draw_line

        return draw_line(self, Path(path))


@dataclass(frozen=True)
class Plane:
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

    first: tuple[float, ...]
    second: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    kind: str = "given"
    filter_normalized: bool = False
    eigenvalues: tuple[float, ...] = ()

    def to_json(self, path: str | Path | None = None) -> str:
        """The plane as JSON, which is also written to ``path`` if there is one; inf and NaN as strings."""
        return records.write("plane", asdict(self), path)

    @classmethod
    def from_json(cls, source: str | Path) -> Plane:
        """A plane from what ``to_json`` gave: the text, or a path to it.

        Raises:
            OSError: there is no such file.
            ValueError: it is something else.
        """
        return records.read("plane", source, lambda content: cls._checked(**content))

    @classmethod
    def _checked(
        cls,
        first: list[object],
        second: list[object],
        losses: list[list[object]],
        kind: str,
        filter_normalized: bool,
        eigenvalues: list[object],
    ) -> Plane:
        if [len(row) for row in losses] != [len(second)] * len(first) or kind not in PLANES:
            raise ValueError(kind)
        rows = tuple(map(records.floats, losses))
        ticks = records.floats(first), records.floats(second)
        return cls(*ticks, rows, kind, bool(filter_normalized), records.floats(eigenvalues))

    def plot(self, path: str | Path) -> Path:
        """Contours as a picture, in the format of the path's suffix, PNG without one. Needs matplotlib.

        Half of the colours are for the lower half of the cells. The scale ends below cells that are far above all others, and
        where the loss was not finite the picture is hatched.

        Returns:
            Path: of the file that was written.
        """
        from .pictures import draw_plane

        return draw_plane(self, Path(path))
