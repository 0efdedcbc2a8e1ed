"""Worst, ascent and average direction against closed forms, and the search for the worst."""

import math

import pytest
import torch

from sam_fused.sharpness import ascent_sharpness, average_sharpness, worst_sharpness
from tests.sharpness.problems import Net, quadratic, surface_of

pytestmark = pytest.mark.cpu_only

RHO = 0.1


def test_worst_at_the_minimum_of_a_quadratic():
    """rho^2 / 2 times the top eigenvalue; at the minimum there is no gradient to start from."""
    found = worst_sharpness(quadratic([4.0, 1.0]), RHO)
    assert found.value == pytest.approx(0.02, rel=1e-9)
    assert found.direction.abs().tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    # By power iteration alone, without the answer as a start: the angle shrinks by 4 a step.
    powers = worst_sharpness(quadratic([4.0, 1.0]), RHO, starts=["random"], steps=30)
    assert powers.value == pytest.approx(0.02, rel=1e-9) and powers.start == "random 0"


@pytest.mark.parametrize("directions", [64, 1024])
def test_average_at_the_minimum_of_a_quadratic(directions):
    """rho^2 / (2 D) times the trace. With v = (cos t, sin t) the samples are .005 + .015 cos^2 t: their deviation is .00530."""
    found = average_sharpness(quadratic([4.0, 1.0]), RHO, directions=directions)
    expected_error = 0.015 / math.sqrt(8) / math.sqrt(directions)
    assert found.samples == directions
    assert found.standard_error == pytest.approx(expected_error, rel=0.25)
    assert abs(found.mean - 0.0125) < 4 * expected_error


def test_average_of_a_sphere_is_exact():
    """Every direction of length rho rises by the same: an unnormalised v would not."""
    found = average_sharpness(quadratic([2.0] * 7), RHO, directions=5)
    assert found.mean == pytest.approx(0.01, rel=1e-12) and found.standard_error < 1e-15


@pytest.mark.parametrize(("at", "rise"), [([0.01, 0.0], 0.024), ([0.0, 0.01], 0.006)])
def test_ascent_on_a_quadratic(at, rise):
    surface = quadratic([4.0, 1.0], at)
    assert ascent_sharpness(surface, RHO) == pytest.approx(rise, rel=1e-12)
    assert worst_sharpness(surface, RHO).value == pytest.approx(max(rise, 0.02), rel=0.02)


def test_a_zero_gradient_does_not_ascend():
    assert ascent_sharpness(quadratic([4.0, 1.0]), RHO) == 0.0


def test_the_centre_of_the_ball_is_allowed():
    """At a maximum nothing on the sphere is higher: the worst rise is 0, at v = 0."""
    found = worst_sharpness(quadratic([-4.0, -1.0]), RHO)
    assert found.value == 0.0 and found.start == "none" and not found.direction.any()


def test_a_strong_negative_curvature_does_not_capture_the_search():
    """The fixed-point step alone goes to the eigenvalue of the largest magnitude, where the loss falls."""
    surface = quadratic([-4.0, 1.0, 0.5])
    found = worst_sharpness(surface, RHO, starts=["random"], steps=100)
    assert found.value == pytest.approx(0.005, rel=1e-3)


def test_both_signs_of_the_eigenvector_are_tried():
    """A cubic term makes one side higher, and which one an eigenvector points to is chance."""
    for sign in (1.0, -1.0):
        surface = surface_of(lambda w, sign=sign: 2 * w[0] ** 2 + 0.5 * w[1] ** 2 + sign * 5 * w[0] ** 3, [0.0, 0.0])
        found = worst_sharpness(surface, RHO, starts=["eigenvector"], steps=1)
        assert found.value == pytest.approx(0.025, rel=1e-9)
        assert found.direction[0].item() == pytest.approx(sign, rel=1e-9)


def test_on_a_net_the_worst_is_above_the_others_and_stationary():
    case = Net()
    surface = case.surface()
    point = surface.gradient()
    worst = worst_sharpness(surface, 0.3, point=point, steps=20)
    assert worst.value >= ascent_sharpness(surface, 0.3, point=point) > 0
    average = average_sharpness(surface, 0.3, point=point, directions=16)
    assert worst.value > average.mean + 10 * average.standard_error
    assert worst.value == pytest.approx(surface.loss(0.3 * worst.direction) - point.loss, rel=1e-12)
    uphill = surface.gradient(0.3 * worst.direction).gradient
    assert (uphill @ worst.direction / uphill.norm()).item() > 1 - 1e-4


def test_rho_zero_rises_by_nothing():
    surface = Net().surface()
    assert ascent_sharpness(surface, 0.0) == 0.0
    assert worst_sharpness(surface, 0.0, starts=["gradient"]).value == 0.0
    average = average_sharpness(surface, 0, directions=3)
    assert average.mean == 0.0 and average.standard_error == 0.0


def test_seeds():
    surface = Net().surface()
    same = [average_sharpness(surface, RHO, directions=4, seed=seed) for seed in (5, 5, 6)]
    assert same[0] == same[1] != same[2]
    worst = [worst_sharpness(surface, RHO, starts=["random"], steps=3, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(worst[0].direction, worst[1].direction) and not torch.equal(worst[0].direction, worst[2].direction)
