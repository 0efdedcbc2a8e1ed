"""Training loops as people write them: closures, loss scalers, switches, losses, buffers, gradients."""

import gc
import re
import weakref

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

import sam_fused
from sam_fused import SAM
from sam_fused.optim.state import State
from tests.devices import default
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    assert_same_state,
    backups_of,
    backward_of,
    parameter,
    snapshot,
    snapshot_state,
    take_step,
)

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def make(params, base, backend, **options):
    base_class, base_options = base
    return SAM(params, base_class, backend=backend, **{"rho": 0.2, **base_options, **options})


# ---- no silent SGD ---------------------------------------------------------------------------------------------------


def test_step_without_a_perturbation_is_refused(backend, base):
    case = Regression()
    optimizer = make(case.params, base, backend)
    for _ in range(2):  # also after a step that was perturbed
        case.evaluate()
        before, state = snapshot(case.params), snapshot_state(optimizer)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        assert_one_sentence(raised.value, "closure", "perturbed()", "first_step()", "enabled")
        assert_same_bits(case.params, before)
        assert_same_state(snapshot_state(optimizer), state)
        optimizer.zero_grad()
        optimizer.step(case.evaluate)
        optimizer.zero_grad()


def test_step_without_a_perturbation_is_taken_where_every_rate_is_zero(backend, base):
    a, b = parameter([1.0, 2.0]), parameter([3.0])
    optimizer = make([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.0}], base, backend)
    before = snapshot([a, b])
    for param in (a, b):
        param.grad = torch.ones_like(param)
    assert optimizer.step() is None
    assert_same_bits([a, b], before)
    assert optimizer.state[a] and optimizer.state[b]
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="nothing was perturbed"):
        optimizer.step()


@pytest.mark.parametrize("switch", ["attribute", "closure"])
def test_switched_off_is_the_base_optimizer_bit_for_bit(backend, base, switch):
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    base_class, options = base
    optimizer = make(ours.params, base, backend)
    # The base optimizer as this backend runs it; that it agrees with torch's is tested with rho = 0.
    reference = SAM(plain.params, base_class, rho=0.0, backend=backend, **options)
    optimizer.enabled = False
    assert optimizer.enabled is False
    for _ in range(10):
        ours.calls = 0
        optimizer.zero_grad()
        if switch == "closure":
            optimizer.step(ours.evaluate)
        else:
            ours.evaluate()
            assert optimizer.step() is None
        assert ours.calls == 1
        reference.step(plain.evaluate)
    assert_same_bits(ours.params, plain.params)
    assert optimizer.buffer_bytes == 0


