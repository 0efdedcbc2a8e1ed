"""The picture: how many times ours each variant takes, one panel per table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import Row, table_key, title_of

NO_MATPLOTLIB = "no picture: matplotlib is not installed"


def find_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_png(path: Path, rows: list[Row], subtitle: str, side: str = "optimizer side of one SAM step") -> str | None:
    """Bars of the ratio to ours with its quartiles. Returns the reason where no picture can be drawn, else None."""
    pyplot = find_pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    panels = list(dict.fromkeys(table_key(row) for row in rows if row.ratio_to_ours is not None))
    if not panels:
        return "no picture: nothing was measured"
    panel_rows = [[row for row in rows if table_key(row) == panel and row.ratio_to_ours] for panel in panels]
    heights = [2.0 + len(chosen) for chosen in panel_rows]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9.0, 0.6 + 0.26 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for chosen, axis in zip(panel_rows, axes[:, 0], strict=True):
        _draw_panel(axis, chosen[::-1])
    axes[-1, 0].set_xlabel(f"{side}, times ours", fontsize=9)
    figure.suptitle(subtitle, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None


def _draw_panel(axis: Any, chosen: list[Row]) -> None:
    ratios = [row.ratio_to_ours or 0.0 for row in chosen]
    # A quartile of one round is its median; rounding must not make the length of its whisker negative.
    low = [max(0.0, ratio - (row.ratio_q1 or ratio)) for row, ratio in zip(chosen, ratios, strict=True)]
    high = [max(0.0, (row.ratio_q3 or ratio) - ratio) for row, ratio in zip(chosen, ratios, strict=True)]
    colours = ["#1f77b4" if row.variant.startswith("ours_") else "#b0b0b0" for row in chosen]
    axis.barh([row.title for row in chosen], ratios, xerr=[low, high], color=colours, ecolor="#404040", capsize=2)
    axis.axvline(1.0, color="#1f77b4", linewidth=0.8)
    for index, (row, ratio, whisker) in enumerate(zip(chosen, ratios, high, strict=True)):
        note = ", no quiet round" if row.noisy else ""
        ms = (row.median_ms or 0.0) / row.micro_batches
        axis.text(ratio + whisker, index, f"  {ratio:.2f}x, {ms:.2f} ms{note}", va="center", fontsize=8)
    axis.set_xlim(0, 1.5 * max(ratio + whisker for ratio, whisker in zip(ratios, high, strict=True)))
    axis.set_title(title_of(chosen[0]), fontsize=9)
    axis.tick_params(labelsize=8)
