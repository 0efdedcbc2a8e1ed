"""The arithmetic of the noise defence, on counters written by hand."""

from pathlib import Path

import pytest

from benchmarks import noise
from benchmarks.noise import CoreTicks, NoiseGuard, Snapshot, foreign_share, parse_cpu_line

#            user nice system idle iowait irq softirq steal guest guest_nice
LINE = "cpu  100  10   30     500  40     5   6       7     20    3"


def test_busy_counts_steal_and_leaves_out_rest_and_guests() -> None:
    assert parse_cpu_line(LINE) == CoreTicks(busy=100 + 10 + 30 + 5 + 6 + 7, total=698)


def test_old_kernels_with_four_numbers_are_read() -> None:
    assert parse_cpu_line("cpu 1 2 3 4") == CoreTicks(busy=6, total=10)


@pytest.mark.parametrize("line", ["", "cpu0 1 2 3 4", "cpu 1 2 3", "intr 5 6 7 8 9"])
def test_another_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="must start with 'cpu'"):
        parse_cpu_line(line)


def share(busy: int, total: int, own_seconds: float) -> float | None:
    before = Snapshot(CoreTicks(1000, 5000), 10.0)
    return foreign_share(before, Snapshot(CoreTicks(1000 + busy, 5000 + total), 10.0 + own_seconds), 100.0)


def test_own_time_is_taken_off() -> None:
    # 200 ticks on all cores, 110 busy, 1.0 s = 100 ticks of them ours: 10 / 200.
    assert share(110, 200, 1.0) == pytest.approx(0.05)
    assert share(110, 200, 0.0) == pytest.approx(0.55)


def test_sampling_error_does_not_go_below_zero() -> None:
    assert share(99, 200, 1.0) == 0.0


def test_unknown_where_the_counters_are_missing_or_stand_still() -> None:
    assert foreign_share(Snapshot(None, 0.0), Snapshot(CoreTicks(1, 2), 0.0), 100.0) is None
    assert foreign_share(Snapshot(CoreTicks(1, 2), 0.0), Snapshot(None, 0.0), 100.0) is None
    assert share(0, 0, 1.0) is None


@pytest.mark.parametrize(("busy", "keep"), [(105, True), (106, True), (107, False)])
def test_a_round_is_kept_up_to_three_per_cent(monkeypatch: pytest.MonkeyPatch, busy: int, keep: bool) -> None:
    snapshots = iter(
        [
            Snapshot(CoreTicks(0, 0), 0.0),  # the guard asks once whether there are counters at all
            Snapshot(CoreTicks(0, 0), 0.0),
            Snapshot(CoreTicks(busy, 200), 1.0),
        ]
    )
    monkeypatch.setattr(noise, "snapshot", lambda: next(snapshots))
    guard = NoiseGuard()
    guard.ticks_per_second = 100.0
    with guard:
        pass
    assert guard.keep is keep


def test_a_machine_without_counters_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(noise, "STAT", tmp_path / "missing")
    guard = NoiseGuard()
    with guard:
        pass
    assert guard.keep and guard.share is None
    assert "no defence" in guard.describe() and "missing" in guard.describe()
