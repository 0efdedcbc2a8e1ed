"""A real training step: forward and backward once for SGD, twice for SAM, with what the optimizer adds.

"Over twice the base step" is what a SAM step costs beyond two steps of SGD, in per cent of those two. The base is
torch's fused SGD, the cheapest, so the figure is the strictest. Two steps of SGD hold two updates and a SAM step one:
the figure may fall below zero.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import BASES, RHO, ForeachInPlaceSAM, NaiveSAM, make_base
from benchmarks.measure import BLOCK_SECONDS, PACE, Pace, Rounds, quartiles, rounds_of
from benchmarks.nets import Net, Task

Step = Callable[[], float]


@dataclass(frozen=True)
class Contest:
    """Who trains a net of their own side by side. What is not `plain`, and computes two gradients, is held against twice
    `base`; `title` is added to the net's."""

    optimizers: dict[str, Callable[[Task], Step]]
    base: str
    plain: tuple[str, ...]
    title: str = ""
    pace: Pace = PACE


@dataclass
class EndToEndRow:
    """One optimizer on one network. Speeds are units per second of whole training steps."""

    net: str
    title: str
    optimizer: str
    unit: str
    threads: int
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    units_per_s: float | None = None
    over_twice_base_percent: float | None = None
    rounds_kept: int = 0
    rounds_discarded: int = 0
    noisy: bool = False
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return asdict(self)


def timed(step: Callable[[], object]) -> Step:
    """The step with its seconds."""

    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def _sgd_step(task: Task, **form: bool) -> Step:
    optimizer = make_base(list(task.model.parameters()), "sgd", **form)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(task.model, *task.batch).backward()
        optimizer.step()

    return timed(step)


def _two_phase_step(task: Task, kind: type[NaiveSAM] | type[ForeachInPlaceSAM]) -> Step:
    optimizer = kind(list(task.model.parameters()), "sgd")

    def step() -> None:
        optimizer.base_optimizer.zero_grad()
        task.loss(task.model, *task.batch).backward()
        optimizer.first_step()
        optimizer.base_optimizer.zero_grad()
        task.loss(task.model, *task.batch).backward()
        optimizer.second_step()

    return timed(step)


def _fused_step(task: Task) -> Step:
    from sam_fused import SAM

    optimizer_class, settings = BASES["sgd"]
    optimizer: Any = SAM(list(task.model.parameters()), optimizer_class, rho=RHO, **settings)

    def closure() -> Tensor:
        value = task.loss(task.model, *task.batch)
        value.backward()
        return value

    return timed(lambda: optimizer.step(closure))


SAM_CONTEST = Contest(
    {
        "sgd": _sgd_step,
        "sgd_fused": lambda task: _sgd_step(task, fused=True),
        "naive_sam": lambda task: _two_phase_step(task, NaiveSAM),
        "foreach_inplace_sam": lambda task: _two_phase_step(task, ForeachInPlaceSAM),
        "sam_fused": _fused_step,
    },
    base="sgd_fused",
    plain=("sgd", "sgd_fused"),
)


def measure_net(
    net: Net,
    threads: int,
    rounds: int,
    seconds: float,
    seed: int,
    block_seconds: float = BLOCK_SECONDS,
    on_round: Callable[[], None] = lambda: None,
    contest: Contest = SAM_CONTEST,
) -> list[EndToEndRow]:
    """Each optimizer trains a copy of the net of its own; a round is one block of steps of each, in turn."""
    used_threads = net.threads or threads
    reason = net.why_not()
    if reason is not None:
        return [_empty_row(net, contest, name, used_threads, reason) for name in contest.optimizers]
    before = torch.get_num_threads()
    torch.set_num_threads(used_threads)
    try:
        runs = {}
        for name, make_step in contest.optimizers.items():
            torch.manual_seed(seed)
            task = net.make()
            task.model.train()
            runs[name] = make_step(task)
        kept, discarded = rounds_of(runs, rounds, seconds, block_seconds, on_round, contest.pace)
    finally:
        torch.set_num_threads(before)
    return [_row(net, contest, name, used_threads, kept, discarded) for name in contest.optimizers]


def _empty_row(net: Net, contest: Contest, name: str, threads: int, reason: str | None = None) -> EndToEndRow:
    return EndToEndRow(net.name, net.title + contest.title, name, net.unit, threads, reason=reason)


def _row(
    net: Net,
    contest: Contest,
    name: str,
    threads: int,
    kept: list[dict[str, float]],
    discarded: list[dict[str, float]],
) -> EndToEndRow:
    def pair(figures: dict[str, float]) -> tuple[float, float]:
        return figures[name], figures[contest.base]

    result = Rounds([pair(figures) for figures in kept], [pair(figures) for figures in discarded])
    row = _empty_row(net, contest, name, threads)
    low, middle, high = quartiles([seconds for seconds, _ in result.used])
    row.q1_ms, row.median_ms, row.q3_ms = low * 1e3, middle * 1e3, high * 1e3
    row.units_per_s = net.units_per_batch / middle
    if name not in contest.plain:
        row.over_twice_base_percent = (statistics.median(result.ratios) / 2 - 1) * 100
    row.rounds_kept, row.rounds_discarded, row.noisy = len(kept), len(discarded), result.noisy
    return row