@pytest.mark.parametrize("base_class", [SGD, RMSprop], ids=lambda c: c.__name__)
@pytest.mark.parametrize("how", ["class", "instance"])
def test_switched_off_is_torch_bit_for_bit(backend, form, base_class, how):
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    if how == "class":
        optimizer = SAM(ours.params, base_class, lr=0.01, weight_decay=0.1, backend=backend)
    else:
        optimizer = SAM(base_class(ours.params, lr=0.01, weight_decay=0.1), backend=backend)
    reference = base_class(plain.params, lr=0.01, weight_decay=0.1)
    optimizer.enabled = False
    for _ in range(10):
        take_step(optimizer, form, ours.evaluate)
        reference.zero_grad()
        plain.evaluate()
        reference.step()
    if backend == "reference" and base_class is SGD:
        torch.testing.assert_close(ours.params, plain.params, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(ours.params, plain.params)


def test_switching_on_and_off_between_steps(backend, form):
    ours, plain = Regression(), Regression()
    optimizer = make(ours.params, BASES["SGD"], backend)
    reference = make(plain.params, BASES["SGD"], backend)
    for number in range(8):
        optimizer.enabled = number % 3 != 0
        reference.param_groups[0]["rho"] = 0.2 if number % 3 else 0.0
        take_step(optimizer, form, ours.evaluate)
        take_step(reference, form, plain.evaluate)
        assert_same_bits(ours.params, plain.params)


def test_switching_off_while_perturbed_still_restores(backend, base):
    ours, plain = Regression(), Regression()
    optimizer, reference = make(ours.params, base, backend), make(plain.params, base, backend)
    reference.step(plain.evaluate)
    ours.evaluate()
    optimizer.first_step(zero_grad=True)
    optimizer.enabled = False
    ours.evaluate()
    optimizer.second_step()
    assert_same_bits(ours.params, plain.params)


# ---- closures --------------------------------------------------------------------------------------------------------


def test_the_closure_is_called_twice_and_the_clean_loss_returned(backend, base):
    w = parameter([3.0, 4.0])
    optimizer = make([w], base, backend, rho=0.5)
    weights, had_gradients = [], []

    def closure():
        weights.append(w.tolist())
        had_gradients.append(w.grad is not None)
        loss = 0.5 * (w**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert weights == [[3.0, 4.0], pytest.approx([3.3, 4.4], abs=1e-11)]
    assert had_gradients == [False, False]
    assert loss.item() == pytest.approx(12.5) and loss.requires_grad
    optimizer.step(closure)
    assert len(weights) == 4 and had_gradients == [False] * 4


def test_losses_are_the_clean_and_the_perturbed_one_detached(backend):
    w = parameter([3.0, 4.0])
    optimizer = make([w], BASES["SGD"], backend, rho=0.5)
    assert optimizer.losses == (None, None) and optimizer.losses.rise is None
    optimizer.step(backward_of(lambda: 0.5 * (w**2).sum()))
    losses = optimizer.losses
    assert isinstance(losses, sam_fused.Losses)
    assert losses.clean.item() == pytest.approx(12.5) and losses.perturbed.item() == pytest.approx(0.5 * 5.5**2)
    assert losses.rise.item() == pytest.approx(0.5 * (5.5**2 - 25))
    for value in (losses.clean, losses.perturbed, losses.rise):
        assert isinstance(value, torch.Tensor) and not value.requires_grad and value.grad_fn is None


def test_losses_keep_no_graph_alive(fast_backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], fast_backend)
    kept = []

    def closure():
        activation = case.model(case.x)
        kept.append(weakref.ref(activation))
        loss = (activation**2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert [ref() for ref in kept] == [None, None]


def test_losses_are_those_of_the_last_step_with_a_closure(backend):
    """A step that has no perturbed loss must not show that of an earlier one."""
    w = parameter([3.0, 4.0])
    optimizer = make([w], BASES["SGD"], backend)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    optimizer.step(evaluate)
    stale = optimizer.losses.perturbed
    optimizer.enabled = False
    clean = optimizer.step(evaluate)
    assert stale is not None and optimizer.losses.perturbed is None and optimizer.losses.rise is None
    assert torch.equal(optimizer.losses.clean, clean) and not optimizer.losses.clean.requires_grad


@pytest.mark.parametrize("value", [None, 1.5, "tensor without gradient"], ids=str)
def test_closures_that_return_other_things(backend, value):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    result = torch.tensor(2.0) if isinstance(value, str) else value

    def closure():
        case.evaluate()
        return result

    assert optimizer.step(closure) is result


def test_closures_work_under_no_grad(backend, form):
    ours, plain = Regression(), Regression()
    optimizer, reference = make(ours.params, BASES["SGD"], backend), make(plain.params, BASES["SGD"], backend)
    take_step(reference, form, plain.evaluate)
    if form == "closure":
        with torch.no_grad():
            optimizer.step(ours.evaluate)
    else:
        with torch.no_grad():
            with torch.enable_grad():
                ours.evaluate()
            if form == "perturbed":
                with optimizer.perturbed(), torch.enable_grad():
                    ours.evaluate()
                optimizer.step()
            else:
                optimizer.first_step(zero_grad=True)
                with torch.enable_grad():
                    ours.evaluate()
                optimizer.second_step()
    assert_same_bits(ours.params, plain.params)


def test_grad_mode_is_as_it_was(backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            optimizer.step(case.evaluate)
            assert torch.is_grad_enabled() is mode
    with optimizer.perturbed():
        assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in case.params)


def test_inference_tensors_are_not_made(backend):
    """Weights that were stepped can still be trained by anything else."""
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    optimizer.step(case.evaluate)
    assert not any(p.is_inference() for p in case.params)
    case.loss().backward()


REMEDIES = ("zero_grad()", "first_pass_done=True", "perturbed()")


def test_fresh_gradients_at_step_are_refused_with_the_remedies(backend, base):
    case = Regression()
    optimizer = make(case.params, base, backend)
    case.evaluate()
    for number in range(2):
        before = snapshot([*case.params, *(p.grad for p in case.params)])
        state, calls = snapshot_state(optimizer), case.calls
        with pytest.raises(RuntimeError) as raised:
            optimizer.step(case.evaluate)
        assert_one_sentence(raised.value, *REMEDIES)
        assert case.calls == calls
        assert_same_bits([*case.params, *(p.grad for p in case.params)], before)
        assert_same_state(snapshot_state(optimizer), state)
        if number == 0:
            optimizer.zero_grad()
            optimizer.step(case.evaluate)
            # One fresh gradient among those that the step left is enough.
            case.params[2].grad = torch.ones_like(case.params[2])


def test_gradients_that_the_last_step_left_are_no_reason_to_refuse(backend, base, form):
    case = Regression()
    optimizer = make(case.params, base, backend)
    take_step(optimizer, form, case.evaluate)
    assert all(p.grad is not None for p in case.params)
    optimizer.step(case.evaluate)
    case.params[0].grad = None  # nor is one that has gone
    optimizer.step(case.evaluate)


def test_gradients_set_to_zero_are_no_reason_to_refuse(backend):
    """``zero_grad(set_to_none=False)`` writes into the gradients that the step left. They are known by identity for that."""
    case, plain = Regression(), Regression()
    optimizer, reference = make(case.params, BASES["SGD"], backend), make(plain.params, BASES["SGD"], backend)
    for _ in range(2):
        optimizer.step(case.evaluate)
        optimizer.zero_grad(set_to_none=False)
        reference.step(plain.evaluate)
    assert_same_bits(case.params, plain.params)


def test_first_pass_done_uses_the_gradients_that_are_there(backend, base):
    ours, plain = Regression(), Regression()
    optimizer, reference = make(ours.params, base, backend), make(plain.params, base, backend)
    for _ in range(3):
        clean = reference.step(plain.evaluate)
        optimizer.zero_grad()
        assert ours.evaluate().item() == clean.item()
        ours.calls = 0
        loss = optimizer.step(ours.evaluate, first_pass_done=True)
        assert ours.calls == 1
        assert loss.item() == reference.losses.perturbed.item()
        assert optimizer.losses.perturbed.item() == loss.item() and optimizer.losses.clean is None
    assert_same_bits(ours.params, plain.params)


def test_first_pass_done_uses_a_first_pass_over_several_chunks(backend):
    """One perturbation for a large batch that is accumulated."""
    case, whole = Regression(), Regression()
    optimizer, reference = make(case.params, BASES["SGD"], backend), make(whole.params, BASES["SGD"], backend)

    def chunks():
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            (torch.nn.functional.mse_loss(case.model(case.x[rows]), case.y[rows]) / 4).backward()

    for _ in range(3):
        optimizer.zero_grad()
        chunks()
        optimizer.step(chunks, first_pass_done=True)
        optimizer.zero_grad()
        chunks()
        with optimizer.perturbed():
            chunks()
        optimizer.step()
        for _ in range(2):
            reference.step(whole.evaluate)
    torch.testing.assert_close(case.params, whole.params, rtol=1e-11, atol=1e-12)


# ---- loss scalers ----------------------------------------------------------------------------------------------------


def scaler(scale=2.0**10):
    return torch.amp.GradScaler(default().type, init_scale=scale, growth_interval=1000)


def test_a_closure_through_the_scaler_is_refused(backend, base):
    case = Regression(torch.float32)
    optimizer = make(case.params, base, backend)
    amp = scaler()

    def closure():
        loss = case.loss()
        amp.scale(loss).backward()
        return loss

    closure()
    before, state = snapshot(case.params), snapshot_state(optimizer)
    with pytest.raises(RuntimeError) as raised:
        amp.step(optimizer, closure)
    assert re.search(r"closure", str(raised.value)) and "scaler.step(optimizer)" in str(raised.value)
    assert_one_sentence(raised.value, "perturbed()")
    assert_same_bits(case.params, before)
    assert_same_state(snapshot_state(optimizer), state)
    assert optimizer._control.state is State.CLEAN


def test_after_a_refused_closure_the_scale_is_not_remembered(backend):
    """A notebook goes on with the same optimizer: nothing of the refused call may scale its next step."""
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer, reference = make(ours.params, BASES["SGD"], backend), make(plain.params, BASES["SGD"], backend)
    amp = scaler()
    amp.scale(ours.loss()).backward()
    with pytest.raises(RuntimeError):
        amp.step(optimizer, ours.evaluate)
    optimizer.zero_grad()
    amp = scaler()
    for _ in range(2):
        scaled_step(optimizer, amp, "perturbed", ours)
        optimizer.step(ours.evaluate)
        for _ in range(2):
            reference.step(plain.evaluate)
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-5, atol=1e-6)


def scaled_step(optimizer, amp, how, case, spoil=None, unscale=False):
    """``spoil(number)`` may write into the gradients after backward pass ``number``."""

    def evaluate(number):
        amp.scale(case.loss()).backward()
        if spoil:
            spoil(number)

    optimizer.zero_grad()
    evaluate(1)
    if how == "perturbed":
        with optimizer.perturbed():
            evaluate(2)
    else:
        optimizer.first_step(zero_grad=True)
        evaluate(2)
    if unscale:
        amp.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(case.params, 1e6)
    amp.step(optimizer)
    amp.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by hand"])
@pytest.mark.parametrize("how", ["perturbed", "first_second"])
def test_a_scaler_changes_nothing_but_roundings(backend, base, how, unscale):
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer, reference = make(ours.params, base, backend), make(plain.params, base, backend)
    amp = scaler()
    for _ in range(5):
        scaled_step(optimizer, amp, how, ours, unscale=unscale)
        reference.step(plain.evaluate)
    # The scale is a power of two, so that nothing but perturb_eps and 1 / scale after it is rounded differently.
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-5, atol=2e-6)
    assert amp.get_scale() == 2.0**10
    assert "grad_scale" not in vars(optimizer) and "found_inf" not in vars(optimizer)


