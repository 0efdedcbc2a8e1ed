"""Peak extra memory of a step: the high-water mark of torch's CPU allocator, read from the profiler's memory events.

Every tensor that torch, a compiled graph or a torch extension allocates goes through that allocator, so this sees kept
backups and temporaries alike, to the byte, and is not disturbed by what the process held before. It does not see
memory that a library takes from the C heap by itself (a few KB of tables per step, in every variant).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def high_water_mark(events: Iterable[tuple[int, int]]) -> int:
    """The highest running sum over (time, bytes) events, freed bytes being negative; 0 where nothing was allocated."""
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that `run` held at once in CPU tensors allocated while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Held until the profiler stops: what `run` built must not be freed before its peak is known.
        kept = run()
    inner = profiler.profiler
    assert inner is not None and inner.kineto_results is not None, "the profiler records memory only once it has run"
    events = [
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    del kept
    return high_water_mark(events)
