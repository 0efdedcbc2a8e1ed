"""Eigenvalues, trace and alignment against Hessians that are known whole."""

import math

import pytest
import torch

from sam_fused.sharpness import (
    EigenvaluesNotConverged,
    Estimate,
    LossSurface,
    alignment,
    hessian_trace,
    random_direction,
    top_eigenvalues,
)
from sam_fused.sharpness.directions import generator, normal
from tests.optim.helpers import assert_one_sentence
from tests.sharpness.problems import Net, f1, f2, quadratic, surface_of, toy

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def case():
    return Net()


@pytest.fixture(scope="module")
def hessian(case):
    return case.hessian()


def test_products_are_the_full_hessians(case, hessian):
    vectors = torch.randn(3, 989, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = case.surface().hessian_product(vectors)
    torch.testing.assert_close(products, vectors @ hessian, rtol=1e-10, atol=1e-12)
    assert torch.equal(case.surface().hessian_product(vectors[1]), products[1])


def test_products_at_an_offset(case):
    offset = 0.1 * torch.randn(989, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    vector = torch.randn(989, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    point = case.flat + offset
    expected = torch.func.jvp(torch.func.grad(case.flat_loss), (point,), (vector,))[1]
    surface = case.surface()
    torch.testing.assert_close(surface.hessian_product(vector, offset), expected, rtol=1e-10, atol=1e-12)
    found = surface.gradient(offset)
    torch.testing.assert_close(found.gradient, torch.func.grad(case.flat_loss)(point), rtol=1e-10, atol=1e-13)
    assert found.loss == pytest.approx(case.flat_loss(point).item(), rel=1e-13) == surface.loss(offset)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_top_eigenvalues_of_a_net(case, hessian, which):
    values, vectors = torch.linalg.eigh(hessian)
    key = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    order = key.argsort(descending=True)[:4]
    found = top_eigenvalues(case.surface(), 4, which=which)
    torch.testing.assert_close(found.values, values[order], rtol=1e-6, atol=0)
    cosines = (found.vectors * vectors.T[order]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-6, atol=0)
    residual = (found.vectors @ hessian - found.values[:, None] * found.vectors).norm(dim=1)
    assert (residual < 1e-3 * found.values.abs()).all()
    assert found.products < 200


def test_top_eigenvalue_in_float32_and_bfloat16(hessian):
    exact = torch.linalg.eigvalsh(hessian)[-1].item()
    # In the model's own arithmetic the Hessian is another one: its weights are rounded to 2^-24 and 2^-9 of themselves.
    assert top_eigenvalues(Net(torch.float32).surface()).values[0].item() == pytest.approx(exact, rel=1e-5)
    found = top_eigenvalues(Net(torch.bfloat16).surface(), tolerance=1e-3).values[0].item()
    assert found == pytest.approx(exact, rel=3e-2)


def test_hutchinson_on_a_net(case, hessian):
    """Unbiased, and with the standard error that its variance has: 2 times the squares beside the diagonal."""
    beside = hessian - torch.diag(hessian.diagonal())
    exact, error = hessian.trace().item(), math.sqrt(2 * beside.square().sum().item() / 400)
    found = hessian_trace(case.surface(), samples=400)
    assert found.samples == 400
    assert found.standard_error == pytest.approx(error, rel=0.2)
    assert abs(found.mean - exact) < 4 * error
    # Every unit vector instead of random signs: the trace itself.
    assert case.surface().hessian_product(torch.eye(989, dtype=torch.float64)).trace().item() == pytest.approx(exact, rel=1e-10)


def test_vectors_may_share_passes_or_not(case, monkeypatch):
    surface = case.surface()
    together = hessian_trace(surface, samples=5)
    assert surface.passes == 1
    monkeypatch.setattr("sam_fused.sharpness.hessian._ELEMENTS_PER_PASS", 2 * 989)
    apart = hessian_trace(surface, samples=5)
    assert surface.passes == 1 + 3 and apart.samples == 5
    assert apart.mean == pytest.approx(together.mean, rel=1e-12)


def test_hutchinson_is_exact_on_a_diagonal():
    found = hessian_trace(quadratic([4.0, 1.0, -2.0, 0.5]), samples=7)
    assert (found.mean, found.standard_error, found.samples) == (3.5, 0.0, 7)


@pytest.mark.parametrize(("x1", "x2"), [(0.5, 0.5), (0.0, 0.0), (0.8, 1 / 7)])
def test_the_toys_eigenvalues_are_its_two_functions(x1, x2):
    surface = toy([x1, x2, 0.0, 0.0])
    top, low = f1(x1, x2), f2(x1, x2)
    assert top > low
    assert top_eigenvalues(surface, 4).values.tolist() == pytest.approx([top, low, 0.0, 0.0], rel=1e-12)
    assert hessian_trace(surface, samples=2).mean == pytest.approx(top + low, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 20, 21, 22, 60])
def test_small_problems_are_solved_whole_and_larger_ones_by_lanczos(dimension):
    diagonal = [float(n) for n in range(1, dimension + 1)]
    for k in sorted({1, min(3, dimension), dimension // 2 or 1, dimension}):
        found = top_eigenvalues(quadratic(diagonal), k)
        assert found.values.tolist() == pytest.approx(diagonal[::-1][:k], rel=1e-6)
        assert found.vectors.shape == (k, dimension)
        assert found.vectors.abs().argmax(1).tolist() == [dimension - 1 - n for n in range(k)]


@pytest.mark.parametrize("diagonal", [[3.0] + [0.0] * 39, [1.0] * 40, [0.0] * 40])
def test_degenerate_hessians(diagonal):
    """Lanczos finds an invariant subspace at once, and goes on with a random vector: from a generator of ours."""
    first, second = (top_eigenvalues(quadratic(diagonal), 3) for _ in range(2))
    assert first.values.tolist() == pytest.approx(diagonal[:3], abs=1e-9)
    assert torch.equal(first.vectors, second.vectors)
    torch.testing.assert_close(first.vectors @ first.vectors.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_loss_that_is_linear_has_no_curvature():
    surface = surface_of(lambda w: w.sum(), [1.0] * 40)
    assert top_eigenvalues(surface, 2).values.tolist() == [0.0, 0.0]
    assert hessian_trace(surface, samples=2).mean == 0.0


def test_a_parameter_that_is_not_used_or_enters_linearly():
    """Autograd gives None for the one, and for the other a gradient without a graph."""
    surface = surface_of(lambda w: w[0] ** 2 + w[1], [1.0, 1.0, 1.0])
    surface.model.unused = torch.nn.Parameter(torch.ones(2))
    surface = type(surface)(surface.model, surface._loss, surface._batches)
    assert surface.gradient().gradient.tolist() == [2.0, 1.0, 0.0, 0.0, 0.0]
    assert surface.hessian_product(torch.ones(5)).tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]


def test_alignment():
    along_first = quadratic([4.0, 1.0], [0.3, 0.0])
    assert alignment(along_first) == pytest.approx(1.0, rel=1e-12)
    assert alignment(quadratic([4.0, 1.0], [0.0, -0.3])) == pytest.approx(0.0, abs=1e-12)
    between = quadratic([4.0, 1.0], [-1.0, 3.0])  # g = (-4, 3)
    assert alignment(between) == pytest.approx(0.8, rel=1e-12)
    assert alignment(between, eigenvector=torch.tensor([0.0, 2.0])) == pytest.approx(0.6, rel=1e-12)
    assert math.isnan(alignment(quadratic([4.0, 1.0])))


def test_alignment_on_a_net(case, hessian):
    gradient = torch.func.grad(case.flat_loss)(case.flat)
    top = torch.linalg.eigh(hessian)[1][:, -1]
    assert alignment(case.surface()) == pytest.approx(abs(gradient @ top / gradient.norm()).item(), rel=1e-4)


def test_an_eigenvalue_that_does_not_converge_is_said(case):
    with pytest.raises(EigenvaluesNotConverged) as raised:
        top_eigenvalues(case.surface(), 30, max_restarts=1, tolerance=1e-12)
    assert_one_sentence(raised.value, "30 eigenvalues", "1 restarts", "max_restarts")


def test_seeds(case):
    surface = case.surface()
    found = [top_eigenvalues(surface, 2, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0].vectors, found[1].vectors) and torch.equal(found[0].values, found[1].values)
    assert not torch.equal(found[0].vectors, found[2].vectors)
    torch.testing.assert_close(found[0].vectors, found[2].vectors, rtol=0, atol=1e-4)  # the sign is settled
    traces = [hessian_trace(surface, samples=4, seed=seed) for seed in (0, 0, 1)]
    assert traces[0] == traces[1] != traces[2]


def test_attention_is_differentiated_twice():
    """Its fused kernels have no second derivative."""
    torch.manual_seed(0)
    q = torch.randn(2, 1, 3, 8)

    def function(w):
        keys = q * w[0].float()
        return torch.nn.functional.scaled_dot_product_attention(q, keys, q).square().mean().double()

    found = surface_of(function, [0.7]).hessian_product(torch.ones(1)).item()
    slopes = [surface_of(function, [0.7 + step]).gradient().gradient.item() for step in (1e-2, -1e-2)]
    assert found == pytest.approx((slopes[0] - slopes[1]) / 2e-2, rel=1e-2) and found != 0


def test_compiled_models_run_eagerly():
    """What AOT autograd has compiled cannot be differentiated twice."""
    case = Net()
    compiled = LossSurface(torch.compile(case.model, backend="aot_eager"), case.loss, case.batches)
    assert compiled.loss() == pytest.approx(case.surface().loss(), rel=1e-12)
    assert hessian_trace(compiled, samples=2).mean == pytest.approx(hessian_trace(case.surface(), samples=2).mean, rel=1e-12)


def test_a_standard_error_is_that_of_the_mean():
    """Squares of deviations 16/9 + 1/9 + 25/9 = 14/3, over n - 1 = 2 and over n = 3."""
    found = Estimate.of([1.0, 2.0, 4.0])
    assert (found.mean, found.samples) == (pytest.approx(7 / 3), 3)
    assert found.standard_error == pytest.approx(math.sqrt(7 / 9), rel=1e-14)


def test_one_seed_gives_each_purpose_its_own_numbers():
    drawn = {tuple(torch.rand(3, generator=generator(0, purpose)).tolist()) for purpose in ("average", "worst", "trace")}
    assert len(drawn) == 3
    surface = quadratic([1.0] * 30)
    assert not torch.equal(random_direction(surface), normal(surface, generator(0, "average")))
