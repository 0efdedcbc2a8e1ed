"""The four-dimensional toy of 2211.05729, whose sharpness is known by hand.

``L = 0.5 F1(x1, x2) x3^2 + 0.5 F2(x1, x2) x4^2``: where x3 = x4 = 0 the loss is 0, its gradient too, and the Hessian is that of
x3 and x4 alone, diag(F1, F2).
"""

import math

import pytest
import torch

from sam_fused.sharpness import alignment, ascent_sharpness, average_sharpness, worst_sharpness
from tests.sharpness.problems import f1, f2, toy

pytestmark = pytest.mark.cpu_only

FLOOR = [(0.0, 0.0), (0.5, 0.5), (1.0, -0.5), (-1.0, 1.0)]


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_worst_where_it_is_exact(rho):
    """At x1 = x2 = 0 nothing is won by a step in x1 and x2: (rho^2 - r^2) max(8 + 6 r^2, F2) falls with its length r."""
    found = worst_sharpness(toy([0.0, 0.0, 0.0, 0.0]), rho)
    assert found.value == pytest.approx(rho**2 / 2 * 8, rel=1e-12)
    assert found.direction.abs().tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize(("x1", "x2"), FLOOR)
def test_worst_at_a_small_radius(x1, x2):
    """rho^2 / 2 max(F1, F2), but for a share of rho^2 |grad F|^2 / 4 F^2: below 1e-6."""
    found = worst_sharpness(toy([x1, x2, 0.0, 0.0]), 1e-3)
    assert found.value == pytest.approx(1e-6 / 2 * max(f1(x1, x2), f2(x1, x2)), rel=1e-5)


@pytest.mark.parametrize(("x1", "x2"), FLOOR)
def test_average_at_any_radius(x1, x2):
    """rho^2 / 8 (F1 + F2) + rho^4 / 48 (1 + 6 + 4 + 1): second and fourth moments of the sphere are 1/4 and 1/24."""
    for rho in (0.1, 1.0):
        found = average_sharpness(toy([x1, x2, 0.0, 0.0]), rho, directions=1000)
        exact = rho**2 / 8 * (f1(x1, x2) + f2(x1, x2)) + rho**4 / 4
        assert abs(found.mean - exact) < 4 * found.standard_error < 0.2 * exact


@pytest.mark.parametrize(("x1", "x2"), FLOOR)
def test_on_the_floor_there_is_no_ascent(x1, x2):
    surface = toy([x1, x2, 0.0, 0.0])
    assert ascent_sharpness(surface, 0.1) == 0.0 and math.isnan(alignment(surface))


@pytest.mark.parametrize(("x1", "x2"), FLOOR)
def test_the_gradient_off_the_floor(x1, x2):
    point = toy([x1, x2, 0.3, 0.0]).gradient()
    assert point.loss == pytest.approx(0.045 * f1(x1, x2), rel=1e-13)
    assert point.gradient.tolist() == pytest.approx([0.045 * 2 * x1, 0.045 * 12 * x2, 0.3 * f1(x1, x2), 0.0], rel=1e-13)


def test_the_ascent_goes_up_the_wall():
    """At x1 = x2 = 0 the gradient is along x3, and F1 = 8 there: 4 (x3 + rho)^2 - 4 x3^2. So is the top eigenvector."""
    surface = toy([0.0, 0.0, 0.3, 0.0])
    assert ascent_sharpness(surface, 0.1) == pytest.approx(4 * (0.4**2 - 0.3**2), rel=1e-13)
    assert alignment(surface) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("x1", [0.5, 0.8])
def test_alignment_off_the_floor(x1):
    """With x2 = x4 = 0 the Hessian in x1 and x3 is [[a^2, 2 x1 a], [2 x1 a, F1]], a = x3: its axis turns by half an arctan."""
    a = 0.3
    top = 0.5 * math.atan2(2 * 2 * x1 * a, f1(x1, 0.0) - a**2)
    gradient = torch.tensor([x1 * a**2, f1(x1, 0.0) * a], dtype=torch.float64)
    expected = abs(gradient[0] * math.sin(top) + gradient[1] * math.cos(top)) / gradient.norm()
    found = alignment(toy([x1, 0.0, a, 0.0]))
    assert 0.9 < found < 1 - 1e-5 and found == pytest.approx(expected.item(), rel=1e-10)


def test_alignment_with_the_other_function_on_top():
    """At x1 = -1 F2 = 18 is above F1 = 9: the top eigenvector is along x4, where the gradient has nothing."""
    assert alignment(toy([-1.0, 0.0, 0.3, 0.0])) == pytest.approx(0.0, abs=1e-12)
