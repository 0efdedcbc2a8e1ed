"""The Hessian of the loss, seen through its products with vectors: top eigenvalues, trace, alignment with the gradient."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from .directions import generator, normal
from .estimate import Estimate
from .surface import LossSurface, Point

WHICH = ("LA", "SA", "LM")

_LARGEST_DENSE = 4096  # rows of a Hessian that is built whole: 128 MiB
_ELEMENTS_PER_PASS = 2**25  # of vectors that share a pass: 256 MiB of them in fp64, and as much of products


class EigenvaluesNotConverged(RuntimeError):
    """Some of the eigenvalues that were asked for are not known to the tolerance that was asked for."""


@dataclass(frozen=True)
class Spectrum:
    """Some eigenvalues of a Hessian, the most extreme first, and their eigenvectors.

    Attributes:
        values: ``[k]``, fp64.
        vectors: ``[k, D]``, fp64, on the host: rows of length 1, of either sign, but always of the same for a seed.
        products: Hessian-vector products that it took.
    """

    values: Tensor
    vectors: Tensor
    products: int


def top_eigenvalues(
    surface: LossSurface,
    k: int = 1,
    *,
    which: str = "LA",
    tolerance: float = 1e-6,
    max_restarts: int = 100,
    offset: Tensor | None = None,
    seed: int = 0,
) -> Spectrum:
    """The k largest eigenvalues of ``H(x + offset)`` and their eigenvectors, by ``scipy.sparse.linalg.eigsh``.

    Lanczos over Hessian-vector products, with ``max(2 k + 1, 20)`` vectors of D doubles on the host. One pass per product; the
    first takes as many as there are vectors, and each restart about that less k. Where D is not larger than that number the
    Hessian is built whole, exactly and without scipy.

    Args:
        surface: the loss around the weights.
        k: how many, at most D.
        which: ``"LA"``: the largest; ``"SA"``: the smallest; ``"LM"``: the largest in magnitude.
        tolerance: relative, of the eigenvalues.
        max_restarts: what it may take.
        offset: where, ``[D]``; None: at the weights.
        seed: of the vector that Lanczos starts from.

    Raises:
        EigenvaluesNotConverged: some did not within ``max_restarts``. Those of a float32 model are good to about 1e-6.
        ModuleNotFoundError: scipy is not installed.
        ValueError: k < 1 or k > D, or a tolerance or ``which`` that means nothing.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> surface = LossSurface(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, [(x, torch.ones(2, 1))])
        >>> top_eigenvalues(surface, 2).values
        tensor([4., 1.], dtype=torch.float64)
    """
    checks.surface(surface)
    k = checks.whole(k, "k", 1, "as many eigenvalues as are wanted")
    checks.one_of(which, "which", WHICH)
    max_restarts = checks.whole(max_restarts, "max_restarts", 1, "restarts of Lanczos")
    tolerance = checks.positive(tolerance, "tolerance")
    dimension = surface.dimension
    if k > dimension:
        raise ValueError(f"k: expected at most {dimension}, as many as there are parameters, got {k}: ask for fewer.")
    lanczos = _vectors(k)
    if _is_small(dimension, k):
        return _dense(surface, k, which, offset)
    if k == dimension:
        raise ValueError(
            f"k: expected fewer than all {dimension} eigenvalues of a Hessian that is too large to be built, got {k}: ask for "
            "fewer."
        )
    return _lanczos(surface, k, which, tolerance, max_restarts, offset, seed, min(lanczos, dimension))


def first_passes(dimension: int, k: int) -> int:
    """How many ``top_eigenvalues`` takes if Lanczos is not restarted."""
    return 1 if _is_small(dimension, k) else min(_vectors(k), dimension)


def trace_passes(dimension: int, samples: int) -> int:
    return math.ceil(samples / _samples_per_pass(dimension))


def _vectors(k: int) -> int:
    """Of Lanczos: what eigsh would take itself."""
    return max(2 * k + 1, 20)


def _is_small(dimension: int, k: int) -> bool:
    return dimension <= min(_vectors(k), _LARGEST_DENSE)


def _samples_per_pass(dimension: int) -> int:
    return max(1, _ELEMENTS_PER_PASS // dimension)


def hessian_trace(surface: LossSurface, *, samples: int = 32, seed: int = 0, offset: Tensor | None = None) -> Estimate:
    """``tr H = E v' H v`` over random signs v, Hutchinson's estimate. Several samples share a pass.

    Its variance is ``2 sum_{i != j} H_ij^2 / samples``: none for a diagonal Hessian.

    Args:
        surface: the loss around the weights.
        samples: how many vectors of signs, at least 2.
        seed: of the signs.
        offset: where, ``[D]``; None: at the weights.

    Raises:
        ValueError: fewer than two samples.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> surface = LossSurface(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, [(x, torch.ones(2, 1))])
        >>> hessian_trace(surface, samples=2)
        Estimate(mean=5.0, standard_error=0.0, samples=2)
    """
    checks.surface(surface)
    samples = checks.whole(samples, "samples", 2, "for a standard error")
    draws = generator(seed, "trace")
    per_pass = _samples_per_pass(surface.dimension)
    found: list[float] = []
    with surface.stage("trace", trace_passes(surface.dimension, samples)):
        while len(found) < samples:
            shape = (min(per_pass, samples - len(found)), surface.dimension)
            signs = torch.randint(2, shape, generator=draws, device="cpu").double().mul_(2).sub_(1)
            found += (signs * surface.hessian_product(signs, offset)).sum(dim=1).tolist()
    return Estimate.of(found)


def alignment(surface: LossSurface, *, eigenvector: Tensor | None = None, point: Point | None = None, seed: int = 0) -> float:
    """``|cos(g, v_1)|`` of the gradient over the whole data and the Hessian's top eigenvector; NaN where g is zero.

    SAM with full batches aligns the two, and with that goes along the top eigenvalue [2211.05729].

    Args:
        surface: the loss around the weights.
        eigenvector: v_1, if it is known already; any length.
        point: ``surface.gradient()``, if it is known already.
        seed: of the eigenvector's computation.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> surface = LossSurface(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, [(x, torch.ones(2, 1))])
        >>> 0 <= alignment(surface) <= 1
        True
    """
    checks.surface(surface)
    if eigenvector is None:
        eigenvector = top_eigenvalues(surface, 1, seed=seed).vectors[0]
    top = checks.vector(eigenvector, "eigenvector", surface.dimension)
    gradient = (point or surface.gradient()).gradient
    lengths = float(gradient.norm() * top.norm())
    return abs(float(gradient @ top)) / lengths if lengths > 0 else math.nan


def _dense(surface: LossSurface, k: int, which: str, offset: Tensor | None) -> Spectrum:
    dimension = surface.dimension
    identity = torch.eye(dimension, dtype=torch.float64, device="cpu")
    with surface.stage("Hessian", 1):
        hessian = surface.hessian_product(identity, offset)
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    return _ordered(values, vectors.T, k, which, dimension)


def _lanczos(
    surface: LossSurface, k: int, which: str, tolerance: float, max_restarts: int, offset: Tensor | None, seed: int, size: int
) -> Spectrum:
    linalg = checks.package("scipy.sparse.linalg", "eigenvalues")
    dimension, products, curved = surface.dimension, 0, False

    def product(vector: Any) -> Any:
        nonlocal products, curved
        products += 1
        # eigsh hands out views of its work space: a copy, for a vector that stays.
        result = surface.hessian_product(torch.tensor(vector.reshape(-1), dtype=torch.float64, device="cpu"), offset)
        curved = curved or bool(result.any())
        return result.numpy()

    draws = generator(seed, "Lanczos")
    start = normal(surface, draws).numpy()
    options: dict[str, Any] = {}
    if "rng" in inspect.signature(linalg.eigsh).parameters:
        # What it continues with where it has found an invariant subspace; without, it would draw from a global generator.
        import numpy

        options["rng"] = numpy.random.default_rng(seed)
    operator = linalg.LinearOperator((dimension, dimension), matvec=product, dtype=start.dtype)
    try:
        with surface.stage("eigenvalues", first_passes(dimension, k)):
            values, vectors = linalg.eigsh(
                operator, k=k, which=which, v0=start, ncv=size, tol=tolerance, maxiter=max_restarts, **options
            )
    except linalg.ArpackNoConvergence as error:
        raise EigenvaluesNotConverged(
            f"top_eigenvalues: expected {k} eigenvalues to a relative tolerance of {tolerance:g} within {max_restarts} "
            f"restarts, got {len(error.eigenvalues)}: raise max_restarts, loosen the tolerance or ask for fewer."
        ) from error
    except linalg.ArpackError:
        if curved:
            raise
        # A random vector whose product is exactly zero: the loss is linear in the weights, and ARPACK cannot start.
        flat = torch.eye(k, dimension, dtype=torch.float64, device="cpu")
        return Spectrum(torch.zeros(k, dtype=torch.float64, device="cpu"), flat, products)
    return _ordered(torch.from_numpy(values.copy()), torch.from_numpy(vectors.T.copy()), k, which, products)


def _ordered(values: Tensor, vectors: Tensor, k: int, which: str, products: int) -> Spectrum:
    """The most extreme k first; each vector's largest entry positive, since a sign means nothing and should not vary."""
    key = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    chosen = key.argsort(descending=True, stable=True)[:k]
    values, vectors = values[chosen], vectors[chosen]
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return Spectrum(values.contiguous(), (vectors * largest.sign()).contiguous(), products)
