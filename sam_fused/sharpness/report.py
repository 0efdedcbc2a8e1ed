"""All of it by one call: a report to print, to keep as JSON, and to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checks
from .directions import filter_normalized, random_direction, unit
from .estimate import Estimate
from .hessian import alignment, hessian_trace, top_eigenvalues
from .landscape import Line, along
from .radius import ascent_sharpness, average_sharpness, worst_sharpness
from .surface import LossSurface

FORMAT = 1


@dataclass(frozen=True)
class SharpnessReport:
    """What ``measure`` found.

    Attributes:
        parameters: D, how many weights.
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

    parameters: int
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

    def __str__(self) -> str:
        rows = [
            ("loss", f"{self.loss:.6g}"),
            ("gradient norm", f"{self.gradient_norm:.6g}"),
            ("worst direction", f"{self.worst:.6g}, at least (from {self.worst_start})"),
            ("ascent direction", f"{self.ascent:.6g}"),
            ("average direction", str(self.average)),
            ("top eigenvalues", ", ".join(f"{value:.6g}" for value in self.eigenvalues)),
            ("trace", str(self.trace)),
            ("|cos(gradient, v1)|", f"{self.alignment:.4f}"),
        ]
        head = f"Sharpness at rho = {self.rho:g}: {self.parameters:,} parameters, {self.samples:,.6g} samples"
        return "\n".join([f"{head}, batch_norm={self.batch_norm!r}, seed {self.seed}"] + [f"  {a:<20} {b}" for a, b in rows])

    def print(self) -> None:
        """The numbers, as plain text."""
        print(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, which is also written to ``path`` if there is one. Numbers keep their bits.

        JSON knows no inf and no NaN: they are written as strings.
        """
        text = json.dumps({"format": FORMAT, **_plain(asdict(self))}, indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> SharpnessReport:
        """A report from what ``to_json`` gave: the text, or a path to it.

        Raises:
            ValueError: it is none.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            text = source
        else:
            text = Path(source).read_text(encoding="utf-8")
        found = json.loads(text)
        wanted = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT or found.keys() != wanted:
            raise ValueError(f"source: expected a sharpness report of format {FORMAT}, got something else: measure again.")
        for name in ("loss", "gradient_norm", "worst", "ascent", "rho", "samples", "alignment"):
            found[name] = float(found[name])
        for name in ("average", "trace"):
            estimate = found[name]
            found[name] = Estimate(float(estimate["mean"]), float(estimate["standard_error"]), estimate["samples"])
        found["eigenvalues"] = _floats(found["eigenvalues"])
        found["lines"] = {
            name: Line(_floats(line["positions"]), _floats(line["losses"])) for name, line in found["lines"].items()
        }
        return cls(**found)

    def plot(self, path: str | Path) -> Path:
        """Lines and eigenvalues as a picture, in the format of the path's suffix (``.png``). Needs matplotlib."""
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
    progress: bool = True,
) -> SharpnessReport:
    """Three kinds of sharpness at ``rho``, the top of the Hessian's spectrum, its trace, and three lines through the weights.

    Passes over the data, between 100 and 200 with the defaults: 20 or more products for the eigenvalues, 1 for the gradient and
    1 for the ascent, up to ``worst_steps`` for each of ``3 + random_starts`` starts, ``average_directions``, 1 or a few for the
    trace, ``points`` for each of 3 lines. Nothing of the model, its gradients or the random number generators is changed.

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
        seed: of everything random: the same gives the same report.
        progress: bars, if tqdm is installed and stderr is a terminal.

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
    top_k = checks.whole(top_k, "top_k", 1, "eigenvalues")
    # What is asked of the last step is said before the first one has taken its time.
    checks.whole(average_directions, "average_directions", 2, "for a standard error")
    checks.whole(trace_samples, "trace_samples", 2, "for a standard error")
    checks.whole(worst_steps, "worst_steps", 1, "gradients per start")
    checks.whole(random_starts, "random_starts", 1, "beside the other starts")
    checks.whole(points, "points", 2, "from end to end")
    reach = checks.radius(radius, "radius") if radius is not None else 3 * rho or 0.1
    surface = LossSurface(model, loss, batches, count=count, batch_norm=batch_norm, seed=seed, progress=progress)
    if top_k > surface.dimension:
        raise ValueError(f"top_k: expected at most {surface.dimension}, the number of parameters, got {top_k}: ask for fewer.")
    spectrum = top_eigenvalues(surface, top_k, seed=seed)
    top = spectrum.vectors[0]
    point = surface.gradient()
    worst = worst_sharpness(
        surface, rho, steps=worst_steps, random_starts=random_starts, seed=seed, eigenvector=top, point=point
    )
    directions = {
        "eigenvector": top,
        "gradient": unit(point.gradient),
        "random": unit(filter_normalized(surface, random_direction(surface, seed=seed))),
    }
    return SharpnessReport(
        parameters=surface.dimension,
        batch_norm=batch_norm,
        seed=seed,
        rho=rho,
        loss=point.loss,
        gradient_norm=float(point.gradient.norm()),
        worst=worst.value,
        worst_start=worst.start,
        ascent=ascent_sharpness(surface, rho, point=point),
        average=average_sharpness(surface, rho, directions=average_directions, seed=seed, point=point),
        eigenvalues=tuple(spectrum.values.tolist()),
        trace=hessian_trace(surface, samples=trace_samples, seed=seed),
        alignment=alignment(surface, eigenvector=top, point=point),
        lines={
            name: along(surface, direction, radius=reach, points=points)
            for name, direction in directions.items()
            if direction is not None
        },
        samples=surface.samples or 0.0,
        passes=surface.passes,
    )


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
