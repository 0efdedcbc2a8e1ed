"""torch.amp.GradScaler around steps by hand: the same step as without, overflows in either pass, and what is refused.

The scale is a power of two and ``perturb_eps`` is 0, so that the scale is exact in every product and every comparison is of
bits, in all dtypes that have fp32's range. Nothing private of the scaler is looked at.
"""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, RMSprop

from sam_fused import SAM, MicroBatchSAM
from tests.devices import default
from tests.optim.helpers import assert_one_sentence, assert_same_bits, parameter, snapshot
from tests.optim.runs import BY_HAND, SIZES, Run, assert_same_runs

SCALE = 2.0**10

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "RMSprop": (RMSprop, {"lr": 0.01}),  # runs its own step
}

# The micro-batch that overflows: the first writes the accumulators, the others add to them. A whole batch has number 0.
OVERFLOWING = [(form, number) for form in BY_HAND for number in (range(len(SIZES)) if form == "micro_batch" else (0,))]


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


@pytest.fixture(params=BY_HAND)
def by_hand(request):
    return request.param


def make(form, base, backend, **options):
    return Run(form, base, backend, **{"scale": SCALE, "perturb_eps": 0.0, **options})


def left_by_the_scaler(optimizer):
    return {"grad_scale", "found_inf"} & vars(optimizer).keys()


def unscale_and_clip(limit):
    def between(run):
        if run.amp is not None:
            run.amp.unscale_(run.optimizer)
        clip_grad_norm_(run.params, limit)

    return between


# ---- without an overflow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_power_of_two_changes_no_bit(backend, base, by_hand, dtype):
    scaled, plain = make(by_hand, base, backend, dtype=dtype), make(by_hand, base, backend, dtype=dtype, scale=None)
    for _ in range(5):
        scaled.step()
        plain.step()
        assert_same_runs(scaled, plain)
    assert scaled.amp.get_scale() == SCALE and not left_by_the_scaler(scaled.optimizer)
    assert int(scaled.optimizer.ascent_overflows) == 0


def test_any_other_scale_changes_roundings_only(backend, base, by_hand):
    """1 / 1000 is not an fp32 number: it, and each product with it, is off by half a unit, 6e-8, and five steps add up."""
    scaled, plain = (Run(by_hand, base, backend, scale=scale) for scale in (1000.0, None))
    for _ in range(5):
        scaled.step()
        plain.step()
    torch.testing.assert_close(scaled.params, plain.params, rtol=1e-5, atol=1e-6)