def test_a_scaled_step_through_second_step(backend, base):
    """``second_step`` goes through ``step``; the scaler's factor is not there then, so gradients are unscaled by hand."""
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer, reference = make(ours.params, base, backend), make(plain.params, base, backend)
    amp = scaler()
    amp.scale(ours.loss()).backward()
    optimizer.first_step(zero_grad=True)
    amp.scale(ours.loss()).backward()
    amp.unscale_(optimizer)
    optimizer.second_step(zero_grad=True)
    reference.step(plain.evaluate)
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-5, atol=2e-6)
    assert all(p.grad is None for p in ours.params)


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by hand"])
@pytest.mark.parametrize("how", ["perturbed", "first_second"])
@pytest.mark.parametrize("late", [False, True], ids=["first step", "later step"])
def test_an_overflow_in_the_second_pass_skips_the_step(backend, base, how, unscale, late):
    case = Regression(torch.float32)
    optimizer = make(case.params, base, backend)
    amp = scaler()
    if late:
        scaled_step(optimizer, amp, how, case)
    before = snapshot(case.params)
    state = {p: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in case.params}

    def spoil(number):
        if number == 2:
            case.params[1].grad[0] = float("inf")

    scaled_step(optimizer, amp, how, case, spoil=spoil, unscale=unscale)
    assert_same_bits(case.params, before)
    assert amp.get_scale() == 2.0**9  # as for any optimizer
    for param in case.params:
        for key, value in state[param].items():
            assert_same_bits([optimizer.state[param][key]], [value])
        if "step" in optimizer.state.get(param, {}):
            assert float(optimizer.state[param]["step"]) == late
    assert optimizer._control.state is State.CLEAN
    # And then on as the base optimizer would, at the halved scale.
    scaled_step(optimizer, amp, how, case, unscale=unscale)
    plain = Regression(torch.float32)
    reference = make(plain.params, base, backend)
    for _ in range(1 + late):
        reference.step(plain.evaluate)
    torch.testing.assert_close(case.params, plain.params, rtol=1e-5, atol=2e-6)


