"""Was somebody else using the cores? The share of the machine that other processes took while a round was measured.

`/proc/stat` counts what every core did, in clock ticks; what this process used is taken off. Time that the hypervisor
stole counts as used by others: it is time that this process wanted and did not get.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")
# The bound of a kept round. At two cores and 100 ticks a second, 0.3 s are 60 ticks: 3 % is two ticks, the least
# that the counter can tell from nothing.
MAX_FOREIGN_SHARE = 0.03


class CoreTicks(NamedTuple):
    """Sums over all cores since boot, in clock ticks."""

    busy: int
    total: int


@dataclass(frozen=True)
class Snapshot:
    """The counters at one moment; `cores` is None where the machine does not say."""

    cores: CoreTicks | None
    own_seconds: float


def parse_cpu_line(line: str) -> CoreTicks:
    """The sums of /proc/stat's first line: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice.

    Guest time is inside user and nice already, so it is not added again; idle and iowait are the cores at rest.
    """
    fields = line.split()
    if len(fields) < 5 or fields[0] != "cpu":
        raise ValueError(f"the first line of {STAT} must start with 'cpu' and hold at least 4 numbers, got {line!r}")
    counts = [int(field) for field in fields[1:9]]
    resting = counts[3] + (counts[4] if len(counts) > 4 else 0)
    total = sum(counts)
    return CoreTicks(busy=total - resting, total=total)


def foreign_share(before: Snapshot, after: Snapshot, ticks_per_second: float) -> float | None:
    """The part of all cores' time between two snapshots that was used outside this process, 0 to 1.

    None where the counters are missing or did not move (some sandboxes show a frozen file): then nothing is known.
    """
    if before.cores is None or after.cores is None:
        return None
    total = after.cores.total - before.cores.total
    if total <= 0:
        return None
    own = (after.own_seconds - before.own_seconds) * ticks_per_second
    # Ticks sample, process times are exact: their difference may come out slightly below zero.
    return max(0.0, (after.cores.busy - before.cores.busy - own) / total)


def snapshot() -> Snapshot:
    """The counters now. Own time is user and system of this process, its threads, and children it has waited for."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    try:
        with STAT.open() as file:
            cores = parse_cpu_line(file.readline())
    except (OSError, ValueError):
        cores = None
    return Snapshot(cores, own)


class NoiseGuard:
    """Measures one round and says whether to keep it: `with guard: ...`, then `guard.keep`.

    Where the counters say nothing every round is kept and `available` is False, for the report to say so.
    """

    def __init__(self, max_foreign_share: float = MAX_FOREIGN_SHARE) -> None:
        self.max_foreign_share = max_foreign_share
        self.ticks_per_second = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0
        self.available = snapshot().cores is not None
        self.share: float | None = None

    def __enter__(self) -> NoiseGuard:
        self._before = snapshot()
        return self

    def __exit__(self, *exception: object) -> None:
        self.share = foreign_share(self._before, snapshot(), self.ticks_per_second)

    @property
    def keep(self) -> bool:
        """True where others used no more than the bound, or where nobody can tell."""
        return self.share is None or self.share <= self.max_foreign_share

    def describe(self) -> str:
        """One sentence for the report."""
        if not self.available:
            return f"no defence against other processes: {STAT} is missing or unreadable here, so every round was kept"
        return (
            f"rounds in which other processes used more than {self.max_foreign_share:.0%} of the cores "
            f"({STAT} less this process's own time, steal included) were discarded"
        )
