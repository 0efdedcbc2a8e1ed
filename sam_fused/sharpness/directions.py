"""Directions in weight space: random ones, and their scaling to the weights, filter by filter."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from . import checks
from .surface import LossSurface

VECTORS = ("zero", "scale")


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of our own, on the host. Purposes do not share their numbers: one seed serves a whole report."""
    checks.whole(seed, "seed", 0, "any number of your choice")
    # torch's generator takes 32 bits of what it is seeded with.
    return torch.Generator("cpu").manual_seed(zlib.crc32(f"{purpose}:{seed}".encode()))


def random_direction(surface: LossSurface, *, seed: int = 0) -> Tensor:
    """``v ~ N(0, I)``, ``[D]``, fp64, on the host. The same seed gives the same bits, with the same version of torch."""
    checks.surface(surface)
    return normal(surface, generator(seed, "direction"))


def normal(surface: LossSurface, generator: torch.Generator) -> Tensor:
    return torch.randn(surface.dimension, generator=generator, dtype=torch.float64, device="cpu")


def unit(vector: Tensor) -> Tensor | None:
    """``v / ||v||``; None for a zero vector, which points nowhere."""
    norm = torch.linalg.vector_norm(vector)
    return vector / norm if norm > 0 else None


def filter_normalized(surface: LossSurface, direction: Tensor, *, vectors: str = "zero") -> Tensor:
    """``d_ij * ||w_ij|| / ||d_ij||`` for every filter j of every parameter i [1712.09913].

    A filter is what makes one output: a slice of the first dimension, in a linear layer a row. So scaled, a step of 1 along the
    direction is as large for every filter as the filter is, and plots of nets whose weights differ in scale can be compared.
    It loses its other properties: scaled eigenvectors are no longer eigenvectors, nor orthogonal.

    Args:
        surface: whose weights w scale it.
        direction: d, ``[D]``; it is not changed.
        vectors: parameters of fewer than two dimensions (biases, normalisation layers): ``"zero"``: they stay where they are,
            as in the paper; ``"scale"``: each is one filter.

    Returns:
        Tensor: ``[D]``, fp64, on the host. Zero where a filter or its direction is.

    Raises:
        ValueError: a direction of another length, or an unknown treatment of vectors.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(3, 2), torch.nn.functional.mse_loss, [(torch.ones(4, 3), torch.ones(4, 2))])
        >>> direction = filter_normalized(surface, random_direction(surface))
        >>> line = along(surface, direction, radius=1.0, points=5)
    """
    checks.surface(surface)
    checks.one_of(vectors, "vectors", VECTORS)
    scaled = checks.vector(direction, "direction", surface.dimension).clone()
    for part, weight in zip(surface.pieces(scaled), surface.parameters, strict=True):
        if weight.dim() >= 2:
            filters, weights = part.flatten(1), weight.detach().cpu().double().flatten(1)
            lengths = filters.norm(dim=1, keepdim=True)
            factor = torch.where(lengths > 0, weights.norm(dim=1, keepdim=True) / lengths, 0.0)
            part.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
        elif vectors == "zero":
            part.zero_()
        else:
            length = part.norm()
            part.mul_(weight.detach().cpu().double().norm() / length if length > 0 else 0.0)
    return scaled
