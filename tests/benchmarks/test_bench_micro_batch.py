"""Every form of micro-batch SAM that is measured computes it: the weights of a naive loop in fp64, at the accesses stated."""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import micro_batch_variants
from benchmarks.baselines import BASES, PERTURB_EPS, RHO, make_base
from benchmarks.cases import make_gradients, make_parameters
from benchmarks.micro_batch_baselines import ForeachInPlaceMicroBatchSAM, NaiveMicroBatchSAM, SwapMicroBatchSAM
from benchmarks.micro_batch_variants import (
    ByHandDriver,
    ClosureDriver,
    PhasesDriver,
    all_variants,
    baselines,
    by_name,
    headline,
    ours,
    pace,
)
from benchmarks.variants import FUSED_BASE, Form, Variant
from sam_fused.ops.schema import OPS
from tests.benchmarks.accesses import AccessCounter

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(17, 5), (33,), (4, 3, 3, 3)]
STEPS = 3
OURS = [ours(backend, form, 1).name for backend in ("native", "foreach") for form in ("closure", "micro_batch")]


def chosen(variant: str, form: str, micro_batches: int) -> tuple[Variant, Form]:
    named = {v.name: v for v in baselines(micro_batches)}
    named |= {v.name: v for v in (ours(name.split("_")[1], name.split("_", 2)[2], micro_batches) for name in OURS)}
    return named[variant], next(f for f in named[variant].forms if f.name == form)


def every_form(variants: list[Variant]) -> list[Any]:
    return [pytest.param(v.name, f.name, id=f"{v.name}-{f.name}".replace(" ", "_")) for v in variants for f in v.forms]


BASELINES = every_form(baselines(1))
EVERYTHING = [*BASELINES, *(pytest.param(name, name.split("_", 2)[2], id=name) for name in OURS)]


def gradient_at(weights: Tensor, noise: Tensor) -> Tensor:
    """Of the weights of the moment, so that the ascent is seen; another element's, since AdamW is blind to its own scale."""
    return 4.0 * weights.flip(0) + noise


def noises(step: int, micro_batches: int) -> list[list[Tensor]]:
    return [make_gradients(SHAPES, 1000 * step + number) for number in range(2 * micro_batches)]


def naive_fp64(base: str, weights: list[float]) -> list[Tensor]:
    """The formula, literally: sum_k weight_k grad(w + rho g_k / (|g_k| + eps)), then torch's base step."""
    params = [torch.nn.Parameter(p.detach().double()) for p in make_parameters(SHAPES, 0)]
    optimizer = make_base(list(params), base)
    for step in range(STEPS):
        passes = iter(noises(step, len(weights)))
        sums = [torch.zeros_like(p.data) for p in params]
        for weight in weights:
            grads = [gradient_at(p.data, noise) for p, noise in zip(params, next(passes), strict=True)]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            moved = [p.data + RHO / (norm + PERTURB_EPS) * g for p, g in zip(params, grads, strict=True)]
            for total, w, noise in zip(sums, moved, next(passes), strict=True):
                total += weight * gradient_at(w, noise)
        for p, total in zip(params, sums, strict=True):
            p.grad = total
        optimizer.step()
    return [p.detach() for p in params]


def assign_at_the_moment(params: list[Tensor], noise: list[Tensor]) -> None:
    for p, shift in zip(params, noise, strict=True):
        p.grad = gradient_at(p.detach(), shift)


def by_driver(form: Form, base: str, micro_batches: int) -> list[Tensor]:
    params = list(make_parameters(SHAPES, 0))
    driver = form.build(list(params), base)
    for step in range(STEPS):
        passes = iter(noises(step, micro_batches))
        driver.step(passes)
        assert next(passes, None) is None, "2K passes, no more and no fewer"
    return [p.detach() for p in params]


def assert_same(reached: list[Tensor], wanted: list[Tensor]) -> None:
    for here, there in zip(reached, wanted, strict=True):
        torch.testing.assert_close(here.double(), there, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("variant", "form"), EVERYTHING)
