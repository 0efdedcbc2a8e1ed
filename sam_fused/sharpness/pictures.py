"""Pictures of what was measured, by matplotlib. Nothing is shown, no backend is chosen: files are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from .landscape import Plane
    from .report import SharpnessReport


def draw_report(report: SharpnessReport, path: Path) -> Path:
    """On the left the loss along each line, rho marked; on the right the eigenvalues."""
    figure = _figure(10.0, 4.0)
    lines, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    for name, line in report.lines.items():
        lines.plot(line.positions, line.losses, marker=".", label=name)
    for edge in (-report.rho, report.rho):
        lines.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    lines.set(xlabel="distance in weight space (dotted: rho)", ylabel="loss", title="through the weights")
    if report.lines:
        lines.legend()
    bars.bar([str(number) for number in range(1, len(report.eigenvalues) + 1)], report.eigenvalues)
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set(xlabel="number", title="Hessian: top eigenvalues")
    return _save(figure, path)


def draw_plane(plane: Plane, path: Path) -> Path:
    """Contours; the weights are marked by a cross."""
    figure = _figure(5.5, 4.5)
    axes = figure.subplots()
    # Rows of contourf are along y: the second direction goes upwards.
    columns = list(zip(*plane.losses, strict=True))
    figure.colorbar(axes.contourf(plane.first, plane.second, columns, levels=20), label="loss")
    axes.plot(0, 0, marker="x", color="red")
    axes.set(xlabel="first direction", ylabel="second direction")
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it would choose a backend for the whole process, and keep the figure.
    return checks.package("matplotlib.figure", "pictures").Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    # Without matplotlib's version, which it writes by default: the same report gives the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    return path
