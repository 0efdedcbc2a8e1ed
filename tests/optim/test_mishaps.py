"""What users do to an optimizer's parameters, groups, gradients and state behind its back, and interrupts at bad moments."""

import gc
import itertools
import warnings

import pytest
import torch

from sam_fused import SAM
from sam_fused.ops import prepared
from sam_fused.ops.prepared import TensorSet
from sam_fused.optim.ascent import Part
from sam_fused.optim.state import State
from tests.devices import default
from tests.optim.helpers import assert_one_sentence, assert_same_bits, backward_of, parameter, snapshot


def quadratic(*params):
    return backward_of(lambda: sum((p.double() ** 2).sum() for p in params))


def state_of(optimizer):
    return optimizer._control.state


# ---- parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["parameter", "momentum"])
def test_cutting_a_tensor_off_at_its_own_address(backend, what):
    """Structured pruning: the address stays and the size shrinks. Nothing beyond the new end may be read or written."""
    w = torch.nn.Parameter(torch.ones(1000))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    closure = quadratic(w)
    for _ in range(2):
        optimizer.step(closure)
    if what == "parameter":
        whole = w.data
        w.data = whole[:4]
    else:
        whole = optimizer.state[w]["momentum_buffer"]
        optimizer.state[w]["momentum_buffer"] = whole.clone()
        optimizer.state[w]["momentum_buffer"].data = whole[:4]
    rest = whole[4:].clone()
    optimizer.zero_grad()
    with pytest.raises(Exception):  # noqa: B017  torch or we: the momentum has another shape than the parameter
        optimizer.step(closure)
    assert_same_bits([whole[4:]], [rest])


def test_a_transposed_momentum_is_not_applied_to_the_wrong_elements(fast_backend):
    start = torch.arange(4.0).reshape(2, 2)
    results = []
    for transposed in (False, True):
        w = torch.nn.Parameter(start.clone())
        optimizer = SAM([w], torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9, backend=fast_backend)
        closure = quadratic(w)
        optimizer.step(closure)
        optimizer.step(closure)
        if transposed:
            optimizer.state[w]["momentum_buffer"].t_()
            expected = results[0].clone()
        optimizer.step(closure)
        results.append(w.detach().clone())
    assert not torch.equal(results[0], results[1]) and torch.equal(results[0].diagonal(), results[1].diagonal())
    assert expected is not None


def test_two_parameters_over_the_same_memory_are_refused(backend):
    memory = torch.ones(6)
    a, b = torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])
    optimizer = SAM([a, b], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend)
    with pytest.raises(ValueError) as raised:
        optimizer.step(quadratic(a, b))
    assert_one_sentence(raised.value, "memory")
    assert bool((memory == 1).all()) and state_of(optimizer) is State.CLEAN
    # Beside each other in one buffer is fine.
    a, b = torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[3:])
    SAM([a, b], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend).step(quadratic(a, b))
    assert bool((memory == 1).all())


def test_a_parameter_twice_in_a_group_is_refused():
    w = parameter([1.0])
    with pytest.raises(ValueError) as raised, pytest.warns(UserWarning):
        SAM([w, w], torch.optim.SGD, lr=0.1)
    assert_one_sentence(raised.value, "once")