def test_unscaling_by_hand_changes_no_bit(backend, base, by_hand):
    scaled, plain = make(by_hand, base, backend), make(by_hand, base, backend, scale=None)
    for _ in range(3):
        scaled.step(between=lambda run: run.amp.unscale_(run.optimizer))
        plain.step()
    assert_same_runs(scaled, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unscaling_by_hand_and_stepping_without_the_scaler(backend, base, by_hand, dtype):
    """The scaler leaves no trace in version counters; the gradients are unscaled all the same."""
    scaled, plain = make(by_hand, base, backend, dtype=dtype), make(by_hand, base, backend, dtype=dtype, scale=None)
    scaled.passes()
    scaled.amp.unscale_(scaled.optimizer)
    scaled.optimizer.step()
    plain.step()
    if dtype == torch.bfloat16 and by_hand == "micro_batch":
        # Either the sums, or what they are rounded to in `.grad`, 2^-9 of them: not a thousand times as much.
        torch.testing.assert_close(scaled.params, plain.params, rtol=2**-7, atol=2**-7)
    else:
        assert_same_runs(scaled, plain)


def test_unscaling_and_clipping_is_clipping(backend, base, by_hand):
    scaled, plain = make(by_hand, base, backend), make(by_hand, base, backend, scale=None)
    for _ in range(3):
        for run in (scaled, plain):
            run.step(between=unscale_and_clip(0.3))
    assert_same_runs(scaled, plain)


def test_unscaling_and_clipping_is_the_base_optimizers(backend, base):
    """With rho = 0 the second gradient is the base optimizer's own."""
    base_class, options = base
    ours, plain = make("perturbed", base, backend, rho=0.0), make("perturbed", base, backend)
    reference = base_class(plain.params, **options)
    for _ in range(3):
        ours.step(between=unscale_and_clip(0.3))
        reference.zero_grad()
        plain.backward(plain.case.x, plain.case.y)
        plain.amp.unscale_(reference)
        clip_grad_norm_(plain.params, 0.3)
        plain.amp.step(reference)
        plain.amp.update()
    # What torch's own Adam and ours differ by: see tests/optim/test_closed_forms.py.
    torch.testing.assert_close(ours.params, plain.params, rtol=0, atol=1e-5)
    assert ours.amp.state_dict() == plain.amp.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_max_grad_norm_is_unscaling_and_clipping(backend, base, by_hand, dtype):
    """Not the scaled gradient's norm, and not the scaled gradient's clipping. fp32: the factor's roundings, 1e-7 a step."""
    clipped = make(by_hand, base, backend, dtype=dtype, max_grad_norm=0.3)
    by_torch = make(by_hand, base, backend, dtype=dtype)
    norms = []

    def clip_by_torch(run):
        run.amp.unscale_(run.optimizer)
        norms.append(clip_grad_norm_(run.params, 0.3))

    for _ in range(3):
        clipped.step()
        by_torch.step(between=clip_by_torch)
        assert float(norms[-1]) > 0.3
        torch.testing.assert_close(clipped.optimizer.grad_norm, norms[-1], rtol=1e-6, atol=0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(clipped.params, by_torch.params, rtol=tolerance, atol=tolerance)


def test_the_step_writes_into_no_gradient(backend, base, by_hand):
    """Nor into the sums of micro-batches, which are the gradients that one sees."""
    run = make(by_hand, base, backend)
    run.step()
    run.passes()
    grads, before = run.gradients(), snapshot(run.gradients())
    run.finish()
    assert all(now is then for now, then in zip(run.gradients(), grads, strict=True))
    assert_same_bits(run.gradients(), before)


# ---- overflows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "number"), OVERFLOWING)
def test_an_overflow_in_a_first_pass_makes_a_plain_gradient(backend, base, form, number):
    """Of that micro-batch alone, at the clean weights; what the others perturb is their own."""
    run, plain = make(form, base, backend), make(form, base, backend)
    for _ in range(2):
        run.step()
        plain.step()

    def no_radius(piece):
        plain.optimizer.param_groups[0]["rho"] = 0.0 if piece == number else 0.2

    run.step(overflowing=[(number, 1)])
    plain.passes(before_piece=no_radius)
    plain.finish()
    no_radius(None)
    assert_same_runs(run, plain)
    assert int(run.optimizer.ascent_overflows) == 1 and int(plain.optimizer.ascent_overflows) == 0
    assert run.amp.get_scale() == SCALE  # the scaler has seen the second gradients only
    run.step()
    plain.step()
    assert_same_runs(run, plain)
    assert int(run.optimizer.ascent_overflows) == 1


def test_an_overflow_in_the_first_pass_is_the_base_optimizers_step(backend, base):
    run, plain = make("perturbed", base, backend), make("closure", base, backend, scale=None)
    run.step()
    plain.step()
    run.step(overflowing=[(0, 1)])
    plain.optimizer.enabled = False
    plain.step()
    assert_same_runs(run, plain)


def test_every_first_pass_that_overflows_is_counted(backend, by_hand):
    run = make(by_hand, BASES["SGD"], backend)
    numbers = range(len(SIZES)) if by_hand == "micro_batch" else (0,)
    for count in (1, 2):
        run.step(overflowing=[(number, 1) for number in numbers])
        assert int(run.optimizer.ascent_overflows) == count * len(numbers)
    overflows = run.optimizer.ascent_overflows
    assert overflows.dtype == torch.int64 and overflows.dim() == 0 and overflows.device == run.params[0].device


class Subclass(torch.nn.Parameter):
    """Served by a backend of its own: there are two norms to put together."""


def test_an_overflow_in_one_of_several_parts_is_one():
    a, b = parameter([3.0], torch.float32), Subclass(torch.tensor([4.0]))
    optimizer = SAM([a, b], SGD, rho=1.0, lr=0.0)
    for count, (first, second) in enumerate([(1.0, float("inf")), (float("nan"), 1.0), (float("inf"), float("inf"))], start=1):
        a.grad, b.grad = torch.tensor([first]), torch.tensor([second])
        with optimizer.perturbed():
            assert (a.item(), b.item()) == (3.0, 4.0)
        assert int(optimizer.ascent_overflows) == count
        a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        optimizer.step()
    with optimizer.perturbed():
        assert (a.item(), b.item()) == pytest.approx((3.6, 4.8))
    assert int(optimizer.ascent_overflows) == 3


@pytest.mark.parametrize(
    ("steps_before", "passes"), [(0, (2,)), (2, (2,)), (2, (1, 2))], ids=["first step", "later step", "later step, both passes"]
)
@pytest.mark.parametrize(("form", "number"), OVERFLOWING)
def test_an_overflow_in_a_second_pass_skips_the_step(backend, base, form, number, steps_before, passes):
    run, plain = make(form, base, backend), make(form, base, backend)
    for _ in range(steps_before):
        run.step()
        plain.step()
    before = run.state()
    run.step(overflowing=[(number, which) for which in passes])
    assert_same_runs(run, before)  # clean weights; momentum, moments and step counts as they were
    if default().type == "cpu":  # elsewhere the host does not look whether the step was taken
        assert bool(run.optimizer.state) == bool(steps_before)
    assert run.amp.get_scale() == SCALE / 2
    assert int(run.optimizer.ascent_overflows) == int(1 in passes)
    assert not left_by_the_scaler(run.optimizer)
    for _ in range(2):  # as if nothing had been
        run.step()
        plain.step()
    assert_same_runs(run, plain)


@pytest.mark.parametrize("max_grad_norm", [0.3, None])
def test_an_overflow_is_skipped_whoever_unscales(fast_backend, base, by_hand, max_grad_norm):
    run = make(by_hand, base, fast_backend, max_grad_norm=max_grad_norm)
    run.step()
    before = run.state()
    run.step(overflowing=[(0, 2)], between=lambda r: r.amp.unscale_(r.optimizer))
    run.step(overflowing=[(0, 2)], between=unscale_and_clip(1.0))
    run.step(overflowing=[(0, 2)])
    assert_same_runs(run, before)
    assert run.amp.get_scale() == SCALE / 8


def test_the_scale_moves_as_around_the_base_optimizer(fast_backend, base, by_hand):
    """It halves where a second pass overflows, grows after so many that did not, and knows nothing of first passes."""
    base_class, options = base
    run, plain = (make(form, base, fast_backend, growth_interval=2) for form in (by_hand, "perturbed"))
    reference = base_class(plain.params, **options)
    for overflowing in ([], [1], [], [2], [], [1, 2], [2], [1], [], []):
        run.step(overflowing=[(0, which) for which in overflowing])
        reference.zero_grad()
        plain.backward(plain.case.x, plain.case.y, float("inf") if 2 in overflowing else 1.0)
        plain.amp.step(reference)
        plain.amp.update()
        assert run.amp.state_dict() == plain.amp.state_dict()
    assert int(run.optimizer.ascent_overflows) == 3


def test_a_skipped_first_step_is_still_the_first(backend, by_hand):
    """torch ignores dampening in the step that creates the momentum: the first that is taken, whichever that was."""
    base = (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5})
    run, plain = make(by_hand, base, backend), make(by_hand, base, backend)
    run.step(overflowing=[(0, 2)])
    for _ in range(2):
        run.step()
        plain.step()
    assert_same_runs(run, plain)


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_refused_and_mended(run, plain, before, refused):
    """Nothing was written and nothing of the scaler stays; given up, the run goes on as if nothing had been."""
    assert_one_sentence(refused.value, "unscale", "scaler.step(optimizer)")
    assert not left_by_the_scaler(run.optimizer)
    run.optimizer.restore()
    assert_same_runs(run, before)
    run.amp = make(run.form, BASES["SGD"], "reference").amp
    for _ in range(2):
        run.step()
        plain.step()
    assert_same_runs(run, plain)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_unscaling_before_the_ascent_is_refused(backend, base, by_hand, steps_before):
    """The second gradients would be applied with their scale on, a thousand times too large."""
    run, plain = make(by_hand, base, backend), make(by_hand, base, backend)
    for _ in range(steps_before):
        run.step()
        plain.step()
    before = run.state()
    optimizer, case = run.optimizer, run.case
    optimizer.zero_grad()
    run.backward(case.x, case.y)
    run.amp.unscale_(optimizer)
    if by_hand == "first_second":
        optimizer.first_step(zero_grad=True)
        run.backward(case.x, case.y)
    else:
        with optimizer.micro_batch(weight=1.0) if by_hand == "micro_batch" else optimizer.perturbed():
            run.backward(case.x, case.y)
    with pytest.raises(RuntimeError) as refused:
        run.amp.step(optimizer)
    assert_refused_and_mended(run, plain, before, refused)


@pytest.mark.parametrize("unscaled", ["nothing", "the first pass's gradients"])
def test_unscaling_between_first_step_and_the_second_backward_is_refused(fast_backend, base, unscaled):
    """What it unscaled, if anything, is not what the step is taken with."""
    run, plain = make("first_second", base, fast_backend), make("first_second", base, fast_backend)
    before = run.state()
    optimizer, case = run.optimizer, run.case
    run.backward(case.x, case.y)
    with pytest.raises(RuntimeError) as refused:
        optimizer.first_step(zero_grad=unscaled == "nothing")
        run.amp.unscale_(optimizer)
        optimizer.zero_grad()
        run.backward(case.x, case.y)
        run.amp.step(optimizer)
    assert_refused_and_mended(run, plain, before, refused)


@pytest.mark.parametrize("how", ["perturbed", "micro_batch"])
def test_unscaling_at_the_beginning_of_a_block_is_refused(fast_backend, base, how):
    """The block begins without gradients: there is nothing to unscale."""
    run, plain = make(how, base, fast_backend), make(how, base, fast_backend)
    before = run.state()
    optimizer, case = run.optimizer, run.case
    run.backward(case.x, case.y)
    with pytest.raises(RuntimeError) as refused:
        with optimizer.micro_batch(weight=1.0) if how == "micro_batch" else optimizer.perturbed():
            run.amp.unscale_(optimizer)
            run.backward(case.x, case.y)
        run.amp.step(optimizer)
    assert_refused_and_mended(run, plain, before, refused)


def test_unscaling_at_the_end_of_the_block_is_as_good_as_after_it(backend, base):
    run, plain = make("perturbed", base, backend), make("perturbed", base, backend)
    for _ in range(2):
        run.optimizer.zero_grad()
        run.backward(run.case.x, run.case.y)
        with run.optimizer.perturbed():
            run.backward(run.case.x, run.case.y)
            run.amp.unscale_(run.optimizer)
        run.finish()
        plain.step()
    assert_same_runs(run, plain)


# Where unscale_ is called, of two micro-batches: after a first or second backward, or after a block.
EARLY = [(0, "first"), (0, "second"), (0, "after"), (1, "first"), (1, "second")]


@pytest.mark.parametrize(("when", "where"), EARLY, ids=lambda value: str(value))
def test_unscaling_before_all_micro_batches_are_there_is_refused(fast_backend, base, when, where):
    """Then the sum holds scaled gradients beside unscaled ones. In the last block too: of the sum it sees only its own."""
    run, plain = make("micro_batch", base, fast_backend), make("micro_batch", base, fast_backend)
    before = run.state()
    optimizer, case = run.optimizer, run.case

    def maybe_unscale(*place):
        if place == (when, where):
            run.amp.unscale_(optimizer)

    with pytest.raises(RuntimeError) as refused:
        for number in range(2):
            optimizer.zero_grad()
            run.backward(case.x[:8], case.y[:8])
            maybe_unscale(number, "first")
            with optimizer.micro_batch(weight=0.5):
                run.backward(case.x[:8], case.y[:8])
                maybe_unscale(number, "second")
            maybe_unscale(number, "after")
        run.amp.step(optimizer)
    assert_refused_and_mended(run, plain, before, refused)


@pytest.mark.parametrize("optimizer_class", [SAM, MicroBatchSAM])
def test_a_closure_through_the_scaler_is_refused(backend, base, optimizer_class):
    form = "micro_batch" if optimizer_class is MicroBatchSAM else "perturbed"
    run, plain = make(form, base, backend), make(form, base, backend)
    assert type(run.optimizer) is optimizer_class
    case, called = run.case, []

    def closure(*batch):
        called.append(batch)
        return run.backward(*(batch or (case.x, case.y)))

    before = run.state()
    for fresh in (True, False):  # with gradients for the scaler to look at, and with the step before it taken
        amp = make(form, base, backend).amp
        amp.scale(run.case.loss()).backward()
        with pytest.raises(RuntimeError) as refused:
            amp.step(run.optimizer, closure, *((case.x, case.y) if form == "micro_batch" else ()))
        assert_one_sentence(refused.value, "closure", "scaler.step(optimizer)")
        assert not called and not left_by_the_scaler(run.optimizer)
        run.optimizer.zero_grad()
        if fresh:
            assert_same_runs(run, before)
            assert not run.optimizer.state
        for _ in range(2):
            run.step()
            plain.step()
        assert_same_runs(run, plain)


def test_the_refusal_of_a_closure_says_how_micro_batches_are_scaled(fast_backend):
    """``perturbed()`` is refused where there are several micro-batches: it cannot be the remedy there."""
    run = make("micro_batch", BASES["SGD"], fast_backend)
    run.backward(run.case.x, run.case.y)
    with pytest.raises(RuntimeError) as refused:
        run.amp.step(run.optimizer, run.backward, run.case.x, run.case.y)
    assert_one_sentence(refused.value, "micro_batch(")


def test_a_step_without_a_perturbation_through_the_scaler_is_refused(backend, base, by_hand):
    run = make(by_hand, base, backend)
    before = run.state()
    run.backward(run.case.x, run.case.y)
    with pytest.raises(RuntimeError) as refused:
        run.amp.step(run.optimizer)
    assert_one_sentence(refused.value, "nothing was perturbed")
    assert_same_runs(run, before)
    assert not left_by_the_scaler(run.optimizer)


def test_switched_off_a_scaled_step_is_the_base_optimizers(backend, base):
    """And an overflow is skipped there as well."""
    off, on = make("closure", base, backend), make("perturbed", base, backend, rho=0.0, scale=None)
    off.optimizer.enabled = False
    for overflows in (False, True, False):
        off.optimizer.zero_grad()
        off.backward(off.case.x, off.case.y, float("inf") if overflows else 1.0)
        off.amp.step(off.optimizer)
        off.amp.update()
        if not overflows:
            on.step()
        assert_same_bits(off.params, on.params)
    assert int(off.optimizer.ascent_overflows) == 0


def test_half_weights_are_left_to_the_scaler_to_refuse():
    """torch unscales fp32 master weights' gradients; fp16 gradients it refuses, whoever holds them."""
    w = parameter([1.0, 2.0], torch.float16)
    optimizer = SAM([w], SGD, lr=0.1)
    amp = torch.amp.GradScaler(default().type, init_scale=4.0)
    amp.scale((w.float() ** 2).sum()).backward()
    with optimizer.perturbed():
        amp.scale((w.float() ** 2).sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        amp.unscale_(optimizer)
    optimizer.step()
