"""Pictures of what was measured, by matplotlib. Nothing is shown, no backend is chosen: files are written."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from .report import SharpnessReport
    from .sections import Line, Plane

_COLOURS = 20
_OVERFLOW = 1e100  # beyond, differences of losses are no numbers to draw; nobody has such a loss

_DIRECTIONS = {"random": "random direction", "eigenvectors": "eigenvector", "given": "direction"}


def draw_report(report: SharpnessReport, path: Path) -> Path:
    """On the left the loss along each line and the three rises at rho; on the right the eigenvalues."""
    figure = _figure(11.0, 4.6)
    figure.suptitle(f"Sharpness at ρ = {report.rho:g}: D = {report.parameters:,} parameters, {report.samples:,.6g} samples")
    lines, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    for name, line in report.lines.items():
        lines.plot(line.positions, _drawable(line.losses), marker=".", label=f"{name} direction" if name == "random" else name)
    for edge in (-report.rho, report.rho):
        lines.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    rises = {
        "worst": ("^", report.worst, f"{report.worst:+.3g}, at least"),
        "ascent": ("s", report.ascent, f"{report.ascent:+.3g}"),
        "average": ("o", report.average.mean, f"{report.average.mean:+.3g} ± {report.average.standard_error:.1g}"),
    }
    for name, (marker, rise, text) in rises.items():
        label = f"{name} at ρ: {text}"
        lines.plot(report.rho, report.loss + rise, marker, color="black", fillstyle="none", label=label, zorder=3)
    lines.set(xlabel="distance in weight space (dotted: ρ)", ylabel="loss", title="through the weights")
    # Beside the curves, which fill the middle as often as the corners.
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    numbers = range(1, len(report.eigenvalues) + 1)
    drawn = bars.bar(numbers, report.eigenvalues)
    many = len(numbers) > 5
    bars.bar_label(drawn, fmt="%.3g", padding=2, fontsize="small", rotation=90 if many else 0)
    bars.margins(y=0.2 if many else 0.08)
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set(xlabel="number", title="top eigenvalues")
    bars.locator_params(axis="x", nbins=8, integer=True)
    bars.set_xlim(0.4, max(len(numbers), 3) + 0.6)
    return _save(figure, path)


def draw_line(line: Line, path: Path) -> Path:
    figure = _figure(5.5, 4.0)
    axes = figure.subplots()
    axes.plot(line.positions, _drawable(line.losses), marker=".")
    between = line.kind == "between"
    axes.set(xlabel="t, from the first checkpoint to the second" if between else "multiples of the direction", ylabel="loss")
    for end in (0, 1) if between else (0,):
        axes.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    return _save(figure, path)


def draw_plane(plane: Plane, path: Path) -> Path:
    """Contours; the weights are marked by a cross, and what is not finite is hatched."""
    numpy = checks.package("numpy", "pictures")
    colors = checks.package("matplotlib.colors", "pictures")
    figure = _figure(6.2, 5.0)
    axes = figure.subplots()
    # Rows of contourf are along y: the second direction goes upwards.
    cells = numpy.ma.masked_invalid([_drawable(column) for column in zip(*plane.losses, strict=True)])
    found = cells.compressed().tolist()
    title = ""
    if len(found) < cells.size:
        axes.patch.set(facecolor="white", edgecolor="grey", hatch="xx")
        title = "hatched: not finite"
    if found:
        levels = _levels(found)
        extend = "max" if max(found) > levels[-1] else "neither"
        norm = colors.BoundaryNorm(levels, 256, extend=extend)
        filled = axes.contourf(plane.first, plane.second, cells, levels=levels, norm=norm, extend=extend)
        if len(levels) > 2:
            axes.contour(plane.first, plane.second, cells, levels=levels, colors="black", linewidths=0.3)
        ticks = levels[::4] if len(levels) > 2 else found[:1]
        figure.colorbar(filled, label="loss", ticks=ticks).ax.set_yticklabels([f"{tick:.3g}" for tick in ticks])
    axes.plot(0, 0, marker="x", color="red", clip_on=False)
    if len({*plane.first, *plane.second}) == 1:
        title = "radius 0: the weights alone"
    if plane.filter_normalized and plane.kind == "eigenvectors":
        title = "\n".join(filter(None, ["scaled by filters: no eigenvectors any more, nor orthogonal", title]))
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=_axis(plane, 0), ylabel=_axis(plane, 1))
    axes.set(xlim=_limits(plane.first), ylim=_limits(plane.second))
    axes.locator_params(nbins=5)
    return _save(figure, path)


def _axis(plane: Plane, number: int) -> str:
    label = f"{('first', 'second')[number]} {_DIRECTIONS[plane.kind]}"
    if plane.eigenvalues:
        label += f" (λ = {plane.eigenvalues[number]:.3g})"
    return f"{label}, filter-normalised" if plane.filter_normalized else label


def _limits(ticks: tuple[float, ...]) -> tuple[float, float]:
    low, high = min(ticks), max(ticks)
    return (low, high) if low < high else (low - 1, high + 1)


def _levels(losses: list[float]) -> list[float]:
    """From the lowest loss up, so that half of the colours are for the lower half of the cells.

    Even levels would give all but a few cells one colour where some losses are far above the others. Where they are so far that
    the rest would be at the bottom anyway the scale ends below them.
    """
    low, high = min(losses), max(losses)
    most = quantiles(losses, n=20, method="inclusive")[-1] if len(losses) > 1 else high
    if high - low > 20 * (most - low) > 0:
        high = most
    if high - low > 1e-9 * max(abs(low), abs(high)):
        share = (median(losses) - low) / (high - low)
        power = min(max(math.log(max(share, 1e-9)) / math.log(0.5), 1.0), 8.0)
        levels = [low + (high - low) * (number / _COLOURS) ** power for number in range(_COLOURS + 1)]
        distinct = [level for level, before in zip(levels[1:], levels, strict=False) if level > before]
        return [low, *distinct[:-1], high]
    margin = 1e-3 * abs(low) or 1e-3
    return [low - margin, low + margin]


def _drawable(losses: tuple[float, ...]) -> list[float]:
    return [loss if abs(loss) < _OVERFLOW else math.nan for loss in losses]


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it would choose a backend for the whole process, and keep the figure.
    return checks.package("matplotlib.figure", "pictures").Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    """Writes the file, and says which."""
    path = path if path.suffix else path.with_suffix(".png")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"path: expected a suffix of {', '.join(sorted(known))}, got {path.suffix!r}: end the name in .png, or in nothing."
        )
    # Without matplotlib's version, which it writes by default.
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix.lower() == ".png" else None)
    return path
