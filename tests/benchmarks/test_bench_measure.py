"""Timing, rounds, budgets and memory, on fakes whose figures are known."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from benchmarks import measure, variants
from benchmarks.baselines import NaiveSAM
from benchmarks.cases import SETS, make_gradients, make_parameters
from benchmarks.measure import (
    Gradients,
    Pace,
    Rounds,
    alternate,
    best_form,
    block,
    quartiles,
    rounds_of,
    steps_per_block,
    yardstick,
)
from benchmarks.memory import high_water_mark, peak_bytes
from benchmarks.report import Row, Target, judge, targets
from benchmarks.suite import Budget, extra_bytes
from benchmarks.variants import BASELINES, ClosureDriver, Form, PhaseDriver, Variant, by_name

SHAPES = [(3, 2), (5,)]


def test_quartiles() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_gradients_change_places_and_are_new_objects_over_the_same_storage() -> None:
    gradients = Gradients.make(SHAPES, 0)
    steps = [list(islice(gradients.next(), 2)) for _ in range(3)]
    addresses = [[[g.data_ptr() for g in grads] for grads in step] for step in steps]
    assert addresses[0] == addresses[1][::-1] == addresses[2]
    assert addresses[0][0] != addresses[0][1]
    assert steps[0][0][0] is not steps[2][0][0]


def test_many_passes_share_a_few_sets_and_every_step_starts_with_another() -> None:
    gradients = Gradients.make(SHAPES, 0, 3, torch.bfloat16)
    addresses = [grads[0].data_ptr() for grads in gradients.sets]
    assert len(set(addresses)) == 3 and gradients.sets[0][0].dtype == torch.bfloat16
    first, second = (list(islice(gradients.next(), 7)) for _ in range(2))
    assert [addresses.index(grads[0].data_ptr()) for grads in first] == [1, 2, 0, 1, 2, 0, 1]
    assert [addresses.index(grads[0].data_ptr()) for grads in second] == [2, 0, 1, 2, 0, 1, 2]
    assert first[0][0] is not first[3][0]


class FakeGuard:
    """Discards the rounds whose number is in `noisy`."""

    noisy: set[int]
    round = 0

    def __enter__(self) -> "FakeGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        type(self).round += 1

    @property
    def keep(self) -> bool:
        return self.round not in self.noisy


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    def install(noisy: set[int]) -> None:
        monkeypatch.setattr(measure, "NoiseGuard", type("Guard", (FakeGuard,), {"noisy": noisy}))

    return install


def runs(calls: list[str]) -> tuple[Callable[[], float], Callable[[], float]]:
    def run(name: str, seconds: float) -> Callable[[], float]:
        def call() -> float:
            if not calls or calls[-1] != name:
                calls.append(name)
            time.sleep(0.0005)
            return seconds

        return call

    return run("variant", 0.006), run("ours", 0.002)


def test_rounds_alternate_and_noisy_ones_are_replaced(guard: Callable[[set[int]], None]) -> None:
    guard({1, 3})
    calls: list[str] = []
    result = alternate(*runs(calls), rounds=3, deadline=time.perf_counter() + 60, block_seconds=0.002)
    assert (len(result.kept), len(result.discarded), result.noisy) == (3, 2, False)
    # One pair to calibrate, then five rounds, in every second of which ours goes first (and follows itself).
    assert calls == ["variant", "ours"] * 4
    assert result.ratios == pytest.approx([3.0, 3.0, 3.0])


def test_a_machine_that_is_never_quiet_gives_marked_figures(guard: Callable[[set[int]], None]) -> None:
    guard(set(range(100)))
    result = alternate(*runs([]), rounds=2, deadline=time.perf_counter() + 60, block_seconds=0.002)
    assert (len(result.kept), len(result.discarded), result.noisy) == (0, 6, True)
    assert result.ratios == pytest.approx([3.0] * 6)


def test_rounds_of_several_take_turns_under_one_guard(guard: Callable[[set[int]], None]) -> None:
    guard({1})
    calls: list[str] = []
    first, second = runs(calls)
    pace = Pace(warm=0, least=1, trial=1)
    kept, discarded = rounds_of({"variant": first, "ours": second}, rounds=2, seconds=60, block_seconds=0.001, pace=pace)
    assert kept == [{"variant": 0.006, "ours": 0.002}] * 2 and len(discarded) == 1
    # One pair to calibrate, then three rounds, in the second of which ours goes first (and follows itself).
    assert calls == ["variant", "ours"] * 3


def test_a_slow_step_may_be_a_block_by_itself() -> None:
    calls: list[int] = []

    def slow() -> float:
        calls.append(1)
        time.sleep(0.01)
        return 0.01

    assert steps_per_block(slow, 0.005, least=1) == 1 and len(calls) == 2
    assert steps_per_block(slow, 0.005) == 3 and len(calls) == 5
    block(slow, 1, warm=1)
    assert len(calls) == 7


def test_the_deadline_leaves_one_round(guard: Callable[[set[int]], None]) -> None:
    guard(set())
    result = alternate(*runs([]), rounds=5, deadline=0.0, block_seconds=0.002)
    assert len(result.kept) == 1


def test_the_ratio_is_taken_round_by_round() -> None:
    # Both sides slow down together in round 2: medians alone would give 30 / 10.
    rounds = Rounds(kept=[(20.0, 10.0), (60.0, 30.0), (30.0, 10.0)])
    assert quartiles(rounds.ratios)[1] == 2.0


def test_assigning_gradients_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_assign(params: list[Tensor], grads: list[Tensor]) -> None:
        time.sleep(0.03)

    class Phases:
        def first_step(self) -> None:
            time.sleep(0.005)

        def second_step(self) -> None:
            time.sleep(0.005)

    class Closure:
        def step(self, closure: Callable[[], Tensor]) -> None:
            for _ in range(2):
                closure()
                time.sleep(0.005)

    monkeypatch.setattr(variants, "assign_gradients", slow_assign)
    for driver in (PhaseDriver([], Phases()), ClosureDriver([], Closure())):
        assert 0.01 <= driver.step(iter(([], []))) < 0.03


def test_the_fastest_form_is_kept() -> None:
    class Fixed:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def step(self, passes: Iterator[list[Tensor]]) -> float:
            return self.seconds

    forms = tuple(
        Form(name, lambda p, b, s=seconds: Fixed(s), 1) for name, seconds in (("slow", 0.3), ("fast", 0.1), ("mid", 0.2))
    )
    variant = Variant("fake", "fake", "first/second", forms)
    gradients = Gradients.make(SETS["smoke"].shapes(), 0)
    choice = best_form(variant, SETS["smoke"], "sgd", gradients, 0)
    assert choice.form.name == "fast"
    assert choice.trials == pytest.approx({"slow": 300.0, "fast": 100.0, "mid": 200.0})
    assert best_form(variant, SETS["smoke"], "sgd", gradients, 0, forms=1).form.name == "slow"


def test_yardsticks_are_positive_and_finite() -> None:
    found = yardstick(4096, 1, 0.002)
    assert 0 < found.copy_gb_per_s < 1e5 and 0 < found.add_gb_per_s < 1e5


def test_budget_is_shared_among_what_is_left() -> None:
    budget = Budget(10.0, 4)
    assert budget.share() == 2.5
    budget.charge(1.0)
    assert budget.share() == 3.0
    budget.charge(50.0)
    assert budget.share() == 0.0


def test_high_water_mark_orders_events_by_time() -> None:
    assert high_water_mark([(3, 50), (1, 100), (2, -100), (4, 30), (5, -80)]) == 100
    assert high_water_mark([]) == 0


def test_peak_bytes_sees_temporaries_and_what_is_kept() -> None:
    def run() -> Tensor:
        kept = torch.ones(1000)
        temporary = torch.ones(500)
        del temporary
        return kept

    assert peak_bytes(run) == 4 * 1500
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(
    ("name", "form", "copies"),
    [
        ("foreach_inplace", 0, 1.0),
        ("foreach_swap", 0, 1.0),
        ("foreach_swap", 1, 1.0),
        ("foreach_swap", 2, 1.0),
        ("pytorch_optimizer_foreach", 0, 2.0),
    ],
)
def test_extra_bytes_are_the_copies_that_a_form_makes(name: str, form: int, copies: float) -> None:
    variant = by_name([name])[0]
    if variant.why_not() is not None:
        pytest.skip(str(variant.why_not()))
    parameter_set = SETS["smoke"]
    gradients = Gradients.make(parameter_set.shapes(), 0)
    found = extra_bytes(variant.forms[form], parameter_set, "sgd", gradients, 0)
    # Scalars, one norm per tensor among them, are on top.
    assert copies * 4 * parameter_set.parameters <= found < copies * 4 * parameter_set.parameters + 4096


def test_naive_needs_its_clones_and_two_temporaries_of_the_largest_tensors() -> None:
    shapes = SETS["smoke"].shapes()
    gradients = Gradients.make(shapes, 0)
    found = extra_bytes(BASELINES[0].forms[0], SETS["smoke"], "sgd", gradients, 0)
    clones = 4 * SETS["smoke"].parameters
    assert clones + 2 * 4 * 65 * 65 <= found <= clones + 3 * 4 * 65 * 65 + 4096
    # And the probe leaves nothing behind that would make a second one differ.
    assert extra_bytes(BASELINES[0].forms[0], SETS["smoke"], "sgd", gradients, 0) == found


def test_naive_driver_trains(one_thread: None) -> None:
    params = list(make_parameters(SHAPES, 0))
    before = [p.detach().clone() for p in params]
    passes = iter((make_gradients(SHAPES, 1), make_gradients(SHAPES, 2)))
    seconds = PhaseDriver(params, NaiveSAM(params, "sgd")).step(passes)
    assert seconds > 0
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def row(variant: str, ratio: float | None, base: str = "sgd") -> Row:
    return Row("tiny", base, variant, variant, "f", "first/second", "torch", 1, 1, 2, ratio_to_ours=ratio)


def test_a_ratio_that_falls_short_is_reported() -> None:
    judged = targets([row("naive", 7.99), row("torch_compile", 5.0), row("foreach_swap", None), row("naive", 99.0, "adamw")])
    verdicts = {target.variant: (target.verdict, target.reached) for target in judged}
    assert verdicts == {
        "naive": ("short", 7.99),
        "pytorch_optimizer_foreach": ("not measured", None),
        "foreach_inplace": ("not measured", None),
        "foreach_swap": ("not measured", None),
        "torch_compile": ("PASS", 5.0),
    }
    assert {target.micro_batches for target in judged} == {1}
    assert judge("tiny", "x", 1.0, 2.0, noisy=True).verdict == "too noisy"
    assert judge("tiny", "x", 1.0, 0.999) == Target("tiny", "x", 1.0, 0.999, "short")
