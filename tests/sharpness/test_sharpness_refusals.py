"""Bad input: one sentence that says what it is about, before anything has been changed."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from sam_fused.sharpness import (
    LossSurface,
    along,
    ascent_sharpness,
    average_sharpness,
    batch_loss,
    between,
    filter_normalized,
    hessian_trace,
    measure,
    plane,
    top_eigenvalues,
    worst_sharpness,
)
from tests.optim.helpers import assert_one_sentence
from tests.sharpness.problems import Net, quadratic

pytestmark = pytest.mark.cpu_only

X, Y = torch.ones(4, 2), torch.ones(4, 1)


def linear():
    return nn.Linear(2, 1)


def frozen():
    return linear().requires_grad_(False)


def of_complex_weights():
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model


def surface(loss=mse_loss, batches=((X, Y),), model=None, **kwargs):
    return LossSurface(model or linear(), loss, batches, **kwargs)


def norm_at_zero(outputs, targets):
    return (outputs - outputs.detach()).sum().sqrt()


def kink(outputs, targets):
    return (outputs - outputs.detach()).sum().abs().pow(1.5)


def with_backward(outputs, targets):
    """As every closure of a training loop is written."""
    loss = mse_loss(outputs, targets)
    loss.backward()
    return loss


class Exhausted:
    """Iterable, and yields something only once."""

    def __init__(self):
        self.batches = iter([(X, Y)])

    def __iter__(self):
        return self.batches


def twice(made):
    made.loss()
    made.loss()


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("function", [ascent_sharpness, average_sharpness, worst_sharpness])
def test_radii(function, rho):
    made = surface()
    with pytest.raises(ValueError) as raised:
        function(made, rho)
    assert_one_sentence(raised.value, "rho", "finite", str(rho))
    assert made.passes == 0


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda: ascent_sharpness(surface(), "0.1"), TypeError, ["rho", "str"]),
        (lambda: ascent_sharpness(surface(), True), TypeError, ["rho", "bool"]),
        # the model
        (lambda: surface(model="net"), TypeError, ["model", "str"]),
        (lambda: surface(model=frozen()), ValueError, ["trainable", "requires_grad"]),
        (lambda: surface(model=nn.LazyLinear(3)), ValueError, ["lazy", "weight"]),
        (lambda: surface(model=of_complex_weights()), TypeError, ["complex64", "'w'"]),
        (lambda: surface(model=nn.DataParallel(linear())), ValueError, ["DataParallel", "model.module"]),
        # the batches
        (lambda: surface(batches=5), TypeError, ["batches", "int"]),
        (lambda: surface(batches=torch.utils.data.TensorDataset(X, Y)), TypeError, ["DataLoader", "TensorDataset"]),
        (lambda: surface(batches=iter([(X, Y)])), ValueError, ["batches", "exhausted"]),
        (lambda: surface(batches=((X, Y) for _ in range(2))), ValueError, ["generator", "list(batches)"]),
        (lambda: surface(batches=[]).loss(), ValueError, ["batches", "none"]),
        (lambda: twice(surface(batches=Exhausted())), ValueError, ["4 samples", "0 in pass 2"]),
        (lambda: surface(batches=(X, Y)).loss(), TypeError, ["(x, y)", "Tensor", "pass [(x, y)]"]),
        (lambda: surface(batches=[(X, Y, X)]).loss(), TypeError, ["(x, y)", "3 entries", "batch_loss"]),
        (lambda: surface(batches=[{"x": X}]).loss(), TypeError, ["dict", "batch_loss"]),
        (lambda: surface(batches=[("a", "b")]).loss(), ValueError, ["count"]),
        (lambda: surface(count=5), TypeError, ["count", "function", "int"]),
        (lambda: surface(count=lambda batch: 0).loss(), ValueError, ["count", "batch 0"]),
        # the loss
        (lambda: surface(loss=5), TypeError, ["loss", "int"]),
        (lambda: batch_loss("loss"), TypeError, ["batch_loss", "str"]),
        (lambda: measure(linear(), with_backward, [(X, Y)]), TypeError, ["loss", "backward()"]),
        # the surface
        (lambda: top_eigenvalues(linear(), 2), TypeError, ["LossSurface", "Linear"]),
        (lambda: ascent_sharpness(linear(), 0.1), TypeError, ["LossSurface", "Linear"]),
        (lambda: along(linear(), torch.ones(3)), TypeError, ["LossSurface", "Linear"]),
        (lambda: between(surface(), linear(), linear()), TypeError, ["first", "Linear", "state_dict()"]),
        (lambda: surface(loss=lambda a, b: a - b).loss(), ValueError, ["0-dim", "[4, 1]", "batch 0"]),
        (lambda: surface(loss=lambda a, b: 1.0).loss(), TypeError, ["0-dim", "float"]),
        (lambda: surface(loss=lambda a, b: (a > b).sum()).loss(), TypeError, ["int64"]),
        (lambda: surface(loss=lambda a, b: a.sum() * math.nan).loss(), ValueError, ["finite", "nan", "batch 0"]),
        (lambda: surface(loss=lambda a, b: a.sum() * math.inf).gradient(), ValueError, ["finite"]),
        (lambda: surface(loss=lambda a, b: a.detach().sum()).gradient(), ValueError, ["graph", "detach"]),
        (lambda: surface(loss=lambda a, b: a.detach().sum()).hessian_product(torch.ones(3)), ValueError, ["graph"]),
        (lambda: ascent_sharpness(surface(loss=norm_at_zero), 0.1), ValueError, ["finite gradient", "'weight'"]),
        (lambda: hessian_trace(surface(loss=kink)), ValueError, ["finite Hessian product", "'weight'"]),
        # modes and kinds: the known ones are listed
        (lambda: surface(batch_norm="frozen"), ValueError, ["batch_norm", "'eval'", "'train'", "'frozen'"]),
        (lambda: worst_sharpness(surface(), 0.1, starts=["up"]), ValueError, ["starts", "'gradient'", "'eigenvector'", "'up'"]),
        (lambda: worst_sharpness(surface(), 0.1, starts="random"), ValueError, ["starts", "list"]),
        (lambda: worst_sharpness(surface(), 0.1, starts=[]), ValueError, ["starts", "list"]),
        (lambda: plane(surface(), "axes"), ValueError, ["directions", "'random'", "'eigenvectors'", "'axes'"]),
        (lambda: plane(surface(), (torch.ones(3),)), ValueError, ["directions", "two"]),
        (lambda: filter_normalized(surface(), torch.ones(3), vectors="ones"), ValueError, ["vectors", "'zero'", "'scale'"]),
        (lambda: top_eigenvalues(surface(), which="SM"), ValueError, ["which", "'LA'", "'SM'"]),
        # numbers
        (lambda: top_eigenvalues(surface(), 0), ValueError, ["k", "at least 1"]),
        (lambda: top_eigenvalues(surface(), 4), ValueError, ["at most 3", "got 4"]),
        (lambda: top_eigenvalues(quadratic([1.0] * 5000), 5000), ValueError, ["5000", "fewer"]),
        (lambda: top_eigenvalues(surface(), 1.5), TypeError, ["k", "float"]),
        (lambda: top_eigenvalues(surface(), tolerance=0.0), ValueError, ["tolerance"]),
        (lambda: top_eigenvalues(surface(), tolerance="a"), TypeError, ["tolerance", "str"]),
        (lambda: hessian_trace(surface(), samples=1), ValueError, ["samples", "at least 2"]),
        (lambda: average_sharpness(surface(), 0.1, directions=1), ValueError, ["directions", "at least 2"]),
        (lambda: worst_sharpness(surface(), 0.1, steps=0), ValueError, ["steps", "at least 1"]),
        (lambda: average_sharpness(surface(), 0.1, seed=-1), ValueError, ["seed"]),
        (lambda: along(surface(), torch.ones(3), points=1), ValueError, ["points", "at least 2"]),
        (lambda: along(surface(), torch.ones(3), radius=-1.0), ValueError, ["radius", "-1"]),
        # vectors
        (lambda: along(surface(), torch.ones(4)), ValueError, ["direction", "[3]", "[4]"]),
        (lambda: along(surface(), [1.0, 2.0, 3.0]), TypeError, ["direction", "list"]),
        (lambda: surface().loss(torch.ones(1, 3)), ValueError, ["offset", "[3]", "[1, 3]"]),
        (lambda: surface().hessian_product([1.0, 2.0, 3.0]), TypeError, ["vectors", "list"]),
        (lambda: surface().hessian_product(torch.ones(2)), ValueError, ["vectors", "[3]", "[2]"]),
        # checkpoints
        (lambda: between(surface(), "a.pt", "b.pt"), TypeError, ["first", "str"]),
        (lambda: between(surface(), linear().state_dict(), [X]), ValueError, ["second", "2 tensors", "got 1"]),
        (lambda: between(surface(), {"weight": X}, {}), ValueError, ["first", "without", "'bias'"]),
        (lambda: between(surface(), {**linear().state_dict(), "more": X}, {}), ValueError, ["first", "with", "'more'"]),
        (
            lambda: between(surface(), linear().state_dict(), nn.Linear(2, 5).state_dict()),
            ValueError,
            ["second", "[1, 2]", "[5, 2]", "'weight'"],
        ),
        (lambda: between(surface(), [torch.ones(1, 2), 3], []), ValueError, ["first", "'bias'", "int"]),
        (lambda: between(surface(), linear().parameters(), linear().parameters(), positions=1), ValueError, ["positions"]),
        (lambda: between(surface(), *[linear().state_dict()] * 2, positions="all"), TypeError, ["positions", "str"]),
        (lambda: between(surface(), *[linear().state_dict()] * 2, positions=0.5), TypeError, ["positions", "float"]),
        (lambda: between(surface(), *[linear().state_dict()] * 2, positions=["a", 1]), TypeError, ["positions", "str"]),
        (lambda: between(surface(), *[linear().state_dict()] * 2, positions=[0, math.nan]), ValueError, ["positions", "nan"]),
        # one call for all of it
        (lambda: measure(linear(), mse_loss, [(X, Y)], tolerance=-1), ValueError, ["tolerance", "-1"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], max_restarts=0), ValueError, ["max_restarts"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], rho=-1), ValueError, ["rho"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], top_k=0), ValueError, ["top_k", "at least 1"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], top_k=4), ValueError, ["top_k", "at most 3"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], points=1), ValueError, ["points"]),
        (lambda: measure(linear(), mse_loss, [(X, Y)], radius=math.nan), ValueError, ["radius"]),
    ],
)
def test_what_means_nothing_is_said_in_a_sentence(attempt, error, words):
    with pytest.raises(error) as raised:
        attempt()
    assert_one_sentence(raised.value, *words)


def test_a_pass_with_other_samples_is_refused():
    """A loader that yields less and less would mix different functions into one result."""
    batches = [(X, Y), (X, Y)]
    made = surface(batches=batches)
    made.loss()
    batches.pop()
    with pytest.raises(ValueError) as raised:
        made.loss()
    assert_one_sentence(raised.value, "8 samples", "4 in pass 2")


@pytest.mark.parametrize(
    ("module", "attempt"),
    [
        ("scipy.sparse.linalg", lambda tmp: top_eigenvalues(Net().surface())),
        ("matplotlib.figure", lambda tmp: plane(surface(), points=2).plot(tmp / "plane.png")),
    ],
)
def test_packages_that_are_missing_are_named(monkeypatch, tmp_path, module, attempt):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        attempt(tmp_path)
    assert_one_sentence(raised.value, module.split(".")[0], "pip install", "sam_fused[sharpness]")


def test_a_package_that_misses_something_itself_says_so(monkeypatch, tmp_path):
    """A broken installation of scipy is not a missing one."""
    monkeypatch.delitem(sys.modules, "scipy.sparse.linalg", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        top_eigenvalues(Net().surface())
    assert "pip install" not in str(raised.value)
