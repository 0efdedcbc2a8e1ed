"""What is on the pictures, by the artists that are drawn, and the files that come of them."""

import math
from itertools import pairwise

import pytest
import torch

from sam_fused.sharpness import Line, LossSurface, Plane, along, between, measure, plane
from sam_fused.sharpness.pictures import _levels
from tests.optim.helpers import assert_one_sentence
from tests.sharpness.problems import Net, batch_norm_case, cut, quadratic, surface_of

pytestmark = pytest.mark.cpu_only

TICKS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws anything that can be plotted, and gives its figure."""
    figures = []

    def save(figure, path):
        figure.savefig(tmp_path / "picture.png")  # lays it out, warnings included
        figures.append(figure)
        return path

    monkeypatch.setattr("sam_fused.sharpness.pictures._save", save)

    def draw(result):
        result.plot(tmp_path / "picture.png")
        return figures.pop()

    return draw


def grid(function, **kwargs):
    return Plane(TICKS, TICKS, tuple(tuple(float(function(a, b)) for b in TICKS) for a in TICKS), **kwargs)


def line_report(**kwargs):
    """A cubic term: no line is symmetric."""
    surface = surface_of(lambda w: (w * w @ torch.tensor([2.0, 0.5]).double() + w**3 @ torch.ones(2).double())[0], [[0.1, 0.2]])
    short = {"points": 5, "average_directions": 4, "trace_samples": 4, "worst_steps": 3}
    return measure(surface.model, surface._loss, surface._batches, rho=0.3, top_k=2, **short, **kwargs)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_report_shows_its_lines_its_rises_and_its_eigenvalues(drawn):
    report = line_report()
    figure = drawn(report)
    lines, bars = figure.axes
    shown = {line.get_label(): tuple(map(tuple, line.get_data())) for line in lines.lines}
    for name, label in (("eigenvector", "eigenvector"), ("gradient", "gradient"), ("random", "random direction")):
        found = report.lines[name]
        assert found.losses[0] != pytest.approx(found.losses[-1], rel=1e-3)
        assert shown[label] == (found.positions, found.losses)
    for name, rise in (("worst", report.worst), ("ascent", report.ascent), ("average", report.average.mean)):
        (label,) = (label for label in shown if label.startswith(f"{name} at ρ"))
        assert f"{rise:+.3g}" in label and shown[label] == ((0.3,), (report.loss + rise,))
    assert [bar.get_height() for bar in bars.patches] == list(report.eigenvalues)
    assert [text.get_text() for text in bars.texts] == [f"{value:.3g}" for value in report.eigenvalues]
    title = figure.get_suptitle()
    assert "0.3" in title and "D = 2" in title and "4 samples" in title


# ---- planes ----------------------------------------------------------------------------------------------------------


def test_the_first_direction_goes_to_the_right(drawn):
    """The loss depends on the first alone: contour lines are upright."""
    axes = drawn(grid(lambda a, b: a + 2)).axes[0]
    paths = [path for path in axes.collections[1].get_paths() if len(path)]
    assert len(paths) > 10
    for path in paths:
        assert path.vertices[:, 0].std() < 1e-9 < path.vertices[:, 1].std()


@pytest.mark.parametrize("outlier", [1e3, 1e30, math.inf, math.nan, 1e308])
def test_one_cell_far_above_does_not_hide_the_others(drawn, outlier):
    values = grid(lambda a, b: outlier if a == b == 1 else a + b + 3)
    axes = drawn(values).axes[0]
    levels = axes.collections[0].levels
    assert len(levels) == 21 and levels[-1] <= 5 and levels[0] == 1
    assert (axes.patch.get_hatch() is not None) == (not outlier < 1e100)
    assert axes.collections[0].extend == ("max" if outlier < 1e100 else "neither")


def test_half_of_the_colours_are_for_the_lower_half_of_the_cells():
    losses = [0.1 + (n / 10) ** 6 for n in range(11)]
    levels = _levels(losses)
    assert (levels[0], levels[-1]) == (0.1, 1.1) and sorted(levels) == levels
    assert levels[10] == pytest.approx(losses[5], rel=1e-9)


@pytest.mark.parametrize("function", [lambda a, b: 1.0, lambda a, b: 0.0, lambda a, b: math.nan, lambda a, b: 1 + 1e-13 * a])
def test_planes_without_contours(drawn, function):
    axes = drawn(grid(function)).axes[0]
    assert (axes.patch.get_hatch() is not None) == math.isnan(function(0, 0))


def test_a_plane_without_extent(drawn):
    figure = drawn(plane(quadratic([1.0, 2.0]), (torch.ones(2), torch.ones(2)), radius=0.0, points=3, filter_normalize=False))
    assert "radius 0" in figure.axes[0].get_title()


def test_axes_say_what_the_directions_were(drawn):
    surface = Net().surface()
    labels = []
    for kind in ("random", "eigenvectors"):
        for scaled in (True, False):
            found = plane(surface, kind, points=2, radius=0.1, filter_normalize=scaled)
            assert (found.kind, found.filter_normalized) == (kind, scaled)
            axes = drawn(found).axes[0]
            labels.append((axes.get_xlabel(), axes.get_title()))
    top = f"{found.eigenvalues[0]:.3g}"
    assert labels[0][0] == "first random direction, filter-normalised" and labels[1][0] == "first random direction"
    assert labels[2][0] == f"first eigenvector (λ = {top}), filter-normalised" and "no eigenvectors any more" in labels[2][1]
    assert labels[3] == (f"first eigenvector (λ = {top})", "")


def test_ticks_do_not_collide(drawn):
    ticks = tuple(tick * 1e-4 for tick in TICKS)
    figure = drawn(Plane(ticks, ticks, grid(lambda a, b: a + b).losses))
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) >= 3
    assert not any(left.overlaps(right) for left, right in pairwise(boxes))


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_lines(drawn):
    case = Net()
    line = along(case.surface(), torch.ones(989), radius=0.1, points=5)
    axes = drawn(line).axes[0]
    assert tuple(map(tuple, axes.lines[0].get_data())) == (line.positions, line.losses)
    state = case.model.state_dict()
    path = between(case.surface(), state, state, positions=2)
    assert path.kind == "between" and "checkpoint" in drawn(path).axes[0].get_xlabel()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    report = line_report()
    again = [report.plot(tmp_path / f"{n}.png") for n in range(2)]
    assert again[0].read_bytes().startswith(b"\x89PNG") and again[0].read_bytes() == again[1].read_bytes()
    assert report.plot(str(tmp_path / "report.svg")).read_text().startswith("<?xml")
    for result in (report, grid(lambda a, b: a), Line((0.0, 1.0), (1.0, 2.0))):
        path = result.plot(tmp_path / "name")
        assert path == tmp_path / "name.png" and path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
        with pytest.raises(ValueError) as raised:
            result.plot(tmp_path / "name.v2")
        assert_one_sentence(raised.value, "path", "png", "'.v2'")


@pytest.mark.parametrize("result", [grid(lambda a, b: math.inf if a == 1 else a * b), Line((0.0, 1.0), (math.nan, -math.inf))])
def test_json_there_and_back(tmp_path, result):
    text = result.to_json(tmp_path / "result.json")
    for source in (text, tmp_path / "result.json", str(tmp_path / "result.json")):
        assert repr(type(result).from_json(source)) == repr(result)
    other = Line if isinstance(result, Plane) else Plane
    with pytest.raises(ValueError) as raised:
        other.from_json(text)
    assert_one_sentence(raised.value, "source", other.__name__.lower())


def test_a_plane_of_eigenvectors_comes_back_whole():
    grid = plane(Net().surface(), "eigenvectors", points=2)
    assert Plane.from_json(grid.to_json()) == grid and len(grid.eigenvalues) == 2


def test_vectors_alone_have_no_plane_by_filters():
    """All of the picture would be one value."""
    model, x, y = batch_norm_case()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    surface = LossSurface(model, torch.nn.functional.mse_loss, cut(x, y, 5))
    with pytest.raises(ValueError) as raised:
        plane(surface, points=3)
    assert_one_sentence(raised.value, "directions", "filter normalisation", "vectors='scale'")
    found = plane(surface, points=3, vectors="scale")
    assert len({loss for row in found.losses for loss in row}) == 9
