"""Which sharpness SAM minimises, on two surfaces small enough to draw [arXiv 2211.05729, Wen, Ma and Li].

    python examples/papers/toy_surfaces.py

The paper claims that SAM with one gradient of the whole batch drifts along the floor of the loss to where the Hessian's top
eigenvalue is smallest, its gradient aligned with the top eigenvector on the way, while SAM with one perturbation per example
drifts to where the trace is smallest. On a quadratic 0.5 x'Ax it ends in a cycle along the top eigenvector, of length
eta rho lambda_1 / (2 - eta lambda_1), with another sign every step. Gradient descent does none of this: it stays where it
reaches the floor.

The surface is a four-dimensional toy after the paper's; that its functions are the paper's could not be checked. It is
L = (l_1 + l_2) / 2 with the examples' losses l_1 = F_1(x_1, x_2) x_3^2 and l_2 = F_2(x_1, x_2) x_4^2. On its floor
x_3 = x_4 = 0 the Hessian has the eigenvalues F_1, F_2, 0, 0, so that F_1 and F_2 say where each sharpness is smallest:
lambda_1 = max(F_1, F_2) at (0, 0), the trace F_1 + F_2 at (0.8, 1/7). All in float64, with sam_fused's optimizers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Reproduction, Table, brief, make_parser, publish, run_jobs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD
from verdicts import Claim, summary

from sam_fused import SAM, MicroBatchSAM

TOP_MINIMISER, TRACE_MINIMISER = (0.0, 0.0), (0.8, 1 / 7)
ALIGNMENT_STEPS = (0, 10, 100, 1000, 10_000)  # of the table; the picture has more
QUADRATIC_CURVATURES, QUADRATIC_LR, QUADRATIC_RHO, QUADRATIC_STEPS = (4.0, 1.0), 0.1, 0.05, 100


class Setting(NamedTuple):
    lr: float
    rho: float
    steps: int
    colour: str


SETTINGS = {
    "gradient descent": Setting(0.05, 0.0, 1000, "tab:grey"),
    "SAM, full batch": Setting(0.05, 0.1, 10_000, "tab:orange"),
    "mSAM, m = |B|": Setting(0.01, 0.5, 2000, "tab:blue"),
    "SAM, batch of 1": Setting(0.01, 0.3, 5000, "tab:green"),
}


class Run(NamedTuple):
    """One trajectory on the four-dimensional surface; points are [x_1, x_2, x_3, x_4]."""

    method: str
    recorded: list[int]  # steps at which the two lists below were taken
    path: list[list[float]]  # [x_1, x_2], to four digits
    misalignment: list[float]  # 1 - |cos| of gradient and top eigenvector of the Hessian; nan for a gradient of zero
    halfway: list[float]  # the point after half the steps
    end: list[float]
    tail: list[float]  # mean point of the last third of the steps: where a noisy method hovers


class Results(NamedTuple):
    runs: list[Run]
    cycles: list[list[list[float]]]  # every point of SAM on the quadratic, [start, step, 2]


# ---- the quadratic ---------------------------------------------------------------------------------------------------


def cycle_length() -> float:
    """The paper's eta rho lambda_1 / (2 - eta lambda_1): the length of x where each step turns x into -x."""
    top = max(QUADRATIC_CURVATURES)
    return QUADRATIC_LR * QUADRATIC_RHO * top / (2 - QUADRATIC_LR * top)


def descend_quadratic(start: list[float]) -> list[list[float]]:
    """Every point of SAM on 0.5 x'Ax."""
    curvatures = torch.tensor(QUADRATIC_CURVATURES, dtype=torch.float64)
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = SAM([x], SGD, lr=QUADRATIC_LR, rho=QUADRATIC_RHO)

    def closure() -> Tensor:
        loss = 0.5 * (curvatures * x**2).sum()
        loss.backward()
        return loss

    path = [start]
    for _ in range(QUADRATIC_STEPS):
        optimizer.zero_grad()
        optimizer.step(closure)
        path.append(x.tolist())
    return path


# ---- the four-dimensional surface ------------------------------------------------------------------------------------


def floor_eigenvalues(x1: Any, x2: Any) -> tuple[Any, Any]:
    """(F_1, F_2), of floats, tensors or arrays."""
    return x1**2 + 6 * x2**2 + 8, 4 * (1 - x1) ** 2 + (1 - x2) ** 2 + 1