def test_a_skipped_first_step_creates_no_momentum(backend):
    """The buffer is created by the first step that is taken: torch ignores dampening in that one."""
    case, plain = Regression(torch.float32), Regression(torch.float32)
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    optimizer = SAM(case.params, SGD, rho=0.2, backend=backend, **options)
    reference = SAM(plain.params, SGD, rho=0.2, backend=backend, **options)
    amp = scaler()

    def spoil(number):
        if number == 2:
            case.params[1].grad[0] = float("inf")

    scaled_step(optimizer, amp, "perturbed", case, spoil=spoil)
    for _ in range(2):
        scaled_step(optimizer, amp, "perturbed", case)
        reference.step(plain.evaluate)
    torch.testing.assert_close(case.params, plain.params, rtol=1e-5, atol=2e-6)


def test_an_overflow_in_the_first_pass_alone_makes_a_plain_step(backend, base):
    case, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer, reference = make(case.params, base, backend), make(plain.params, base, backend, rho=0.0)
    amp = scaler()

    def spoil(number):
        if number == 1:
            case.params[1].grad[0] = float("inf")

    scaled_step(optimizer, amp, "perturbed", case, spoil=spoil)
    reference.step(plain.evaluate)
    torch.testing.assert_close(case.params, plain.params, rtol=1e-5, atol=2e-6)
    assert amp.get_scale() == 2.0**10


