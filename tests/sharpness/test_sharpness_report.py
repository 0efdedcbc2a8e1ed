"""One call, and what can be done with what it gives."""

import json
import math
from dataclasses import replace

import numpy
import pytest
import torch
from torch.nn.functional import mse_loss

from sam_fused.sharpness import (
    EigenvaluesNotConverged,
    Estimate,
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
    assert plain["format"] == 1 and plain["dtype"] == plain["loss_dtype"] == "float64"
    assert plain["average"]["samples"] == 4 and len(plain["eigenvalues"]) == 3


def test_json_of_what_json_has_no_number_for(report):
    strange = replace(report, alignment=math.nan, lines={"gradient": Line((-1.0, 1.0), (math.inf, -math.inf))})
    text = strange.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = SharpnessReport.from_json(text)
    assert math.isnan(back.alignment) and back.lines == strange.lines


@pytest.mark.parametrize(
    "text",
    ['{"format": 2}', "{}", '{"record": "sharpness report", "format": 2, "loss": 3}', "[1]", "{bad", "{", '{"a": "\\u12"}'],
)
def test_other_json_is_refused(text):
    with pytest.raises(ValueError) as raised:
        SharpnessReport.from_json(text)
    assert_one_sentence(raised.value, "source", "sharpness report")


@pytest.mark.parametrize("change", [('"mean"', '"men"'), ('"positions"', '"places"'), ('"rho": 0.2', '"rho": "far"')])
def test_json_with_other_entries_inside_is_refused(report, change):
    text = report.to_json()
    assert change[0] in text
    with pytest.raises(ValueError) as raised:
        SharpnessReport.from_json(text.replace(*change))
    assert_one_sentence(raised.value, "sharpness report", "other entries")


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for source, error in (
        (tmp_path / "missing.json", FileNotFoundError),
        (str(tmp_path / "missing.json"), FileNotFoundError),
        (tmp_path, IsADirectoryError),
        (tmp_path / "bytes.json", ValueError),
        (5, TypeError),
    ):
        with pytest.raises(error) as raised:
            SharpnessReport.from_json(source)
        assert_one_sentence(raised.value, "source", "sharpness report")


def test_print(report, capsys):
    report.print()
    text = capsys.readouterr().out
    for value in (report.loss, report.worst, report.ascent, report.average.mean, report.eigenvalues[1], report.trace.mean):
        assert f"{value:.6g}" in text
    assert "84 parameters, float64, 13 samples" in text and "eval" in text and report.worst_start in text
    assert f"{report.passes} passes" in text and "rounding" not in text
    # Beside what was measured: what it tends to at a small rho.
    worst, average = 0.02 * report.eigenvalues[0], 0.04 / 168 * report.trace.mean
    assert report.worst_at_small_rho == pytest.approx(worst) and report.average_at_small_rho == pytest.approx(average)
    assert f"λ1 = {worst:.6g}" in text and f"tr = {average:.6g}" in text


def test_rises_below_the_losses_last_digit_are_said_to_be():
    model, x, y = batch_norm_case(torch.float32)
    report = measure(model, mse_loss, cut(x, y, 5), rho=1e-7, **SHORT)
    assert (report.dtype, report.loss_dtype) == ("float32", "float32")
    assert report.resolution == pytest.approx(2**-23 * report.loss)
    assert "rounding: " in str(report) and "average direction: less than" in str(report) and "float32" in str(report)
    # Not measured, but known: nothing is above the weights' own loss, and nothing is up from a gradient of zero.
    known = replace(report, worst=0.0, worst_start="none", ascent=0.0, gradient_norm=0.0, average=Estimate(1.0, 0.1, 4))
    assert "rounding" not in str(known) and "rounding" not in str(replace(report, rho=0.0))


def test_eigenvalues_may_be_had_less_exactly():
    case = Net()
    passes = [
        measure(case.model, case.loss, case.batches, top_k=6, tolerance=tolerance, **SHORT).passes for tolerance in (0.5, 1e-12)
    ]
    assert passes[0] < passes[1]
    with pytest.raises(EigenvaluesNotConverged, match="within 1 restarts"):
        measure(case.model, case.loss, case.batches, **SHORT, tolerance=1e-14, max_restarts=1)


def test_the_search_for_the_worst_has_the_reports_seed_and_starts(monkeypatch):
    asked = {}

    def search(*args, **kwargs):
        asked.update(kwargs)
        return worst_sharpness(*args, **kwargs)

    monkeypatch.setattr("sam_fused.sharpness.report.worst_sharpness", search)
    small(seed=5, random_starts=3)
    assert (asked["seed"], asked["random_starts"], asked["steps"]) == (5, 3, 3)


def test_numbers_of_numpy_are_numbers():
    report = small(seed=numpy.int64(3), top_k=numpy.int64(2), rho=numpy.float32(0.25))
    assert SharpnessReport.from_json(report.to_json()) == report == small(seed=3, top_k=2, rho=0.25)


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
