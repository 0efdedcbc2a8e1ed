"""Every baseline computes SAM: the same weights as naive SAM, which itself matches the formula in fp64."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, variants
from benchmarks.baselines import BASES, RHO, NaiveSAM
from benchmarks.cases import make_gradients, make_parameters
from benchmarks.variants import (
    BASELINES,
    CALL_FORMS,
    FUSED_BASE,
    UNFUSED_BASE,
    Form,
    Variant,
    backend_missing,
    ours,
)
from tests.benchmarks.accesses import AccessCounter

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(17, 5), (33,), (4, 3, 3, 3)]
STEPS = 5


def forms(variants: tuple[Variant, ...]) -> list[Any]:
    return [
        pytest.param(variant, form, id=f"{variant.name}-{form.name}".replace(" ", "_"))
        for variant in variants
        for form in variant.forms
    ]


def trajectory(form: Form, base: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights after some steps whose gradients depend on the weights of the moment, so that the ascent is seen.

    Each element's gradient depends on another element: AdamW, blind to an element's own scale, has to see it too.
    """

    def gradients_here(params: list[Tensor], noise: list[Tensor]) -> None:
        for p, shift in zip(params, noise, strict=True):
            p.grad = 4.0 * p.detach().flip(0) + shift

    monkeypatch.setattr(variants, "assign_gradients", gradients_here)
    params = list(make_parameters(SHAPES, 0))
    driver = form.build(params, base)
    for step in range(STEPS):
        driver.step(iter((make_gradients(SHAPES, 2 * step + 10), make_gradients(SHAPES, 2 * step + 11))))
    return [p.detach().clone() for p in params]


NAIVE = BASELINES[0].forms[0]
OURS = tuple(ours(backend, form) for backend in ("native", "foreach", "reference") for form in CALL_FORMS)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("variant", "form"), forms((*BASELINES[1:], *OURS)))
def test_same_weights_as_naive(variant: Variant, form: Form, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = variant.why_not()
    if reason is not None:
        pytest.skip(reason)
    expected = trajectory(NAIVE, base, monkeypatch)
    for reached, wanted in zip(trajectory(form, base, monkeypatch), expected, strict=True):
        torch.testing.assert_close(reached, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_the_ascent_moves_the_weights_far_beyond_the_tolerance(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparison above would accept a baseline that forgets to perturb."""
    with_ascent = trajectory(NAIVE, base, monkeypatch)
    monkeypatch.setattr(baselines, "RHO", 0.0)
    without = trajectory(NAIVE, base, monkeypatch)
    for perturbed, plain in zip(with_ascent, without, strict=True):
        assert (perturbed - plain).abs().max() > 1e-4


def test_naive_matches_the_formula_where_the_second_gradient_depends_on_the_ascent() -> None:
    """Loss 1/2 sum a w^2, gradient a w: SAM's gradient is a (w + rho g / |g|), in fp64 by hand."""
    settings = BASES["sgd"][1]
    w = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)
    curvature = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    p = torch.nn.Parameter(w.float())
    optimizer = NaiveSAM([p], "sgd")
    momentum = torch.zeros_like(w)
    for _ in range(STEPS):
        p.grad = (curvature * p.detach()).float()
        optimizer.first_step()
        p.grad = (curvature * p.detach()).float()
        optimizer.second_step()
        clean = curvature * w
        ascent = curvature * (w + RHO * clean / clean.norm())
        momentum = settings["momentum"] * momentum + ascent + settings["weight_decay"] * w
        w = w - settings["lr"] * momentum
    torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("variant", "form"), forms(tuple(variant for variant in BASELINES if variant.name != "torch_compile")))
def test_documented_accesses_are_those_of_the_operators(variant: Variant, form: Form, base: str) -> None:
    reason = variant.why_not()
    if reason is not None:
        pytest.skip(reason)
    shapes = [(1000,), (1500,), (2000,)]
    driver = form.build(list(make_parameters(shapes, 0)), base)
    grads = make_gradients(shapes, 1), make_gradients(shapes, 2)
    for _ in range(2):
        driver.step(iter(grads))
    with AccessCounter() as counter:
        driver.step(iter(grads))
    assert form.accesses is not None
    assert counter.elements / 4500 == form.accesses + form.base_accesses[base]


def test_accesses_of_ours_are_the_op_layers() -> None:
    from sam_fused.ops.schema import OPS

    cost = {name: sum(op.accesses) for name, op in OPS.items()}
    ascent = cost["grad_norm"] + cost["perturb_"]
    for form in ("first/second", "closure"):
        assert ours("native", form).forms[0].accesses == ascent == 5
    assert ours("native", "perturbed").forms[0].accesses == ascent + cost["restore_"] == 7
    assert {"sgd": cost["restore_sgd_"], "adamw": cost["restore_adamw_"]} == FUSED_BASE
    assert all(UNFUSED_BASE[base] > FUSED_BASE[base] for base in BASES)


def test_a_missing_package_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {variant.name: variant.why_not() for variant in BASELINES}
    assert "pip install --no-deps" in str(reasons["pytorch_optimizer_foreach"])
    assert reasons["naive"] is None
    assert "nothing_of_this_name" in str(backend_missing("nothing_of_this_name"))
