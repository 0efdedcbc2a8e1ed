"""All of it by one call: a report to print, to keep as JSON, and to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, records
from .directions import filter_normalized, random_direction, unit
from .estimate import Estimate
from .hessian import alignment, first_passes, hessian_trace, top_eigenvalues, trace_passes
from .landscape import along
from .radius import STARTS, ascent_sharpness, average_sharpness, most_gradients, worst_sharpness
from .sections import Line
from .surface import LossSurface


@dataclass(frozen=True)
class SharpnessReport(records.Record):
    """What ``measure`` found.

    Attributes:
        parameters: D, how many weights.
        dtype: of the weights, as ``"float32"``.
        loss_dtype: of the loss.
        samples: in the data, or their weights' sum.
        batch_norm: the mode.
        seed: of everything random.
        rho: the radius of the three kinds of sharpness.
        loss: at the weights, L(x).
        gradient_norm: of the gradient over the whole data.
        worst: a lower bound of the worst-direction sharpness.
        worst_start: where the search that found it began.
        ascent: the ascent-direction sharpness.
        average: the average-direction sharpness.
        eigenvalues: the Hessian's largest, descending.
        trace: the Hessian's.
        alignment: ``|cos|`` of the gradient and the top eigenvector; NaN where the gradient is zero.
        lines: losses by distance along directions of length 1: ``"eigenvector"`` (the top one), ``"gradient"`` (absent where it
            is zero), ``"random"`` (filter-normalised; absent where that is zero).
        passes: over the data, that it took.
    """

    KIND = "sharpness report"

    parameters: int
    dtype: str
    loss_dtype: str
    samples: float
    batch_norm: str
    seed: int
    rho: float
    loss: float
    gradient_norm: float
    worst: float
    worst_start: str
    ascent: float
    average: Estimate
    eigenvalues: tuple[float, ...]
    trace: Estimate
    alignment: float
    lines: dict[str, Line]
    passes: int

    @property
    def worst_at_small_rho(self) -> float:
        """``rho^2 / 2 lambda_1``, which the worst-direction sharpness tends to around a minimum."""
        return self.rho**2 / 2 * self.eigenvalues[0]

    @property
    def average_at_small_rho(self) -> float:
        """``rho^2 / (2 D) tr H``, which the average-direction sharpness tends to around a minimum."""
        return self.rho**2 / (2 * self.parameters) * self.trace.mean

    @property
    def resolution(self) -> float:
        """By how much two losses of this size differ at least, if they do, in the dtype of the loss."""
        return torch.finfo(getattr(torch, self.loss_dtype)).eps * abs(self.loss)

    def __str__(self) -> str:
        average = f"{self.average}; rho²/(2 D) tr = {self.average_at_small_rho:.6g}"
        worst = f"{self.worst:.6g}, at least (from {self.worst_start}); rho²/2 λ1 = {self.worst_at_small_rho:.6g}"
        rows = [
            ("loss", f"{self.loss:.6g}"),
            ("gradient norm", f"{self.gradient_norm:.6g}"),
            ("worst direction", worst),
            ("ascent direction", f"{self.ascent:.6g}"),
            ("average direction", average),
            ("top eigenvalues", ", ".join(f"{value:.6g}" for value in self.eigenvalues)),
            ("trace", str(self.trace)),
            ("|cos(gradient, v1)|", f"{self.alignment:.4f}"),
        ]
        head = f"Sharpness at rho = {self.rho:g}: {self.parameters:,} parameters, {self.dtype}, {self.samples:,.6g} samples"
        lines = [f"{head}, batch_norm={self.batch_norm!r}, seed {self.seed}, {self.passes:,} passes over the data"]
        lines += [f"  {name:<20} {text}" for name, text in rows]
        if unresolved := ", ".join(self._unresolved()):
            lines.append(
                f"  rounding: {unresolved} direction: less than {self.resolution:.2g}, the last digit of a {self.loss_dtype} "
                "loss of this size"
            )
        return "\n".join(lines)

    def _unresolved(self) -> list[str]:
        """The rises that are less than the loss's last digit. Some are 0 without having been measured."""
        rises = {
            "worst": self.worst if self.worst_start != "none" else None,
            "ascent": self.ascent if self.gradient_norm > 0 else None,
            "average": self.average.mean,
        }
        found = {name: abs(rise) for name, rise in rises.items() if rise is not None and self.rho > 0}
        return [name for name, rise in found.items() if rise < self.resolution]

    def print(self) -> None:
        """The numbers, as plain text."""
        print(self)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> SharpnessReport:
        for name in ("loss", "gradient_norm", "worst", "ascent", "rho", "samples", "alignment"):
            content[name] = float(content[name])
        for name in ("average", "trace"):
            estimate = content[name]
            content[name] = Estimate(float(estimate["mean"]), float(estimate["standard_error"]), estimate["samples"])
        content["eigenvalues"] = records.floats(content["eigenvalues"])
        content["lines"] = {name: Line._of(line) for name, line in content["lines"].items()}
        return cls(**content)

    def plot(self, path: str | Path) -> Path:
        """Lines, rises and eigenvalues as a picture, in the format of the path's suffix, PNG without one. Needs matplotlib.

        Returns:
            Path: of the file that was written.
        """
        from .pictures import draw_report

        return draw_report(self, Path(path))