def test_a_scaled_step_does_not_write_into_the_gradients(backend, base):
    case = Regression(torch.float32)
    optimizer = make(case.params, base, backend)
    amp = scaler()
    optimizer.zero_grad()
    amp.scale(case.loss()).backward()
    with optimizer.perturbed():
        amp.scale(case.loss()).backward()
    before = snapshot(p.grad for p in case.params)
    amp.step(optimizer)
    assert_same_bits([p.grad for p in case.params], before)


def test_a_disabled_scaler_is_no_scaler(backend):
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer, reference = make(ours.params, BASES["SGD"], backend), make(plain.params, BASES["SGD"], backend)
    amp = torch.amp.GradScaler(default().type, enabled=False)
    amp.step(optimizer, ours.evaluate)
    reference.step(plain.evaluate)
    assert_same_bits(ours.params, plain.params)


# ---- wrappers --------------------------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_perturbed_as_a_function_unwraps(backend, depth):
    w = parameter([3.0, 4.0])
    wrapped = optimizer = make([w], BASES["SGD"], backend, rho=0.5)
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    evaluate()
    with sam_fused.perturbed(wrapped):
        assert w.grad is None and w.tolist() == pytest.approx([3.3, 4.4], abs=1e-11)
        evaluate()
    optimizer.step()
    assert w.tolist() == pytest.approx([3 - 0.05 * 3.3, 4 - 0.05 * 4.4], abs=1e-11)


@pytest.mark.parametrize("depth", [0, 2])
def test_micro_batch_as_a_function_unwraps(backend, depth):
    w = parameter([3.0, 4.0])
    wrapped = optimizer = sam_fused.MicroBatchSAM([w], SGD, num_micro_batches=2, lr=0.05, rho=0.5, backend=backend)
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    for weight in (None, 0.5):
        evaluate()
        with sam_fused.micro_batch(wrapped, weight):
            assert w.tolist() == pytest.approx([3.3, 4.4], abs=1e-11)
            evaluate()
    optimizer.step()
    assert w.tolist() == pytest.approx([3 - 0.05 * 3.3, 4 - 0.05 * 4.4], abs=1e-11)


@pytest.mark.parametrize("wrong", [SGD([parameter([1.0])], lr=0.1), Wrapper(None), object()], ids=["SGD", "empty", "object"])
@pytest.mark.parametrize("move", [sam_fused.perturbed, sam_fused.micro_batch])
def test_moves_as_functions_refuse_what_is_no_sam(wrong, move):
    with pytest.raises(TypeError) as raised:
        move(wrong)
    assert_one_sentence(raised.value, move.__name__, type(wrong).__name__)


def test_a_plain_sam_has_no_micro_batches():
    with pytest.raises(TypeError) as raised:
        sam_fused.micro_batch(Wrapper(make([parameter([1.0])], BASES["SGD"], None)))
    assert_one_sentence(raised.value, "MicroBatchSAM")


