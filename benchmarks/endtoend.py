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
from torch import Tensor, nn

from benchmarks.baselines import BASES, RHO, ForeachInPlaceSAM, NaiveSAM, make_base
from benchmarks.measure import BLOCK_SECONDS, Rounds, block, quartiles, steps_per_block
from benchmarks.nets import Net
from benchmarks.noise import NoiseGuard

Step = Callable[[], float]
LossFunction = Callable[[nn.Module], Tensor]
BASE_OPTIMIZER = "sgd_fused"


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


def _timed(step: Callable[[], object]) -> Step:
    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def _sgd_step(model: nn.Module, loss: LossFunction, **form: bool) -> Step:
    optimizer = make_base(list(model.parameters()), "sgd", **form)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return _timed(step)


def _two_phase_step(model: nn.Module, loss: LossFunction, kind: type[NaiveSAM] | type[ForeachInPlaceSAM]) -> Step:
    optimizer = kind(list(model.parameters()), "sgd")

    def step() -> None:
        optimizer.base_optimizer.zero_grad()
        loss(model).backward()
        optimizer.first_step()
        optimizer.base_optimizer.zero_grad()
        loss(model).backward()
        optimizer.second_step()

    return _timed(step)


def _fused_step(model: nn.Module, loss: LossFunction) -> Step:
    from sam_fused import SAM

    optimizer_class, settings = BASES["sgd"]
    optimizer: Any = SAM(list(model.parameters()), optimizer_class, rho=RHO, **settings)

    def closure() -> Tensor:
        value = loss(model)
        value.backward()
        return value

    return _timed(lambda: optimizer.step(closure))


OPTIMIZERS: dict[str, Callable[[nn.Module, LossFunction], Step]] = {
    "sgd": lambda model, loss: _sgd_step(model, loss),
    BASE_OPTIMIZER: lambda model, loss: _sgd_step(model, loss, fused=True),
    "naive_sam": lambda model, loss: _two_phase_step(model, loss, NaiveSAM),
    "foreach_inplace_sam": lambda model, loss: _two_phase_step(model, loss, ForeachInPlaceSAM),
    "sam_fused": _fused_step,
}


def measure_net(
    net: Net,
    threads: int,
    rounds: int,
    seconds: float,
    seed: int,
    block_seconds: float = BLOCK_SECONDS,
    on_round: Callable[[], None] = lambda: None,
) -> list[EndToEndRow]:
    """Each optimizer trains a copy of the net of its own; a round is one block of steps of each, in turn."""
    used_threads = net.threads or threads
    reason = net.why_not()
    if reason is not None:
        return [EndToEndRow(net.name, net.title, name, net.unit, used_threads, reason=reason) for name in OPTIMIZERS]
    before = torch.get_num_threads()
    torch.set_num_threads(used_threads)
    try:
        runs = {}
        for name, make_step in OPTIMIZERS.items():
            torch.manual_seed(seed)
            model, loss = net.make()
            runs[name] = make_step(model.train(), loss)
        kept, discarded = _rounds(runs, rounds, seconds, block_seconds, on_round)
    finally:
        torch.set_num_threads(before)
    return [_row(net, name, used_threads, kept, discarded) for name in OPTIMIZERS]


def _rounds(
    runs: dict[str, Step], rounds: int, seconds: float, block_seconds: float, on_round: Callable[[], None]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    steps = {name: steps_per_block(run, block_seconds) for name, run in runs.items()}
    kept: list[dict[str, float]] = []
    discarded: list[dict[str, float]] = []
    deadline = time.perf_counter() + seconds
    for _ in range(3 * rounds):
        guard = NoiseGuard()
        with guard:
            figures = {name: block(run, steps[name]) for name, run in runs.items()}
        (kept if guard.keep else discarded).append(figures)
        on_round()
        if len(kept) >= rounds or time.perf_counter() >= deadline:
            break
    return kept, discarded


def _row(net: Net, name: str, threads: int, kept: list[dict[str, float]], discarded: list[dict[str, float]]) -> EndToEndRow:
    def pair(figures: dict[str, float]) -> tuple[float, float]:
        return figures[name], figures[BASE_OPTIMIZER]

    result = Rounds([pair(figures) for figures in kept], [pair(figures) for figures in discarded])
    low, middle, high = quartiles([seconds for seconds, _ in result.used])
    over = (statistics.median(result.ratios) / 2 - 1) * 100
    return EndToEndRow(
        net.name,
        net.title,
        name,
        net.unit,
        threads,
        median_ms=middle * 1e3,
        q1_ms=low * 1e3,
        q3_ms=high * 1e3,
        units_per_s=net.units_per_batch / middle,
        over_twice_base_percent=None if name in ("sgd", BASE_OPTIMIZER) else over,
        rounds_kept=len(kept),
        rounds_discarded=len(discarded),
        noisy=result.noisy,
    )