def test_a_refused_group_is_not_added(fast_backend):
    w, v = parameter([1.0]), parameter([2.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=fast_backend)
    for wrong in ([torch.nn.Parameter(torch.ones(1).expand(3))], [v, v]):
        with pytest.raises(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.add_param_group({"params": wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.step(quadratic(w))


def test_an_expanded_parameter_is_refused():
    with pytest.raises(ValueError) as raised:
        SAM([torch.nn.Parameter(torch.ones(1).expand(3))], torch.optim.SGD, lr=0.1)
    assert_one_sentence(raised.value, "expanded")


def test_a_groups_list_edited_while_perturbed(backend):
    """Backups belong to parameters, not to places in a list."""
    a, b, new = parameter([3.0]), parameter([4.0]), parameter([7.0])
    optimizer = SAM([{"params": [a]}, {"params": [b]}], torch.optim.SGD, rho=5.0, lr=0.0, backend=backend)
    quadratic(a, b)()
    optimizer.first_step(zero_grad=True)
    optimizer.param_groups[0]["params"].append(new)
    quadratic(a, b, new)()
    optimizer.second_step()
    assert [p.item() for p in (a, b, new)] == [3.0, 4.0, 7.0]


def test_many_sets_of_gradients_and_skipped_batches(backend):
    """More different sets than are remembered: a set made where a forgotten one was must not pass for it."""
    params = [parameter([float(i + 1)]) for i in range(6)]
    optimizer = SAM(params, torch.optim.SGD, rho=1.0, lr=0.0, backend=backend)
    before = snapshot(params)
    full = quadratic(*params)
    for mask in list(itertools.product([0, 1], repeat=6))[1:26]:
        optimizer.zero_grad()
        full()
        optimizer.first_step(zero_grad=True)
        full()
        optimizer.second_step(zero_grad=True)
        quadratic(*(p for p, wanted in zip(params, mask, strict=True) if wanted))()
        with pytest.raises(KeyError), optimizer.perturbed():
            raise KeyError
        gc.collect()
        assert_same_bits(params, before)


def test_parts_are_told_apart_though_their_addresses_return():
    """Descent knows an ascent's parts again by these numbers; a part made where a forgotten one was has other backups."""
    numbers = []
    for _ in range(50):
        numbers.append(Part(TensorSet([torch.ones(1)], [torch.ones(1)], backend="foreach"), [0], 1).serial)
    assert len(set(numbers)) == 50


def test_backups_of_replaced_parameters_are_given_back(backend):
    w = torch.nn.Parameter(torch.ones(1000))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    optimizer.step(quadratic(w))
    held = optimizer.buffer_bytes
    for _ in range(3):
        w = torch.nn.Parameter(torch.ones(1000))
        optimizer.param_groups[0]["params"][0] = w
        optimizer.zero_grad()
        optimizer.step(quadratic(w))
    assert optimizer.buffer_bytes == held


def test_a_dtype_changed_while_perturbed_does_not_lock_the_optimizer(backend):
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend)

    def closure():
        if state_of(optimizer) is State.INSIDE:
            w.data = w.data.half()
            raise KeyError("the user's own")
        return quadratic(w)()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert w.dtype == torch.half and w.tolist() == [1.0, 2.0] and state_of(optimizer) is State.CLEAN
    w.data = w.data.float()
    optimizer.zero_grad()
    optimizer.step(quadratic(w))
    assert w.tolist() == [1.0, 2.0]


# ---- closures and gradients ------------------------------------------------------------------------------------------------


def test_a_closure_that_perturbs_by_itself_is_refused(backend):
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=1.0, lr=0.0, backend=backend)

    def closure():
        loss = quadratic(w)()
        optimizer.first_step()
        return loss

    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    assert_one_sentence(raised.value, "step(closure)")
    assert w.item() == 1.0 and state_of(optimizer) is State.CLEAN


@pytest.mark.parametrize("failing_call", [1, 2])
def test_the_step_after_a_closure_that_failed(backend, failing_call):
    """A skipped batch (out of memory, say) leaves half a pass's gradients. They are the failed step's, and nobody's loss."""
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    calls = []

    def closure():
        calls.append(1)
        loss = quadratic(w)()
        if len(calls) == failing_call:
            raise MemoryError
        return loss

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert w.item() == 1.0 and w.grad is not None
    optimizer.step(quadratic(w))
    assert w.item() == pytest.approx(1 - 0.1 * 2 * 1.5)


def test_accumulating_onto_the_last_steps_gradient_is_noticed(backend):
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    closure = quadratic(w)
    optimizer.step(closure)
    (w * 100).sum().backward()  # adds into the same tensor
    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    assert_one_sentence(raised.value, "fresh")
    for clear in (lambda: optimizer.zero_grad(set_to_none=False), optimizer.zero_grad, lambda: None):
        clear()
        optimizer.step(closure)


@pytest.mark.parametrize("form", ["closure", "perturbed", "first_second"])
def test_a_forgotten_backward_is_said_once(fast_backend, form):
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=fast_backend)

    def step():
        if form == "closure":
            optimizer.step(lambda: (w**2).sum())
        elif form == "perturbed":
            with optimizer.perturbed():
                pass
            optimizer.step()
        else:
            optimizer.first_step()
            optimizer.second_step()

    with pytest.warns(UserWarning, match="backward"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert w.item() == 1.0


def test_losses_of_closures_that_return_something_else():
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)

    def closure():
        loss = (w**2).sum()
        loss.backward()
        return loss, {"w": loss * 2}

    optimizer.step(closure)
    clean, named = optimizer.losses.clean
    assert not clean.requires_grad and not named["w"].requires_grad
    with pytest.raises(TypeError, match="returns the loss"):
        _ = optimizer.losses.rise
    optimizer.zero_grad()
    quadratic(w)()
    optimizer.step(quadratic(w), first_pass_done=True)
    assert optimizer.losses.clean is None and optimizer.losses.rise is None


def test_hyper_parameters_changed_later_are_checked(backend):
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    for wrong in (float("nan"), -1.0, "0.1"):
        optimizer.param_groups[0]["rho"] = wrong
        optimizer.zero_grad()
        with pytest.raises(ValueError) as raised:
            optimizer.step(quadratic(w))
        assert_one_sentence(raised.value, "rho of parameter group 0")
        assert w.item() == 1.0
    optimizer.param_groups[0]["rho"] = torch.tensor(0.5)
    optimizer.zero_grad()
    optimizer.step(quadratic(w))
    assert w.item() == pytest.approx(0.7)


# ---- the constructor ---------------------------------------------------------------------------------------------------------


def test_rho_and_adaptive_by_position_as_in_the_popular_class():
    optimizer = SAM([parameter([1.0])], torch.optim.SGD, 0.3, True, lr=0.1)
    assert optimizer.param_groups[0]["rho"] == 0.3 and optimizer.param_groups[0]["adaptive"] is True


class Forwarding(torch.optim.Adadelta):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


class Hiding(torch.optim.Adadelta):
    def __init__(self, params):
        super().__init__(params, rho=0.8)


@pytest.mark.parametrize("base_class", [Forwarding, Hiding])
def test_keywords_that_a_constructor_does_not_name(base_class):
    """Adadelta's rho is a decay rate, however its constructor is spelt."""
    with pytest.raises(TypeError) as raised:
        SAM([parameter([1.0])], base_class, rho=0.1)
    assert_one_sentence(raised.value, "sam_rho")
    optimizer = SAM([parameter([1.0])], base_class)
    group = optimizer.param_groups[0]
    assert group["sam_rho"] == 0.05 and group["rho"] in (0.8, 0.9)


def test_an_unknown_backend_is_refused_at_once():
    with pytest.raises(ValueError, match="cuda"):
        SAM([parameter([1.0])], torch.optim.SGD, lr=0.1, backend="cuda")


def test_a_missing_base():
    with pytest.raises(TypeError, match="got nothing"):
        SAM([parameter([1.0])])


# ---- loss scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True], ids=["perturbed", "first_second"])
@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_unscaling_before_the_second_pass_is_refused(backend, base_class, by_hand):
    """Its gradients would be applied 1024 times too large."""
    w, clean = torch.nn.Parameter(torch.tensor([1.0])), 1.0
    optimizer = SAM([w], base_class, rho=0.1, lr=0.001, backend=backend)
    for early in (True, False, True):  # the second time there is a finished step behind it
        scaler = torch.amp.GradScaler(default().type, init_scale=1024.0)
        optimizer.zero_grad()
        scaler.scale((w**2).sum()).backward()
        if early:
            scaler.unscale_(optimizer)
        if by_hand:
            optimizer.first_step()
            optimizer.zero_grad()
            scaler.scale((w**2).sum()).backward()
        else:
            with optimizer.perturbed():
                scaler.scale((w**2).sum()).backward()
        if not early:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert 0.9 < w.item() < 1.0
            clean = w.item()
            continue
        state = state_of(optimizer)
        with pytest.raises(RuntimeError) as raised:
            scaler.step(optimizer)
        assert_one_sentence(raised.value, "unscale_")
        assert state_of(optimizer) is state  # refused: nothing was given up
        optimizer.restore()
        assert w.item() == clean


# ---- interrupts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["second_step", "ready", "plain"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_an_interrupt_right_after_the_last_pass_does_not_repeat_it(fast_backend, monkeypatch, form, base):
    """The weights have been stepped: a second try must not step them again, and the new state is there."""
    w = parameter([1.0])
    options = {"momentum": 0.9} if base == "SGD" else {}
    optimizer = SAM([w], getattr(torch.optim, base), rho=0.1, lr=0.1, backend=fast_backend, **options)
    quadratic(w)()
    if form == "second_step":
        optimizer.first_step(zero_grad=True)
    elif form == "ready":
        with optimizer.perturbed():
            pass
    else:
        optimizer.enabled = False
    quadratic(w)()
    name = "restore_sgd_" if base == "SGD" else "restore_adamw_"
    from sam_fused.optim import bases

    family = bases._SGD if base == "SGD" else bases._ADAM
    original = getattr(prepared.TensorSet, name)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    object.__setattr__(family, "run", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        object.__setattr__(family, "run", original)
    stepped = w.item()
    assert stepped < 1.0 and state_of(optimizer) is State.CLEAN
    key = "momentum_buffer" if base == "SGD" else "exp_avg"
    assert float(optimizer.state[w][key].abs().sum()) > 0
    if form != "plain":
        with pytest.raises(RuntimeError):
            optimizer.second_step()
    assert w.item() == stepped


def test_an_interrupt_right_before_the_last_pass_leaves_no_trace(fast_backend, monkeypatch):
    w = parameter([1.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=fast_backend)
    quadratic(w)()
    optimizer.first_step(zero_grad=True)
    quadratic(w)()
    from sam_fused.optim import bases

    original = bases._SGD.run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    object.__setattr__(bases._SGD, "run", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.second_step()
    finally:
        object.__setattr__(bases._SGD, "run", original)
    assert w not in optimizer.state and state_of(optimizer) is State.PERTURBED
    optimizer.second_step()
    assert w.item() == pytest.approx(1 - 0.1 * 2 * 1.1) and float(optimizer.state[w]["momentum_buffer"]) == pytest.approx(2.2)


def test_tensors_that_are_spread_over_processes_are_refused(tmp_path):
    """The norm of what one process holds is not the norm."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spread = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(TypeError) as raised:
            SAM([spread], torch.optim.SGD, lr=0.1)
    finally:
        distributed.destroy_process_group()
    assert_one_sentence(raised.value, "DTensor", "parameter 0")