def measure(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    top_k: int = 1,
    average_directions: int = 32,
    trace_samples: int = 32,
    worst_steps: int = 10,
    random_starts: int = 1,
    points: int = 21,
    radius: float | None = None,
    count: Callable[[Any], float] | None = None,
    batch_norm: str = "eval",
    seed: int = 0,
    tolerance: float = 1e-6,
    max_restarts: int = 100,
    progress: bool | None = None,
) -> SharpnessReport:
    """Three kinds of sharpness at ``rho``, the top of the Hessian's spectrum, its trace, and three lines through the weights.

    Passes over the data, between 100 and 200 with the defaults: 20 or more products for the eigenvalues, 1 for the gradient and
    1 for the ascent, up to ``worst_steps`` for each of ``3 + random_starts`` starts, ``average_directions``, 1 or a few for the
    trace, ``points`` for each of 3 lines. Parameters, buffers, gradients, training flags and random number generators stay as
    they were.

    Args:
        model: as for ``LossSurface``, like ``loss``, ``batches``, ``count``, ``batch_norm`` and ``progress``.
        loss: ``loss(model(x), y) -> mean loss`` for batches ``(x, y)``, or a ``batch_loss``.
        batches: a DataLoader or a list of batches.
        rho: the radius, a distance in weight space.
        top_k: how many eigenvalues.
        average_directions: random directions of the average-direction sharpness, at least 2.
        trace_samples: random vectors of Hutchinson's estimate, at least 2.
        worst_steps: gradients per start of the search for the worst direction.
        random_starts: of that search, beside the gradient and both signs of the top eigenvector.
        points: of each line, at least 2.
        radius: how far the lines go; None: ``3 rho``, and 0.1 where rho is 0.
        count: how many samples a batch has.
        batch_norm: ``"eval"`` or ``"train"``.
        seed: of everything random.
        tolerance: of the eigenvalues, relative, as ``top_eigenvalues`` has it.
        max_restarts: what they may take.
        progress: None: one bar, if tqdm is installed and stderr is a terminal, or in a notebook; True: in any case; False:
            none. It counts batches, towards the most that there can be without a restart of Lanczos.

    Raises:
        EigenvaluesNotConverged: one of the eigenvalues did not.
        ModuleNotFoundError: scipy is not installed.
        TypeError: an argument of the wrong kind.
        ValueError: an argument that means nothing, or what ``LossSurface`` raises.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(3)]
        >>> report = measure(model, torch.nn.functional.mse_loss, data, rho=0.1)
        >>> report.worst >= report.ascent
        True
    """
    rho = checks.radius(rho, "rho")
    top_k = checks.whole(top_k, "top_k", 1, "as many eigenvalues as are wanted")
    # What is asked of the last step is said before the first one has taken its time.
    checks.whole(average_directions, "average_directions", 2, "for a standard error")
    checks.whole(trace_samples, "trace_samples", 2, "for a standard error")
    checks.whole(worst_steps, "worst_steps", 1, "gradients per start")
    checks.whole(random_starts, "random_starts", 1, "beside the other starts")
    checks.whole(points, "points", 2, "from end to end")
    checks.positive(tolerance, "tolerance")
    checks.whole(max_restarts, "max_restarts", 1, "restarts of Lanczos")
    reach = checks.radius(radius, "radius") if radius is not None else 3 * rho or 0.1
    surface = LossSurface(model, loss, batches, count=count, batch_norm=batch_norm, seed=seed, progress=progress)
    dimension = surface.dimension
    if top_k > dimension:
        raise ValueError(f"top_k: expected at most {dimension}, the number of parameters, got {top_k}: ask for fewer.")
    most = first_passes(dimension, top_k) + most_gradients(STARTS, random_starts, worst_steps)
    most += 1 + 1 + average_directions + trace_passes(dimension, trace_samples) + 3 * points
    with surface.stage("sharpness", most):
        spectrum = top_eigenvalues(surface, top_k, tolerance=tolerance, max_restarts=max_restarts, seed=seed)
        top = spectrum.vectors[0]
        point = surface.gradient()
        worst = worst_sharpness(
            surface, rho, steps=worst_steps, random_starts=random_starts, seed=seed, eigenvector=top, point=point
        )
        ascent = ascent_sharpness(surface, rho, point=point)
        average = average_sharpness(surface, rho, directions=average_directions, seed=seed, point=point)
        trace = hessian_trace(surface, samples=trace_samples, seed=seed)
        directions = {
            "eigenvector": top,
            "gradient": unit(point.gradient),
            "random": unit(filter_normalized(surface, random_direction(surface, seed=seed))),
        }
        lines = {
            name: along(surface, direction, radius=reach, points=points)
            for name, direction in directions.items()
            if direction is not None
        }
    return SharpnessReport(
        parameters=dimension,
        dtype=surface.dtype,
        loss_dtype=str(surface.loss_dtype).removeprefix("torch."),
        samples=surface.samples or 0.0,
        batch_norm=batch_norm,
        seed=int(seed),
        rho=rho,
        loss=point.loss,
        gradient_norm=float(point.gradient.norm()),
        worst=worst.value,
        worst_start=worst.start,
        ascent=ascent,
        average=average,
        eigenvalues=tuple(spectrum.values.tolist()),
        trace=trace,
        alignment=alignment(surface, eigenvector=top, point=point),
        lines=lines,
        passes=surface.passes,
    )