@pytest.mark.parametrize("base_class", [SGD, RMSprop], ids=lambda c: c.__name__)
def test_methods_that_run_with_a_copy_of_the_attributes(backend, form, base_class):
    """Lightning gives its wrapper the optimizer's attributes and a class of both: the state machine must be shared."""
    ours, plain = Regression(), Regression()
    optimizer = SAM(ours.params, base_class, lr=0.01, backend=backend)
    reference = SAM(plain.params, base_class, lr=0.01, backend=backend)

    class Light:
        pass

    twin = Light()
    twin.__class__ = type("LightningSAM", (Light, SAM), {})
    twin.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
    for number in range(4):
        if form == "first_second":
            one, two = (optimizer, twin) if number % 2 else (twin, optimizer)
            one.zero_grad()
            ours.evaluate()
            one.first_step(zero_grad=True)
            with pytest.raises(RuntimeError, match="perturbed"):
                two.first_step()
            ours.evaluate()
            two.second_step()
        else:
            take_step(twin if number % 2 else optimizer, form, ours.evaluate)
        take_step(reference, form, plain.evaluate)
    assert_same_bits(ours.params, plain.params)
    twin.enabled = False
    assert optimizer.enabled is False
    assert twin.param_groups is optimizer.param_groups and twin.state is optimizer.state


def test_two_optimizers_over_two_networks(backend):
    """Each perturbs its own weights only, one inside the other's block."""
    first, second = Regression(seed=1), Regression(seed=2)
    one, two = make(first.params, BASES["SGD"], backend), make(second.params, BASES["AdamW"], backend)
    before = snapshot(first.params), snapshot(second.params)
    first.evaluate()
    second.evaluate()
    with one.perturbed():
        assert_same_bits(second.params, before[1])
        with two.perturbed():
            second.evaluate()
        first.evaluate()
        assert_same_bits(second.params, before[1])
        two.step()
    assert_same_bits(first.params, before[0])
    one.step()
    for case, clean in zip((first, second), before, strict=True):
        assert not any(map(torch.equal, snapshot(case.params), clean))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_realised_perturbation_in_fp32(backend, form):
    case = Regression(torch.float32)
    optimizer = make(case.params, BASES["SGD"], backend, track_perturbation=True)
    assert optimizer.perturbation is None
    for _ in range(2):
        take_step(optimizer, form, case.evaluate)
        metrics = optimizer.perturbation
        assert metrics.norm.item() == pytest.approx(0.2, rel=1e-5)
        assert metrics.cosine.item() == pytest.approx(1.0, abs=1e-5)
        assert 0.9 < metrics.moved.item() <= 1.0


def test_realised_perturbation_of_asam_and_of_groups_left_out(backend):
    a, b, c = parameter([1.0, -2.0]), parameter([3.0, 4.0]), parameter([1.0] * 4)
    groups = [{"params": [a], "adaptive": True}, {"params": [b]}, {"params": [c], "perturb": False}]
    optimizer = make(groups, BASES["SGD"], backend, rho=0.5, track_perturbation=True)
    for param, grad in ((a, [3.0, 0.5]), (b, [1.0, 2.0]), (c, [9.0] * 4)):
        param.grad = torch.tensor(grad, dtype=torch.float64)
    with optimizer.perturbed():
        pass
    norm = (9 + 1 + 1 + 4) ** 0.5
    e = [0.5 * value / norm for value in (3.0, 4 * 0.5, 1.0, 2.0)]
    assert optimizer.perturbation.norm.item() == pytest.approx(sum(x * x for x in e) ** 0.5, abs=1e-10)
    assert optimizer.perturbation.cosine.item() == pytest.approx(1.0, abs=1e-10)
    assert optimizer.perturbation.moved.item() == 1.0


def test_realised_perturbation_in_bf16_is_not_the_one_asked_for(backend):
    """e is about rho / sqrt(n) per element, most of it below half a unit in the last place of a bf16 weight."""
    w = torch.nn.Parameter((torch.randn(200_000) * 0.02).bfloat16())
    optimizer = make([w], BASES["SGD"], backend, rho=0.005, track_perturbation=True)
    w.grad = torch.randn(200_000).bfloat16()
    with optimizer.perturbed():
        moved = (w.detach() != backups_of(optimizer)[0]).double().mean().item()
    metrics = optimizer.perturbation
    assert metrics.moved.item() == pytest.approx(moved, abs=1e-6) and moved < 0.7
    assert abs(metrics.norm.item() / 0.005 - 1) > 0.05
    assert 0.1 < metrics.cosine.item() < 0.95


