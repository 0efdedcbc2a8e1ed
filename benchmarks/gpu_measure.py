"""Clocks and counters of a device: kernels by events, steps with the host waiting, launches by the profiler.

The same functions run on the CPU, where there are no events, no launches and no peak: a rehearsal goes through everything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Gradients
from benchmarks.variants import assign_gradients

T = TypeVar("T")

# Written between two timed calls: several times the second-level cache of any card, so that a call finds it cold; and long
# enough for the host to have launched the call before the device comes to it, or the host would be timed.
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Device:
    """Where things are measured."""

    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether there are events, launches and memory statistics."""
        return self.name.startswith("cuda")

    def wait(self) -> None:
        """Until everything launched is done."""
        if self.is_cuda:
            torch.cuda.synchronize()


class Clock:
    """Seconds of single calls on the device, its second-level cache cold."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES if device.is_cuda else 0, dtype=torch.uint8, device=device.name)

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """The median over `repeats` calls."""
        return statistics.median(self._with_events(call, repeats) if self.device.is_cuda else self._by_host(call, repeats))

    def _with_events(self, call: Callable[[], object], repeats: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self.device.wait()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _by_host(self, call: Callable[[], object], repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found


def alternating(clock: Clock, calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call over rounds A B C A B C: a clock that the card changes meanwhile favours nobody."""
    for call in calls.values():
        call()  # compiles, allocates, looks up
    blocks = [{name: clock.seconds(call, repeats) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(block[name] for block in blocks) for name in calls}


class StepDriver:
    """`first_step()` and `second_step()`, each from an idle device until it is idle again; gradients are assigned outside.

    `host` collects the seconds until the two calls had returned: what the host is kept from launching the next forward.
    """

    def __init__(self, params: list[Tensor], optimizer: object, device: Device) -> None:
        self.params, self.optimizer, self.device = params, optimizer, device
        self.host: list[float] = []

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """One step; returns its seconds, the device's work included."""
        total = host = 0.0
        for grads, phase in ((next(passes), "first_step"), (next(passes), "second_step")):
            assign_gradients(self.params, grads)
            call = getattr(self.optimizer, phase)
            self.device.wait()
            start = time.perf_counter()
            call()
            returned = time.perf_counter()
            self.device.wait()
            total += time.perf_counter() - start
            host += returned - start
        self.host.append(host)
        return total

    def host_seconds(self) -> float:
        """The median, without the steps that built tables and compiled."""
        return statistics.median(self.host[len(self.host) // 4 :])


def fresh_gradients(make: Callable[[int], list[Tensor]], seed: int) -> Gradients:
    """Two lists that change places from step to step, as fresh gradients' storages do."""
    return Gradients((make(seed + 1), make(seed + 2)))


@dataclass(frozen=True)
class Launched:
    """What a device was asked to do: kernels, and copies or fills of memory."""

    kernels: int
    copies: int


def launches(run: Callable[[], object], device: Device) -> Launched | None:
    """Counts the device's activities while `run` runs, as the profiler records them. None where there is no device.

    Raises:
        RuntimeError: the profiler saw nothing of the device, as where a container may not use its counters.
    """
    if not device.is_cuda:
        return None
    device.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        device.wait()
    inner = profiler.profiler
    assert inner is not None and inner.kineto_results is not None, "the profiler has records once it has run"
    # An annotation on the host, such as torch's around an optimizer's step, has a shadow among the device's events.
    seen = [event for event in inner.kineto_results.events() if event.device_type() == DeviceType.CUDA]
    names = [event.name() for event in seen if not _is_annotation(event)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    if not names:
        raise RuntimeError("the profiler recorded nothing on the device: CUPTI may be forbidden here")
    return Launched(len(names) - copies, copies)


def _is_annotation(event: object) -> bool:
    name = event.name()  # type: ignore[attr-defined]
    is_said = getattr(event, "is_user_annotation", lambda: False)()
    return bool(is_said) or name.startswith(("Optimizer.", "ProfilerStep", "Context Sync", "Event Sync", "Stream Sync"))


def with_peak(run: Callable[[], T], device: Device) -> tuple[T, int | None]:
    """What `run` gives, and the most bytes that it held at once above what was held before; None where nobody counts."""
    if not device.is_cuda:
        return run(), None
    device.wait()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    device.wait()
    return result, torch.cuda.max_memory_allocated() - before