def example_losses(point: Tensor) -> Tensor:
    x1, x2, x3, x4 = point.unbind()
    first, second = floor_eigenvalues(x1, x2)
    return torch.stack([first * x3**2, second * x4**2])


def misalignment(point: Tensor) -> float:
    """1 - |cos(gradient, top eigenvector of the Hessian)| of the whole batch's loss."""

    def loss(x: Tensor) -> Tensor:
        return example_losses(x).mean()

    gradient = torch.autograd.functional.jacobian(loss, point)
    if gradient.norm() < 1e-150:  # where squares underflow, there is no direction left
        return math.nan
    top = torch.linalg.eigh(torch.autograd.functional.hessian(loss, point)).eigenvectors[:, -1]
    # |g - (g'v) v|^2 = |g|^2 sin^2, and 1 - cos = sin^2 / (1 + cos): 1 - |g'v| / |g| would end at its own rounding, 1e-16.
    along = torch.dot(gradient, top)
    sine, cosine = (gradient - along * top).norm() / gradient.norm(), along.abs() / gradient.norm()
    return (sine**2 / (1 + cosine)).item()


def make_step(method: str, point: torch.nn.Parameter, seed: int) -> Callable[[], object]:
    """What takes one step; the seed draws the examples of the batches of one."""
    lr, rho, *_ = SETTINGS[method]
    both, generator = torch.arange(2), torch.Generator().manual_seed(seed)

    def closure(examples: Tensor) -> Tensor:
        loss = example_losses(point)[examples].mean()
        loss.backward()
        return loss

    if method == "mSAM, m = |B|":
        micro_batch_sam = MicroBatchSAM([point], SGD, num_micro_batches=2, lr=lr, rho=rho)
        return lambda: micro_batch_sam.step(closure, both)

    sam = SAM([point], SGD, lr=lr, rho=rho)
    sam.enabled = method != "gradient descent"

    def step() -> None:
        examples = torch.randint(2, (1,), generator=generator) if method == "SAM, batch of 1" else both
        sam.zero_grad()
        sam.step(lambda: closure(examples))

    return step


