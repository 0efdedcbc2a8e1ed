"""One call, and what can be done with what it gives."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

from sam_fused.sharpness import (
    Line,
    SharpnessReport,
    alignment,
    ascent_sharpness,
    average_sharpness,
    hessian_trace,
    measure,
    top_eigenvalues,
    worst_sharpness,
)
from tests.optim.helpers import assert_one_sentence
from tests.sharpness.problems import Net, batch_norm_case, cut

pytestmark = pytest.mark.cpu_only

SHORT = {"points": 5, "average_directions": 4, "trace_samples": 6, "worst_steps": 3}


def small(seed=0, **kwargs):
    """84 weights: a report in a fraction of a second."""
    model, x, y = batch_norm_case()
    return measure(model, mse_loss, cut(x, y, 5), seed=seed, **{"rho": 0.2, "top_k": 3, **SHORT, **kwargs})


@pytest.fixture(scope="module")
def report():
    return small()


def test_a_report_is_what_its_parts_are():
    case = Net()
    report = measure(case.model, case.loss, case.batches, rho=0.2, top_k=2, seed=4, **SHORT)
    surface = case.surface()
    spectrum = top_eigenvalues(surface, 2, seed=4)
    point = surface.gradient()
    worst = worst_sharpness(surface, 0.2, steps=3, seed=4)
    assert report.loss == point.loss and report.gradient_norm == point.gradient.norm().item()
    assert report.eigenvalues == tuple(spectrum.values.tolist())
    assert (report.worst, report.worst_start) == (worst.value, worst.start)
    assert report.ascent == ascent_sharpness(surface, 0.2)
    assert report.average == average_sharpness(surface, 0.2, directions=4, seed=4)
    assert report.trace == hessian_trace(surface, samples=6, seed=4)
    assert report.alignment == alignment(surface, eigenvector=spectrum.vectors[0])
    assert report.parameters == 989 and report.samples == 50
    assert list(report.lines) == ["eigenvector", "gradient", "random"]
    for line in report.lines.values():
        assert line.positions == pytest.approx([-0.6, -0.3, 0.0, 0.3, 0.6]) and line.losses[2] == report.loss
    # Directions of length 1: the curvature along the first is the top eigenvalue, the slope along the second the norm.
    fine = measure(case.model, case.loss, case.batches, radius=1e-3, **{**SHORT, "points": 3}).lines
    low, middle, high = fine["eigenvector"].losses
    assert (low - 2 * middle + high) / 1e-6 == pytest.approx(report.eigenvalues[0], rel=1e-3)
    assert (fine["gradient"].losses[2] - fine["gradient"].losses[0]) / 2e-3 == pytest.approx(report.gradient_norm, rel=1e-3)


def test_passes_are_counted():
    model, x, y = batch_norm_case()
    calls = []
    batches = cut(x, y, 5)
    report = measure(model, lambda a, b: calls.append(1) or mse_loss(a, b), batches, **SHORT)
    assert report.passes * len(batches) == len(calls)


def test_seeds(report):
    assert small() == report
    other = small(seed=1)
    assert other.average != report.average and other.trace != report.trace
    assert other.lines["random"] != report.lines["random"]
    assert (other.loss, other.ascent) == (report.loss, report.ascent)


def test_json_there_and_back(report, tmp_path):
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert SharpnessReport.from_json(text) == report == SharpnessReport.from_json(path) == SharpnessReport.from_json(str(path))
    plain = json.loads(text)
    assert plain["format"] == 1 and plain["average"]["samples"] == 4 and len(plain["eigenvalues"]) == 3


def test_json_of_what_json_has_no_number_for(report):
    strange = replace(report, alignment=math.nan, lines={"gradient": Line((-1.0, 1.0), (math.inf, -math.inf))})
    text = strange.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = SharpnessReport.from_json(text)
    assert math.isnan(back.alignment) and back.lines == strange.lines


@pytest.mark.parametrize("text", ['{"format": 2}', "{}", '{"format": 1, "loss": 3}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError) as raised:
        SharpnessReport.from_json(text)
    assert_one_sentence(raised.value, "report")


def test_print(report, capsys):
    report.print()
    text = capsys.readouterr().out
    for value in (report.loss, report.worst, report.ascent, report.average.mean, report.eigenvalues[1], report.trace.mean):
        assert f"{value:.6g}" in text
    assert "84 parameters, 13 samples" in text and "eval" in text and report.worst_start in text


def test_a_picture(report, tmp_path):
    paths = [report.plot(tmp_path / f"{n}.png") for n in range(2)]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[0].read_bytes() == paths[1].read_bytes()
    assert report.plot(str(tmp_path / "report.svg")).read_text().startswith("<?xml")


def test_at_a_stationary_point_there_is_no_line_along_the_gradient(tmp_path):
    model = torch.nn.Linear(3, 1, bias=False).double()
    x = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)
    report = measure(model, mse_loss, [(x, x.sum(1, keepdim=True))], rho=0.1, top_k=3, **SHORT)
    assert report.loss == 0.0 and report.ascent == 0.0 and math.isnan(report.alignment)
    assert report.eigenvalues == pytest.approx([6.0, 8 / 3, 2 / 3]) and report.trace.mean == pytest.approx(28 / 3)
    assert report.worst == pytest.approx(0.01 / 2 * 6.0)
    assert list(report.lines) == ["eigenvector", "random"]
    report.plot(tmp_path / "report.png")
    assert math.isnan(SharpnessReport.from_json(report.to_json()).alignment)
