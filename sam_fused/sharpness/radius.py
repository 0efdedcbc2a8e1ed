"""Sharpness at a radius: how much the loss rises in the worst, the ascent and the average direction [2211.05729]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .directions import generator, normal, unit
from .estimate import Estimate
from .hessian import top_eigenvalues
from .surface import LossSurface, Point

STARTS = ("gradient", "eigenvector", "random")

# Steps by which the search may turn towards the gradient: all the way, then ever less.
_TURNS = (math.inf, 1.0, 0.25, 0.0625)


@dataclass(frozen=True)
class WorstDirection:
    """The highest rise that a search has found.

    Attributes:
        value: ``L(x + rho v) - L(x)``, a lower bound of the worst-direction sharpness; at least 0.
        direction: v, ``[D]``, of length 1, or 0 where nothing was higher than the loss at the weights.
        start: where that search began: ``"gradient"``, ``"+eigenvector"``, ``"-eigenvector"``, ``"random 0"``, or ``"none"``.
    """

    value: float
    direction: Tensor
    start: str


def ascent_sharpness(surface: LossSurface, rho: float, *, point: Point | None = None) -> float:
    """``L(x + rho g / ||g||) - L(x)``, g the gradient over the whole data: what SAM's first pass finds [2211.05729].

    Two passes, one if the point is known. 0 where the gradient is zero, which SAM does not move along either.

    Args:
        surface: the loss around the weights.
        rho: the radius, a distance in weight space.
        point: ``surface.gradient()``, if it is known already.

    Raises:
        ValueError: a radius that is negative or not finite.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> ascent_sharpness(surface, rho=0.1) > 0
        True
    """
    checks.surface(surface)
    rho = checks.radius(rho, "rho")
    with surface.stage("ascent direction", 1 + (point is None)):
        point = point or surface.gradient()
        direction = unit(point.gradient)
        return 0.0 if direction is None else surface.loss(rho * direction) - point.loss


def average_sharpness(
    surface: LossSurface, rho: float, *, directions: int = 32, seed: int = 0, point: Point | None = None
) -> Estimate:
    """``E L(x + rho v / ||v||) - L(x)`` over ``v ~ N(0, I)`` [2211.05729]. One pass per direction, and one more.

    For a quadratic it is ``rho^2 / (2 D) tr H`` around a minimum.

    Args:
        surface: the loss around the weights.
        rho: the radius, a distance in weight space.
        directions: how many random ones, at least 2.
        seed: of the directions.
        point: ``surface.gradient()``, if it is known already.

    Raises:
        ValueError: a radius that is negative or not finite, fewer than two directions.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> average_sharpness(surface, rho=0.1, directions=4).samples
        4
    """
    checks.surface(surface)
    rho = checks.radius(rho, "rho")
    directions = checks.whole(directions, "directions", 2, "for a standard error")
    draws = generator(seed, "average")
    with surface.stage("average direction", directions + (point is None)):
        base = point.loss if point else surface.loss()
        rises = []
        for _ in range(directions):
            direction = normal(surface, draws)
            rises.append(surface.loss(direction.mul_(rho / direction.norm())) - base)
    return Estimate.of(rises)


def worst_sharpness(
    surface: LossSurface,
    rho: float,
    *,
    starts: Sequence[str] = STARTS,
    random_starts: int = 1,
    steps: int = 10,
    seed: int = 0,
    eigenvector: Tensor | None = None,
    point: Point | None = None,
) -> WorstDirection:
    """A lower bound of ``max_{||v|| <= 1} L(x + rho v) - L(x)`` [2211.05729]: the highest point that a search finds.

    From each start the search climbs on the sphere of radius rho. Its step is ``v <- g / ||g||`` with g the gradient at
    ``x + rho v``: a fixed point of it is a stationary point on the sphere, and on a quadratic it is the power iteration. Where
    that does not climb (a Hessian whose largest eigenvalue in magnitude is negative) v turns only part of the way, ``v + s g /
    ||g||`` normalised with s = 1, 1/4, 1/16. Since v = 0 is allowed, the value is at least 0; other points inside the ball are
    not searched. It is never below ``ascent_sharpness`` if ``"gradient"`` is among the starts.

    Args:
        surface: the loss around the weights.
        rho: the radius, a distance in weight space.
        starts: of ``"gradient"``; ``"eigenvector"``: the Hessian's top one, with either sign; ``"random"``.
        random_starts: how many of the last.
        steps: gradients per start, each one forward and backward pass; a search that has arrived takes fewer.
        seed: of the random starts, and of the eigenvector's computation.
        eigenvector: the top one, if it is known already; else it is computed where it is asked for, which needs scipy.
        point: ``surface.gradient()``, if it is known already.

    Raises:
        ValueError: a radius that is negative or not finite, an unknown start or none, fewer than one step.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> worst_sharpness(surface, rho=0.1).value >= ascent_sharpness(surface, rho=0.1)
        True
    """
    checks.surface(surface)
    rho = checks.radius(rho, "rho")
    steps = checks.whole(steps, "steps", 1, "gradients per start")
    random_starts = checks.whole(random_starts, "random_starts", 1, "or leave 'random' out of starts")
    if isinstance(starts, str) or not starts:
        raise ValueError(f"starts: expected a list of some of {', '.join(map(repr, STARTS))}, got {starts!r}: pass a list.")
    for start in starts:
        checks.one_of(start, "starts", STARTS)
    if "eigenvector" in starts and eigenvector is None:
        eigenvector = top_eigenvalues(surface, 1, seed=seed).vectors[0]
    with surface.stage("worst direction", (point is None) + most_gradients(starts, random_starts, steps)):
        point = point or surface.gradient()
        best = WorstDirection(0.0, torch.zeros_like(point.gradient), "none")
        for name, direction in _starts(surface, starts, random_starts, seed, eigenvector, point):
            value, found = _climb(surface, rho, direction, steps)
            if value - point.loss > best.value:
                best = WorstDirection(value - point.loss, found, name)
    return best


def most_gradients(starts: Sequence[str], random_starts: int, steps: int) -> int:
    """How many a search for the worst direction takes if none of it arrives."""
    count = {"gradient": 1, "eigenvector": 2, "random": random_starts}
    return steps * sum(count[start] for start in set(starts))


def _starts(
    surface: LossSurface, kinds: Sequence[str], count: int, seed: int, eigenvector: Tensor | None, point: Point
) -> Iterator[tuple[str, Tensor]]:
    """Names and unit vectors."""
    gradient = unit(point.gradient)
    if "gradient" in kinds and gradient is not None:
        yield "gradient", gradient
    top = None if eigenvector is None else unit(checks.vector(eigenvector, "eigenvector", surface.dimension))
    if "eigenvector" in kinds and top is not None:
        yield "+eigenvector", top
        yield "-eigenvector", -top
    if "random" in kinds:
        draws = generator(seed, "worst")
        for number in range(count):
            direction = normal(surface, draws)
            yield f"random {number}", direction / direction.norm()


def _climb(surface: LossSurface, rho: float, direction: Tensor, steps: int) -> tuple[float, Tensor]:
    """The loss at the highest point that is reached from ``x + rho direction``, and the direction of that point."""
    here = surface.gradient(rho * direction)
    turns = iter(_TURNS)
    turn = next(turns)
    for _ in range(steps - 1):
        uphill = unit(here.gradient)
        if uphill is None:
            break
        candidate = unit(uphill if turn == math.inf else direction + turn * uphill)
        # Within 1e-8 of the same direction nothing is to be won: a rise is quadratic in the angle, 1e-16 of what there is.
        if candidate is None or torch.linalg.vector_norm(candidate - direction) < 1e-8:
            break
        there = surface.gradient(rho * candidate)
        if there.loss > here.loss:
            here, direction = there, candidate
        elif (shorter := next(turns, None)) is None:
            break
        else:
            turn = shorter
    return here.loss, direction