def descend(method: str, start: list[float], seed: int) -> Run:
    point, steps = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)), SETTINGS[method].steps
    step = make_step(method, point, seed)
    recorded = sorted({*ALIGNMENT_STEPS, *np.geomspace(1, steps, 100).astype(int).tolist()} & set(range(steps + 1)))
    path, misalignments, halfway, tail = [], [], start, torch.zeros(4, dtype=torch.float64)
    for number in range(steps + 1):
        if number in recorded:
            path.append(brief(point.tolist()[:2]))
            misalignments.append(misalignment(point.detach()))
        if number == steps // 2:
            halfway = point.tolist()
        if number > steps - steps // 3:
            tail += point.detach() / (steps // 3)
        if number < steps:
            step()
    return Run(method, recorded, path, brief(misalignments), halfway, point.tolist(), tail.tolist())


def starts(count: int) -> list[list[float]]:
    """The first is the middle of the picture; the others are random, x_3 and x_4 small or large, of either sign."""
    generator = np.random.default_rng(0)
    points = [[0.5, 0.5, 0.3, 0.3]]
    while len(points) < count:
        height = generator.uniform(0.02, 0.4, 2) * generator.choice([-1, 1], 2)
        points.append([generator.uniform(-0.3, 1.3), generator.uniform(-0.3, 0.9), *height])
    return points


# ---- what came out ---------------------------------------------------------------------------------------------------


def minimiser_at(lr: float, share: float) -> tuple[float, float]:
    """Where one perturbation per example is at rest with this learning rate: ours to first order in rho, not the paper's.

    Example i moves x_3 or x_4 by -lr share 2 F_i (x + rho sign x), a cycle whose perturbed point is at
    c_i = rho / (1 - lr share F_i). The drift along the floor is grad F_i c_i^2, summed: for lr -> 0 that of the trace.
    `share` is 1/2 where both examples are in each step, 1 where one is.
    """
    x1, x2 = TRACE_MINIMISER
    for _ in range(100):
        first, second = (1 / (1 - lr * share * eigenvalue) ** 2 for eigenvalue in floor_eigenvalues(x1, x2))
        x1, x2 = 4 * second / (first + 4 * second), second / (6 * first + second)
    return x1, x2


def distance(point: list[float], target: tuple[float, float]) -> float:
    return math.dist(point[:2], target)


def of(runs: list[Run], method: str) -> list[Run]:
    return [run for run in runs if run.method == method]


def check_quadratic(paths: list[list[list[float]]]) -> list[Claim]:
    points = np.array(paths)  # [start, step, 2]
    norms = np.linalg.norm(points[:, -1], axis=1)
    error = np.abs(norms / cycle_length() - 1).max()
    sideways = np.abs(points[:, -1, 1] / norms).max()
    flips = (np.sign(points[:, -20:, 0]) == -np.sign(points[:, -21:-1, 0])).all()
    return [
        Claim(
            f"on a quadratic SAM ends at ||x|| = {cycle_length():.4f}",
            bool(error < 1e-6),
            f"largest relative error of {len(paths)} starts {error:.0e}, bound 1e-6",
        ),
        Claim(
            "on a quadratic SAM ends along the top eigenvector, with another sign every step",
            bool(sideways < 1e-6 and flips),
            f"largest component across {sideways:.0e}, bound 1e-6",
        ),
    ]


def check_surface(runs: list[Run]) -> list[Claim]:
    plain, full = of(runs, "gradient descent"), of(runs, "SAM, full batch")
    micro, single = of(runs, "mSAM, m = |B|"), of(runs, "SAM, batch of 1")
    moved = max(math.dist(run.end, run.halfway) for run in plain)
    nearest = min(distance(plain[0].end, TOP_MINIMISER), distance(plain[0].end, TRACE_MINIMISER))
    to_top = max(max(map(abs, run.end[:2])) for run in full)
    height = max(abs(abs(run.end[2]) - 0.025) for run in full)  # the cycle's length at lambda_1 = 8
    across = max(run.misalignment[-1] for run in full)
    to_trace = max(distance(run.end, TRACE_MINIMISER) for run in micro)
    tail_to_trace = max(distance(run.tail, TRACE_MINIMISER) for run in single)
    return [
        Claim(
            "gradient descent stays where it reaches the floor, at neither minimiser",
            moved < 1e-6 and nearest > 0.3,
            f"moves {moved:.0e} in the later half of its steps; from the middle it ends {nearest:.2f} off the nearer one",
        ),
        Claim(
            "full-batch SAM ends at the smallest top eigenvalue, (0, 0), in a cycle of |x_3| = 0.025",
            to_top < 1e-3 and height < 1e-3,
            f"largest |x_1|, |x_2| {to_top:.1e}, largest error of |x_3| {height:.1e}, bounds 1e-3",
        ),
        Claim(
            "under full-batch SAM the gradient aligns with the top eigenvector",
            across < 1e-6,
            f"largest 1 - |cos| at the end {across:.0e}, bound 1e-6",
        ),
        Claim(
            "mSAM with one example a micro-batch ends at the smallest trace, (0.8, 1/7)",
            to_trace < 0.02,
            f"largest distance {to_trace:.4f}, bound 0.02",
        ),
        Claim(
            "SAM with one random example a step hovers around the smallest trace",
            tail_to_trace < 0.1,
            f"largest distance of a mean over the last third of the steps {tail_to_trace:.3f}, bound 0.1",
        ),
    ]


def check(results: Results) -> list[Claim]:
    return check_quadratic(results.cycles) + check_surface(results.runs)


def ends(runs: list[Run]) -> Table:
    expected = {
        "SAM, full batch": TOP_MINIMISER,
        "mSAM, m = |B|": minimiser_at(SETTINGS["mSAM, m = |B|"].lr, share=0.5),
        "SAM, batch of 1": minimiser_at(SETTINGS["SAM, batch of 1"].lr, share=1.0),
    }
    rows = []
    for method in SETTINGS:
        group = of(runs, method)
        points = [run.tail if method == "SAM, batch of 1" else run.end for run in group]
        x1, x2 = expected.get(method, (math.nan, math.nan))
        rows.append(
            [
                method,
                summary([point[0] for point in points]),
                summary([point[1] for point in points]),
                f"({x1:.3f}, {x2:.3f})" if method in expected else "",
                summary([distance(point, TOP_MINIMISER) for point in points]),
                summary([distance(point, TRACE_MINIMISER) for point in points]),
            ]
        )
    title = f"Where each method ends, {len(runs) // len(SETTINGS)} starts, mean ± standard error"
    return Table(title, ["method", "x_1", "x_2", "expected at this lr", "from least λ1", "from least trace"], rows)


def alignment_over_time(runs: list[Run]) -> dict[int, list[float]]:
    """1 - |cos| of full-batch SAM's gradient and the top eigenvector, one per start, at ALIGNMENT_STEPS."""
    full = of(runs, "SAM, full batch")
    return {step: [run.misalignment[run.recorded.index(step)] for run in full] for step in ALIGNMENT_STEPS}


def alignment(runs: list[Run]) -> Table:
    rows = []
    for step, each in alignment_over_time(runs).items():
        rows.append([f"{step:,}", f"{min(each):.0e}", f"{np.median(each):.0e}", f"{max(each):.0e}"])
    title = "Full-batch SAM, 1 - |cos(gradient, top eigenvector)|, over the starts"
    return Table(title, ["step", "least", "median", "largest"], rows)


def tables(results: Results) -> list[Table]:
    return [ends(results.runs), alignment(results.runs)]


def draw_cycle(axes: Axes, paths: list[list[list[float]]]) -> None:
    for path in paths:
        axes.semilogy(np.linalg.norm(path, axis=1), c="tab:orange", lw=0.8)
        axes.semilogy(np.abs(np.array(path)[:, 1]), c="tab:purple", lw=0.8)
    axes.plot([], c="tab:orange", label="||x||")
    axes.plot([], c="tab:purple", label="|x_2|, across the top eigenvector")
    axes.axhline(cycle_length(), c="black", ls=":", label="eta rho λ1 / (2 - eta λ1)")
    axes.set(title="Quadratic: SAM ends in a cycle along v1", xlabel="step", ylim=(1e-10, 2))


def draw_trajectories(axes: Axes, runs: list[Run]) -> None:
    x1, x2 = np.meshgrid(np.linspace(-0.45, 1.45, 150), np.linspace(-0.45, 1.05, 150))
    first, second = floor_eigenvalues(x1, x2)
    axes.contour(x1, x2, np.maximum(first, second), levels=12, colors="tab:orange", alpha=0.35, linewidths=0.8)
    axes.contour(x1, x2, first + second, levels=12, colors="tab:blue", alpha=0.35, linewidths=0.8, linestyles="dashed")
    for method in ("SAM, batch of 1", "SAM, full batch", "mSAM, m = |B|", "gradient descent"):
        for number, run in enumerate(of(runs, method)):
            path, colour = np.array(run.path), SETTINGS[method].colour
            axes.plot(path[:, 0], path[:, 1], c=colour, lw=0.9, alpha=0.8, label=None if number else method)
            axes.plot(*path[-1, :2], "o", c=colour, ms=3)
    axes.plot(*TOP_MINIMISER, "*", c="black", ms=11, label="least λ1")
    axes.plot(*TRACE_MINIMISER, "P", c="black", ms=8, label="least trace")
    axes.set(title="Floor: contours of λ1 (solid), trace (dashed)", xlabel="x_1", ylabel="x_2", xlim=(-0.45, 1.45))


def draw_alignment(axes: Axes, runs: list[Run]) -> None:
    for method in ("SAM, full batch", "mSAM, m = |B|"):
        for number, run in enumerate(of(runs, method)):
            steps, label = np.array(run.recorded) + 1, None if number else method
            axes.loglog(steps, run.misalignment, c=SETTINGS[method].colour, lw=0.8, label=label)
    axes.set(title="1 - |cos(gradient, top eigenvector)|", xlabel="step + 1", ylim=(1e-16, 2))


def plot(results: Results) -> Figure:
    figure = Figure(figsize=(15, 4.6), dpi=85, layout="constrained")
    panels = figure.subplots(1, 3)
    draw_cycle(panels[0], results.cycles)
    draw_trajectories(panels[1], results.runs)
    draw_alignment(panels[2], results.runs)
    for axes in panels:
        axes.legend(fontsize=8)
    return figure


def restore(results: dict[str, Any]) -> Results:
    return Results([Run(**run) for run in results["runs"]], results["cycles"])


REPRODUCTION = Reproduction("toy_surfaces", restore, tables, check, lambda results: [], plot)


def main() -> None:
    options = make_parser(__doc__, seeds=5).parse_args()
    begin, seeds = time.perf_counter(), 1 if options.smoke else options.seeds
    points = starts(seeds)
    longest_first = sorted(SETTINGS, key=lambda method: -SETTINGS[method].steps)
    jobs = [(descend, method, point, seed) for method in longest_first for seed, point in enumerate(points)]
    runs = run_jobs(jobs, "Descending")
    cycles = [descend_quadratic(point) for point in [[0.3, -0.7], *(point[:2] for point in points[1:])]]
    publish(REPRODUCTION, Results(runs, cycles), options.output, seeds, begin)


if __name__ == "__main__":
    main()