def test_same_weights_as_a_naive_loop_in_fp64(
    variant: str, form: str, micro_batches: int, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, way = chosen(variant, form, micro_batches)
    if found.why_not() is not None:
        pytest.skip(str(found.why_not()))
    monkeypatch.setattr(micro_batch_variants, "assign_gradients", assign_at_the_moment)
    assert_same(by_driver(way, base, micro_batches), naive_fp64(base, [1 / micro_batches] * micro_batches))


def test_the_tolerance_tells_the_perturbations_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten last micro-batch, the sum instead of the mean, and no perturbation are all far beyond it."""
    found = naive_fp64("sgd", [1 / 3] * 3)
    other = [naive_fp64("sgd", [1 / 3, 1 / 3, 1e-12]), naive_fp64("sgd", [1.0] * 3)]
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "RHO", 0.0)
        other.append(naive_fp64("sgd", [1 / 3] * 3))
    for wrong in other:
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(found, wrong, strict=True))


@pytest.mark.parametrize(
    "build",
    [
        lambda p: NaiveMicroBatchSAM(p, "sgd", kept=False),
        lambda p: NaiveMicroBatchSAM(p, "sgd", kept=True),
        *(lambda p, sums=sums: ForeachInPlaceMicroBatchSAM(p, "sgd", sums) for sums in ("fresh", "kept", "loop")),
        *(lambda p, copy=copy: SwapMicroBatchSAM(p, "sgd", copy) for copy in ("fresh", "kept", "loop")),
    ],
)
def test_baselines_weigh_micro_batches_of_any_size_and_clear_what_autograd_would_add_to(
    build: Callable[[list[Tensor]], Any],
) -> None:
    params: list[Tensor] = list(make_parameters(SHAPES, 0))
    optimizer = build(params)
    weights = [0.5, 0.3, 0.2]
    for step in range(STEPS):
        passes = iter(noises(step, len(weights)))
        for weight in weights:
            clean = [p.detach().clone() for p in params]
            assign_at_the_moment(params, next(passes))
            optimizer.perturb()
            assert all(p.grad is None for p in params)
            assert not any(torch.equal(p, w) for p, w in zip(params, clean, strict=True))
            assign_at_the_moment(params, next(passes))
            optimizer.accumulate(weight)
            assert all(p.grad is None for p in params)
            assert all(torch.equal(p, w) for p, w in zip(params, clean, strict=True))
        optimizer.step()
        assert all(p.grad is None for p in params)
    assert_same([p.detach() for p in params], naive_fp64("sgd", weights))


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize(("variant", "form"), BASELINES)
def test_documented_accesses_are_those_of_the_operators(variant: str, form: str, micro_batches: int) -> None:
    _, way = chosen(variant, form, micro_batches)
    shapes = [(1000,), (1500,), (2000,)]
    driver = way.build(list(make_parameters(shapes, 0)), "sgd")
    sets = [make_gradients(shapes, seed) for seed in range(2 * micro_batches)]
    for _ in range(2):
        driver.step(iter(sets))
    with AccessCounter() as counter:
        driver.step(iter(sets))
    assert way.accesses is not None
    assert counter.elements / 4500 == way.accesses + way.base_accesses["sgd"]


@pytest.mark.parametrize("count", [1, 4, 32])
def test_accesses_of_ours_are_the_op_layers(count: int) -> None:
    cost = {name: sum(op.accesses) for name, op in OPS.items()}
    # Every perturbation but the first finds its backup; the first sum is written and not read.
    ascents = count * (cost["grad_norm"] + cost["perturb_"]) - (count - 1)
    by_hand = ascents + count * cost["restore_accumulate_"] - 1 + cost["restore_sgd_"]
    # The base step reads the sums of the micro-batches before the last, where there are any.
    by_closure = ascents + cost["restore_sgd_"] + ((count - 1) * cost["restore_accumulate_"] - 1 + 1 if count > 1 else 0)
    stated = {form: ours("native", form, count).forms[0] for form in ("closure", "micro_batch")}
    assert stated["closure"].accesses == by_closure - FUSED_BASE["sgd"]
    assert stated["micro_batch"].accesses == by_hand - FUSED_BASE["sgd"]


# ---- drivers and plans -----------------------------------------------------------------------------------------------


class Slow:
    """Each call takes 2 ms and moves nothing; the closure form and the block form are there too."""

    num_micro_batches = 3

    def perturb(self) -> None:
        sleep()

    def accumulate(self, weight: float) -> None:
        assert weight == 1 / 3
        sleep()

    def zero_grad(self) -> None:
        pass

    def micro_batch(self, weight: float) -> Any:
        outer = self

        class Block:
            def __enter__(self) -> None:
                outer.perturb()

            def __exit__(self, *exception: object) -> None:
                outer.accumulate(weight)

        return Block()

    def step(self, closure: Callable[[Tensor], Tensor] | None = None, batch: Tensor | None = None) -> None:
        if closure is None or batch is None:
            sleep()
            return
        for sample in batch.chunk(self.num_micro_batches):
            for phase in (self.perturb, lambda: self.accumulate(1 / 3)):
                closure(sample)
                phase()
        sleep()


def sleep() -> None:
    time.sleep(0.002)


@pytest.mark.parametrize("driver", [PhasesDriver, ClosureDriver, ByHandDriver])
def test_a_step_is_charged_for_the_optimizer_and_not_for_gradients(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assigned = []

    def slow_assign(params: list[Tensor], grads: list[Tensor]) -> None:
        assigned.append(grads)
        time.sleep(0.03)

    def slow_gradients() -> Iterator[list[Tensor]]:
        for _ in range(6):
            time.sleep(0.03)
            yield []

    monkeypatch.setattr(micro_batch_variants, "assign_gradients", slow_assign)
    seconds = driver([], Slow(), 3).step(slow_gradients())
    assert len(assigned) == 6
    # 7 calls of 2 ms; with the 6 assignments or the 6 lists of gradients it would be 180 ms more.
    assert 0.014 <= seconds < 0.15


@pytest.mark.parametrize("form", ["closure", "micro_batch"])
def test_a_driver_takes_another_number_of_micro_batches(form: str) -> None:
    driver: Any = ours("foreach", form, 2).forms[0].build(list(make_parameters(SHAPES, 0)), "sgd")
    for count in (2, 5, 1):
        driver.micro_batches = count
        passes = chain.from_iterable([noises(0, count), noises(1, 1)])
        driver.step(passes)
        assert len(list(passes)) == 2


def test_variants_of_a_count() -> None:
    names = [variant.name for variant in all_variants(4)]
    assert names[:3] == ["naive", "foreach_inplace", "foreach_swap"] and headline(4).name not in names
    assert [variant.name for variant in by_name(["foreach_swap", "naive"], 4)] == ["naive", "foreach_swap"]
    assert [(pace(count).least, pace(count).trial) for count in (1, 2, 4, 32)] == [(3, 5), (2, 3), (1, 2), (1, 1)]