def test_metrics_are_measured_only_when_asked_for(backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    optimizer.step(case.evaluate)
    assert optimizer.perturbation is None


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_metrics_of_a_perturbation_that_was_none(backend, bad):
    w = parameter([3.0, 4.0])
    optimizer = make([w], BASES["SGD"], backend, track_perturbation=True)
    w.grad = torch.full_like(w, bad)
    with optimizer.perturbed():
        pass
    assert optimizer.perturbation.norm.item() == 0 and optimizer.perturbation.moved.item() == 0


# ---- buffers and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_backup_is_once_the_parameters_and_stays_where_it_is(backend, form, dtype):
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (40_000, 1, 333)]
    optimizer = make(params, BASES["SGD"], backend)
    assert optimizer.buffer_bytes == 0  # allocated at first use
    size = sum(p.numel() * p.element_size() for p in params)
    seen = set()
    for _ in range(4):
        take_step(optimizer, form, backward_of(lambda: sum((p.float() ** 2).sum() for p in params)))
        seen.add((optimizer.buffer_bytes, *(b.data_ptr() for b in backups_of(optimizer))))
    assert len(seen) == 1
    assert size <= optimizer.buffer_bytes <= size + 64 * (len(params) + 1)
    addresses = next(iter(seen))[1:]
    assert len(addresses) == 3 and all(address % 64 == 0 for address in addresses)


def test_release_buffers_frees_and_the_next_step_works(backend, base, form):
    ours, plain = Regression(), Regression()
    optimizer, reference = make(ours.params, base, backend), make(plain.params, base, backend)
    for _ in range(3):
        take_step(optimizer, form, ours.evaluate)
        take_step(reference, form, plain.evaluate)
        held = [weakref.ref(backup) for backup in backups_of(optimizer)]
        assert held and optimizer.buffer_bytes > 0
        optimizer.release_buffers()
        assert optimizer.buffer_bytes == 0 and [ref() for ref in held] == [None] * len(held)
    assert_same_bits(ours.params, plain.params)


def test_groups_left_out_are_not_backed_up(backend, form):
    small, large = parameter(torch.ones(16)), parameter(torch.ones(100_000))
    optimizer = make([{"params": [small]}, {"params": [large], "perturb": False}], BASES["SGD"], backend)
    seen = []

    def evaluate():
        seen.append(snapshot([large])[0])
        loss = (small**2).sum() + (large**2).sum()
        loss.backward()
        return loss

    take_step(optimizer, form, evaluate)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(snapshot([large])[0], seen[0])
    assert optimizer.buffer_bytes <= 16 * 8 + 128


def test_frozen_parameters_are_not_backed_up(backend):
    small, frozen = parameter(torch.ones(16)), parameter(torch.ones(100_000)).requires_grad_(False)
    optimizer = make([small, frozen], BASES["SGD"], backend)
    optimizer.step(backward_of(lambda: (small**2).sum()))
    assert optimizer.buffer_bytes <= 16 * 8 + 128


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_written_into(backend, base, form, maximize):
    case = Regression()
    optimizer = make(case.params, base, backend, adaptive=True, maximize=maximize, weight_decay=0.1)
    grads = []

    def evaluate():
        loss = case.evaluate()
        grads.extend((p.grad, p.grad._version, snapshot([p.grad])[0]) for p in case.params)
        return loss

    for _ in range(2):
        take_step(optimizer, form, evaluate)
        for grad, version, values in grads:
            assert grad._version == version and torch.equal(snapshot([grad])[0], values)
    assert len(grads) == 4 * len(case.params)


def test_gradients_of_the_second_pass_are_left_on_the_parameters(backend, form):
    w = parameter([3.0, 4.0])
    optimizer = make([w], BASES["SGD"], backend, rho=0.5)
    take_step(optimizer, form, backward_of(lambda: 0.5 * (w**2).sum()))
    assert w.grad.tolist() == pytest.approx([3.3, 4.4], abs=1e-11)


