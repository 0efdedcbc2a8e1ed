"""The loss along lines and over planes through the weights, and between two checkpoints [1712.09913]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from . import checks
from .directions import filter_normalized, generator, normal
from .hessian import top_eigenvalues
from .sections import PLANES, Line, Plane
from .surface import LossSurface
from .untouched import overlaps


def along(surface: LossSurface, direction: Tensor, *, radius: float = 1.0, points: int = 21) -> Line:
    """``L(x + t d)`` at evenly spaced t from -radius to radius; an odd number of points includes 0. One pass per point.

    Args:
        surface: the loss around the weights.
        direction: d, ``[D]``, of any length.
        radius: in units of d.
        points: at least 2.

    Raises:
        ValueError: a radius that is negative or not finite, a direction of another length, fewer than two points.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> along(surface, random_direction(surface), radius=0.5, points=5).positions
        (-0.5, -0.25, 0.0, 0.25, 0.5)
    """
    checks.surface(surface)
    direction = checks.vector(direction, "direction", surface.dimension)
    positions = _positions(radius, points)
    with surface.stage("line", points):
        return Line(positions, tuple(surface.loss(t * direction, finite=False) for t in positions))


def between(surface: LossSurface, first: Any, second: Any, *, positions: int | Iterable[float] = 21) -> Line:
    """The loss at ``(1 - t) first + t second``, linear interpolation between two checkpoints. One pass per position.

    Every floating-point entry of the checkpoints is interpolated, in fp64 and then rounded to its dtype: parameters, those
    without ``requires_grad`` too, and buffers. Running statistics so mixed are those of neither network: between networks that
    were trained apart take a surface with ``batch_norm="train"``. Other entries (counters) are the nearer checkpoint's. The
    ends are the checkpoints, to the bit. The model's own weights play no part, and stay.

    Args:
        surface: whose model the checkpoints fit.
        first: at 0: a ``state_dict``, or the tensors of ``model.parameters()`` in this order.
        second: at 1.
        positions: t, in a list or an array; a whole number n: n of them from 0 to 1.

    Raises:
        TypeError: a checkpoint that is neither, or positions that are no numbers.
        ValueError: one that does not fit the model, fewer than two positions, or one that is not finite.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> surface = LossSurface(model, torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> line = between(surface, before, model.state_dict(), positions=3)
    """
    checks.surface(surface)
    ts = _fractions(positions)
    start = _entries(surface.model, first, "first")
    end = _entries(surface.model, second, "second")
    if len(start) != len(end):
        raise ValueError("second: expected a checkpoint of the same kind as the first, got another: pass two state_dicts.")
    losses = []
    with surface.stage("between checkpoints", len(ts)):
        for t in ts:
            values = [(live, _mixed(a, b, t).to(live.dtype)) for (live, a), (_, b) in zip(start, end, strict=True)]
            losses.append(surface.loss_with(values, finite=False))
    return Line(ts, tuple(losses), kind="between")


def plane(
    surface: LossSurface,
    directions: str | tuple[Tensor, Tensor] = "random",
    *,
    radius: float = 1.0,
    points: int = 21,
    filter_normalize: bool = True,
    vectors: str = "zero",
    seed: int = 0,
) -> Plane:
    """``L(x + a d1 + b d2)`` over evenly spaced a and b from -radius to radius. ``points ** 2`` passes.

    Args:
        surface: the loss around the weights.
        directions: ``"random"``: two from N(0, I); ``"eigenvectors"``: the Hessian's top two, which needs scipy; or two tensors
            ``[D]``.
        radius: in units of the directions: filter-normalised, 1 is as far as the weights are from 0.
        points: per direction, at least 2.
        filter_normalize: whether each filter is scaled to that of the weights [1712.09913], as ``filter_normalized`` has it.
            Eigenvectors so scaled are eigenvectors no longer, nor orthogonal: False keeps them, and distances.
        vectors: what that does to biases and normalisation layers: ``"zero"`` or ``"scale"``.
        seed: of random directions, or of the eigenvectors' computation.

    Raises:
        ValueError: a radius that is negative or not finite, unknown or misshapen directions, fewer than two points, directions
            of which filter normalisation leaves nothing.

    Example:
        >>> surface = LossSurface(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> len(plane(surface, radius=0.5, points=3).losses)
        3
    """
    checks.surface(surface)
    ticks = _positions(radius, points)
    kind, pair, eigenvalues = _pair(surface, directions, seed)
    if filter_normalize:
        pair = [_scaled(surface, direction, vectors) for direction in pair]
    with surface.stage("plane", points**2):
        losses = tuple(tuple(surface.loss(a * pair[0] + b * pair[1], finite=False) for b in ticks) for a in ticks)
    return Plane(ticks, ticks, losses, kind, bool(filter_normalize), eigenvalues)


def _pair(
    surface: LossSurface, directions: str | tuple[Tensor, Tensor], seed: int
) -> tuple[str, list[Tensor], tuple[float, ...]]:
    """The kind, two directions, and the eigenvalues of those that have some."""
    named = tuple(kind for kind in PLANES if kind != "given")
    if isinstance(directions, str):
        if checks.one_of(directions, "directions", named) == "eigenvectors":
            spectrum = top_eigenvalues(surface, 2, seed=seed)
            return directions, list(spectrum.vectors), tuple(spectrum.values.tolist())
        draws = generator(seed, "plane")
        return directions, [normal(surface, draws) for _ in range(2)], ()
    if not isinstance(directions, Sequence) or len(directions) != 2:
        raise ValueError(f"directions: expected two tensors or one of {', '.join(map(repr, named))}, got neither: pass two.")
    return "given", [checks.vector(direction, "directions", surface.dimension) for direction in directions], ()


def _scaled(surface: LossSurface, direction: Tensor, vectors: str) -> Tensor:
    scaled = filter_normalized(surface, direction, vectors=vectors)
    if bool(direction.any()) and not bool(scaled.any()):
        raise ValueError(
            "directions: expected one that moves the weights, got zero after filter normalisation, which leaves parameters of "
            "fewer than two dimensions where they are: pass vectors='scale' or filter_normalize=False."
        )
    return scaled


def _fractions(positions: Any) -> tuple[float, ...]:
    if not isinstance(positions, Iterable) or isinstance(positions, (str, bytes)):
        if not isinstance(positions, Integral):
            raise TypeError(
                f"positions: expected a whole number or a list of numbers, got {type(positions).__name__}: pass 21, say, or "
                "[0.0, 0.5, 1.0]."
            )
        count = checks.whole(positions, "positions", 2, "from 0 to 1")
        return tuple(number / (count - 1) for number in range(count))
    found = tuple(checks.finite(t, "positions") for t in positions)
    checks.whole(len(found), "positions", 2, "from 0 to 1")
    return found


def _positions(radius: float, points: int) -> tuple[float, ...]:
    radius = checks.radius(radius, "radius")
    points = checks.whole(points, "points", 2, "from end to end")
    return tuple(radius * (2 * number / (points - 1) - 1) for number in range(points))  # the middle is exactly 0


def _mixed(first: Tensor, second: Tensor, t: float) -> Tensor:
    if t in (0, 1):  # by the formula an inf would be NaN at the other end
        return second if t else first
    if not first.is_floating_point():
        return first if t < 0.5 else second
    return first.cpu().double() * (1 - t) + second.cpu().double() * t


def _entries(model: nn.Module, checkpoint: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """The model's tensors and their values in the checkpoint."""
    if isinstance(checkpoint, Mapping):
        live = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
        for word, wrong in (
            ("without", live.keys() - checkpoint.keys()),
            ("with", checkpoint.keys() - model.state_dict().keys()),
        ):
            if wrong:
                raise ValueError(
                    f"{name}: expected the entries of model.state_dict(), got a checkpoint {word} {min(wrong, key=str)!r}: "
                    "pass a state_dict of this model, without a wrapper's prefix."
                )
        found = [(key, tensor, checkpoint[key]) for key, tensor in live.items()]
    elif isinstance(checkpoint, Iterable) and not isinstance(checkpoint, (str, bytes, Tensor)):
        parameters, values = list(model.named_parameters()), list(checkpoint)
        if len(parameters) != len(values):
            raise ValueError(
                f"{name}: expected {len(parameters)} tensors, those of model.parameters(), got {len(values)}: pass all of them."
            )
        found = [(key, tensor, value) for (key, tensor), value in zip(parameters, values, strict=True)]
    else:
        raise TypeError(
            f"{name}: expected a state_dict or a list of tensors, got {type(checkpoint).__name__}: load a file first, "
            "and pass a model's state_dict()."
        )
    for key, tensor, value in found:
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            got = f"the shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name}: expected the shape {list(tensor.shape)} for {key!r}, got {got}: pass a checkpoint of this model."
            )
    # load_state_dict cannot write into the others either.
    return [(tensor, value.detach()) for _, tensor, value in found if not overlaps(tensor)]