def test_no_gradient_is_kept_alive(backend, base, form):
    case = Regression()
    optimizer = make(case.params, base, backend)
    first, second = [], []

    def evaluate():
        loss = case.evaluate()
        (second if first else first).extend(weakref.ref(p.grad) for p in case.params)
        return loss

    for _ in range(2):
        first.clear()
        second.clear()
        take_step(optimizer, form, evaluate)
        assert not any(ref() is not None for ref in first)  # those of the first pass are gone already
        optimizer.zero_grad()
        assert not any(ref() is not None for ref in second)


def test_first_gradients_are_gone_while_the_second_are_computed(backend, form):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    first, alive = [], []

    def evaluate():
        alive.append(sum(ref() is not None for ref in first))
        loss = case.evaluate()
        first.extend(weakref.ref(p.grad) for p in case.params)
        return loss

    take_step(optimizer, form, evaluate)
    assert alive == [0, 0]


def test_the_optimizer_dies_with_its_last_reference(fast_backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], fast_backend)
    optimizer.step(case.evaluate)
    backup = weakref.ref(backups_of(optimizer)[0])
    del optimizer
    gc.collect()
    assert backup() is None


def test_zero_grad_keeps_its_arguments(fast_backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], fast_backend)
    case.evaluate()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in case.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in case.params)


@pytest.mark.parametrize("move", ["first_step", "second_step"])
def test_zero_grad_of_the_two_steps(backend, move):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    case.evaluate()
    optimizer.first_step(zero_grad=move == "first_step")
    assert all((p.grad is None) == (move == "first_step") for p in case.params)
    optimizer.zero_grad()
    case.evaluate()
    optimizer.second_step(zero_grad=move == "second_step")
    assert all((p.grad is None) == (move == "second_step") for p in case.params)


def test_batch_norm_and_dropout_nets_train(backend, form):
    """Modules with buffers, which SAM leaves alone: the forward passes alone change them."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    optimizer = make(model.parameters(), BASES["SGD"], backend, rho=0.05)
    losses = [take_step(optimizer, form, backward_of(lambda: ((model(x) - y) ** 2).mean())).item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert model[1].num_batches_tracked.item() == 60


def test_adam_takes_a_generator_of_named_parameters(backend):
    """``named_parameters()`` is what newer torch takes; groups then hold names, which checkpoints keep."""
    case = Regression()
    optimizer = SAM(case.model.named_parameters(), Adam, lr=0.01, backend=backend)
    optimizer.step(case.evaluate)
    names = [name for name, _ in case.model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(case.evaluate)


@pytest.mark.parametrize("wrong", ["closure", torch.ones(()), 3])
def test_what_is_no_closure_is_refused_before_anything(wrong):
    """A loss in the place of the function that computes it is the likely slip."""
    case = Regression()
    case.evaluate()
    held, before = [param.grad for param in case.params], snapshot(case.params)
    one = sam_fused.SAM(case.params, torch.optim.SGD, lr=0.1)
    several = sam_fused.MicroBatchSAM(case.params, torch.optim.SGD, num_micro_batches=2, lr=0.1)
    attempts = (
        lambda: one.step(wrong),
        lambda: one.step(case.evaluate, ascent_closure=wrong),
        lambda: several.step(wrong, case.x),
        lambda: several.step(case.evaluate, case.x, ascent_closure=wrong),
    )
    for attempt in attempts:
        with pytest.raises(TypeError) as error:
            attempt()
        assert_one_sentence(error.value, "expected a function", type(wrong).__name__)
    assert all(param.grad is grad for param, grad in zip(case.params, held, strict=True))
    assert_same_bits(snapshot(case.params), before)


@pytest.mark.parametrize("form", ["perturbed", "first_second"])
def test_a_second_pass_without_backward_is_said_once(backend, form):
    """It would train nothing, in every step, and silently."""
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    before = snapshot(case.params)
    with pytest.warns(UserWarning, match="from the second pass") as caught:
        for _ in range(2):
            optimizer.zero_grad()
            case.evaluate()
            if form == "perturbed":
                with optimizer.perturbed():
                    case.loss()
                optimizer.step()
            else:
                optimizer.first_step(zero_grad=True)
                case.loss()
                optimizer.second_step()
    assert len(caught) == 1
    assert_same_bits(snapshot(case.params), before)
