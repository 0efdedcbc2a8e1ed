"""The clean weights come back bit for bit: whatever is thrown, whichever gradients are missing, zero or not finite."""

import copy

import pytest
import torch

from sam_fused import SAM
from sam_fused.optim.state import State
from tests.optim.helpers import (
    DTYPES,
    Regression,
    assert_same_bits,
    assert_same_state,
    backward_of,
    parameter,
    snapshot,
    snapshot_state,
    take_step,
)
from tests.optim.interrupts import interrupted_everywhere

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1}),  # no fused form: restored, then its own step
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def make(params, base, backend, **options):
    base_class, base_options = base
    return SAM(params, base_class, rho=0.5, backend=backend, **base_options, **options)


def awkward(dtype):
    """Values whose sum with e and difference from it again would not be themselves: tiny, huge, signed zeros, subnormal."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.tiny, -info.tiny, info.smallest_normal / 2, info.max / 4, info.eps, 1 / 3, 100.1]
    tensors = [torch.tensor(values, dtype=torch.float64), torch.tensor([0.1]), torch.randn(67)]
    return [torch.nn.Parameter(t.to(dtype)) for t in tensors]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbed_restores_every_bit(backend, dtype, adaptive):
    params = awkward(dtype)
    optimizer = make(params, BASES["SGD"], backend, adaptive=adaptive)
    before = snapshot(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        with optimizer.perturbed():
            assert any(not torch.equal(a, b) for a, b in zip(snapshot(params), before, strict=True))
        assert_same_bits(params, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_without_second_gradients_is_a_bitwise_restore(backend, base, form, dtype):
    """The last pass has nothing to do but to restore; nothing else may happen."""
    params = awkward(dtype)
    optimizer = make(params, base, backend)
    before, passes = snapshot(params), []

    def evaluate():
        passes.append(len(passes))
        if len(passes) % 2:
            for param in params:
                param.grad = torch.ones_like(param)
        return torch.tensor(0.0)

    for _ in range(3):
        take_step(optimizer, form, evaluate)
        assert_same_bits(params, before)
    assert not any(optimizer.state.get(p) for p in params)


def test_bf16_weights_do_not_drift(backend, form):
    w = torch.nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend)
    before = snapshot([w])
    for _ in range(50):
        take_step(optimizer, form, backward_of(lambda: (w.float() ** 2).sum()))
    assert_same_bits([w], before)


def test_layouts_and_sizes_are_restored(backend, form):
    strided = torch.randn(6, 8)[:, ::2]
    shapes = [
        torch.randn(()),
        torch.empty(0),
        torch.randn(4, 5).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        strided,
        torch.randn(17)[1:],
        torch.randn(3, 1, 2),
    ]
    params = [torch.nn.Parameter(t) for t in shapes]
    assert not params[4].is_contiguous()
    optimizer = SAM(params, torch.optim.SGD, rho=0.5, lr=0.0, momentum=0.9, backend=backend)
    before, addresses = snapshot(params), [p.data_ptr() for p in params]
    for _ in range(3):
        take_step(optimizer, form, backward_of(lambda: sum((p**2).sum() for p in params)))
        assert_same_bits(params, before)
    assert [p.data_ptr() for p in params] == addresses


def test_layouts_are_stepped_right(backend, form):
    """Non-contiguous weights against contiguous ones with the same values."""
    values = [torch.randn(4, 5), torch.randn(2, 3, 4, 4), torch.randn(6, 4)]
    plain = [torch.nn.Parameter(v.clone()) for v in values]
    storage = torch.zeros(6, 8)
    storage[:, ::2] = values[2]
    strided = [values[0].t().contiguous().t(), values[1].to(memory_format=torch.channels_last), storage[:, ::2]]
    params = [torch.nn.Parameter(v) for v in strided]
    weights = [torch.randn(v.shape) for v in values]
    for tensors in (plain, params):
        optimizer = make(tensors, BASES["SGD"], backend)

        def loss(tensors=tensors):
            return sum((w * p**2).sum() for w, p in zip(weights, tensors, strict=True))

        for _ in range(3):
            take_step(optimizer, form, backward_of(loss))
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in plain], rtol=1e-6, atol=1e-7)
    assert torch.equal(storage[:, 1::2], torch.zeros(6, 4))


def test_addresses_never_change(backend, base, form):
    case = Regression()
    optimizer = make(case.params, base, backend)
    addresses = [p.data_ptr() for p in case.params]
    objects = [id(p) for p in case.params]
    for _ in range(20):
        take_step(optimizer, form, case.evaluate)
        assert [p.data_ptr() for p in case.params] == addresses
    assert [id(p) for p in case.params] == objects


def test_mutation_is_visible_to_autograd(backend, form):
    """A graph that saved the weights must not be run backward through other weights in silence."""
    w = parameter([1.0, 2.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(2):
        stale = (w * w).sum()
        take_step(optimizer, form, backward_of(lambda: (w**2).sum()))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
        optimizer.zero_grad()
    stale = (w * w).sum()
    (w**2).sum().backward()
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# ---- exceptions ------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


ERRORS = {"exception": Boom, "interrupt": KeyboardInterrupt, "exit": SystemExit}


def reference_run(base, backend, steps):
    case = Regression()
    optimizer = make(case.params, base, backend)
    for _ in range(steps):
        optimizer.step(case.evaluate)
    return case, optimizer


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("failing", [1, 2])
def test_error_in_a_pass_of_the_closure(backend, base, failing, error):
    case = Regression()
    optimizer = make(case.params, base, backend)
    optimizer.step(case.evaluate)
    calls = []

    def closure():
        calls.append(1)
        loss = case.evaluate()
        if len(calls) == failing:
            raise error
        return loss

    before, state = snapshot(case.params), snapshot_state(optimizer)
    with pytest.raises(error):
        optimizer.step(closure)
    assert len(calls) == failing
    assert_same_bits(case.params, before)
    assert_same_state(snapshot_state(optimizer), state)
    # The next step is as if that one had never been tried.
    optimizer.zero_grad()
    optimizer.step(case.evaluate)
    undisturbed, other = reference_run(base, backend, 2)
    assert_same_bits(case.params, undisturbed.params)
    assert_same_state(snapshot_state(optimizer), snapshot_state(other))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("late", [False, True], ids=["before backward", "after backward"])
def test_error_inside_perturbed(backend, base, error, late):
    case = Regression()
    optimizer = make(case.params, base, backend)
    optimizer.step(case.evaluate)
    before, state = snapshot(case.params), snapshot_state(optimizer)
    optimizer.zero_grad()
    case.evaluate()
    with pytest.raises(error), optimizer.perturbed():
        if late:
            case.evaluate()
        raise error
    assert_same_bits(case.params, before)
    assert_same_state(snapshot_state(optimizer), state)
    with pytest.raises(RuntimeError, match="nothing was perturbed"):  # the block did not end, so there is no step to take
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step(case.evaluate)
    undisturbed, _ = reference_run(base, backend, 2)
    assert_same_bits(case.params, undisturbed.params)


def test_leaving_perturbed_by_return_and_break(backend):
    case = Regression()
    optimizer = make(case.params, BASES["SGD"], backend)
    before = snapshot(case.params)

    def leave():
        with optimizer.perturbed():
            return case.evaluate()

    case.evaluate()
    leave()
    assert_same_bits(case.params, before)
    for _ in range(3):
        with optimizer.perturbed():
            break
    assert_same_bits(case.params, before)


@pytest.mark.parametrize("in_form", ["closure", "perturbed"])
def test_error_from_a_gradient_hook(backend, base, in_form):
    case = Regression()
    optimizer = make(case.params, base, backend)
    before, fired = snapshot(case.params), []

    def hook(grad):
        fired.append(1)
        if len(fired) == 2:
            raise Boom
        return grad

    handle = case.params[0].register_hook(hook)
    with pytest.raises(Boom):
        take_step(optimizer, in_form, case.evaluate)
    assert len(fired) == 2
    assert_same_bits(case.params, before)
    handle.remove()
    optimizer.zero_grad()
    optimizer.step(case.evaluate)
    undisturbed, _ = reference_run(base, backend, 1)
    assert_same_bits(case.params, undisturbed.params)


def test_error_between_first_step_and_second_step_can_be_finished(backend, base):
    """By hand the weights stay perturbed until the hand goes on; then they are exact."""
    case = Regression()
    optimizer = make(case.params, base, backend)
    before = snapshot(case.params)
    case.evaluate()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(Boom):
        case.params[0].register_hook(lambda grad: (_ for _ in ()).throw(Boom()))
        case.evaluate()
    optimizer.zero_grad()
    optimizer.second_step()
    assert_same_bits(case.params, before)


class Embedded:
    """An embedding whose gradient is sparse in the passes that ``sparse`` names, beside a dense weight."""

    def __init__(self, sparse):
        self.table = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3) / 7)
        self.dense = torch.nn.Parameter(torch.tensor([0.5, -0.5, 1.0]))
        self.sparse, self.passes = sparse, 0

    def evaluate(self):
        self.passes += 1
        rows = torch.nn.functional.embedding(torch.tensor([0, 2]), self.table, sparse=self.passes in self.sparse)
        loss = ((rows * self.dense) ** 2).sum()
        loss.backward()
        return loss

    @property
    def params(self):
        return [self.table, self.dense]


@pytest.mark.parametrize("in_form", ["closure", "perturbed"])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_sparse_gradients_are_refused_with_clean_weights(backend, name, which, in_form):
    case = Embedded({2 + which})
    optimizer = make(case.params, BASES[name], backend)
    optimizer.step(case.evaluate)
    before, state = snapshot(case.params), snapshot_state(optimizer)
    with pytest.raises(TypeError, match="sparse"):
        take_step(optimizer, in_form, case.evaluate)
    assert_same_bits(case.params, before)
    assert_same_state(snapshot_state(optimizer), state)
    optimizer.zero_grad()
    case.sparse = ()
    take_step(optimizer, in_form, case.evaluate)
    plain = Embedded(())
    other = make(plain.params, BASES[name], backend)
    for _ in range(2):
        other.step(plain.evaluate)
    assert_same_bits(case.params, plain.params)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_sparse_second_gradient_by_hand_changes_nothing_until_it_is_mended(backend, name):
    case = Embedded({2})
    optimizer = make(case.params, BASES[name], backend)
    before = snapshot(case.params)
    case.evaluate()
    optimizer.first_step(zero_grad=True)
    at = snapshot(case.params)
    case.evaluate()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.second_step()
    # Either still perturbed and waiting, or clean: never in between.
    now = snapshot(case.params)
    waiting = optimizer._control.state is State.PERTURBED
    assert_same_bits(now, at if waiting else before)
    assert waiting, "state changes only after the checks have passed"
    assert not optimizer.state
    case.table.grad = case.table.grad.to_dense()
    optimizer.second_step()
    plain = Embedded(())
    other = make(plain.params, BASES[name], backend)
    other.step(plain.evaluate)
    torch.testing.assert_close(case.params, plain.params, rtol=1e-6, atol=1e-7)


def test_gradients_of_another_device_or_dtype_are_refused_before_anything_moves(backend):
    w = torch.nn.Parameter(torch.randn(4))
    v = torch.nn.Parameter(torch.randn(4))
    optimizer = make([v, w], BASES["SGD"], backend)
    before = snapshot([v, w])
    v.grad = torch.ones(4)
    w.grad = torch.ones(4).to_sparse()
    for move in (optimizer.first_step, lambda: optimizer.perturbed().__enter__()):
        with pytest.raises(TypeError):
            move()
        assert_same_bits([v, w], before)
        assert optimizer._control.state is State.CLEAN


def _two_params(backend, base):
    w, v = parameter([3.0, 4 / 3]), parameter([1.0, 1.0, -0.5])
    optimizer = make([w, v], base, backend)
    evaluate = backward_of(lambda: (w**2).sum() + (v**4).sum())
    optimizer.step(evaluate)
    optimizer.zero_grad()
    return optimizer, [w, v], evaluate


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_interrupt_at_any_line_of_a_closure_step(backend, name):
    optimizer, params, evaluate = _two_params(backend, BASES[name])
    optimizer.step(evaluate)
    stepped = snapshot(params)

    def prepare():
        optimizer, params, evaluate = _two_params(backend, BASES[name])
        before = snapshot(params)

        def check():
            now = snapshot(params)
            if optimizer._control.state is not State.CLEAN:
                return f"state {optimizer._control.state}"
            for expected in (before, stepped):
                if all(map(torch.equal, now, expected)):
                    return None
            return "weights neither clean nor stepped"

        return lambda: optimizer.step(evaluate), check

    interrupted_everywhere(prepare)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_step_of_clean_weights_is_not_taken_twice(backend, base):
    """After perturbed() there is no backup to go back to: an interrupted step() has happened, or may be called again."""

    def begin():
        optimizer, params, evaluate = _two_params(backend, BASES[base])
        evaluate()
        with optimizer.perturbed():
            evaluate()
        return optimizer, params

    optimizer, params = begin()
    clean = snapshot(params)
    optimizer.step()
    once = snapshot(params)

    def prepare():
        optimizer, params = begin()

        def check():
            if optimizer._control.state is State.READY:
                if not all(map(torch.equal, snapshot(params), clean)):
                    return "stepped, and ready to step again"
                optimizer.step()
            if backend != "native":
                return None  # between two of torch's calls moments have moved and weights not, or some weights and not others
            return None if all(map(torch.equal, snapshot(params), once)) else "neither clean nor stepped"

        return optimizer.step, check

    interrupted_everywhere(prepare, operations=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("place", ["post hook", "step itself"])
def test_an_error_after_an_unfused_step_is_not_a_reason_to_step_again(place, fused):
    """torch's own fused steps leave version counters as they are."""
    optimizer, params, evaluate = _two_params(None, (torch.optim.AdamW, {"lr": 0.1, "fused": fused}))
    base = optimizer.base_optimizer

    def fail(*_):
        raise ValueError("in the middle")

    if place == "post hook":
        handle = base.register_step_post_hook(fail)
    else:
        own = base.step
        base.step = lambda: (own(), fail())
    evaluate()
    with optimizer.perturbed():
        evaluate()
    before = snapshot(params)
    with pytest.raises(ValueError, match="in the middle"):
        optimizer.step()
    after = snapshot(params)
    assert not any(map(torch.equal, after, before)) and optimizer._control.state is State.CLEAN
    with pytest.raises(RuntimeError, match="not possible"):
        optimizer.step()
    assert_same_bits(params, after)
    if place == "post hook":
        handle.remove()
        handle = base.register_step_pre_hook(fail)  # before it: nothing has happened, and it may be taken again
        evaluate()
        with optimizer.perturbed():
            evaluate()
        with pytest.raises(ValueError, match="in the middle"):
            optimizer.step()
        assert_same_bits(params, after)
        handle.remove()
        optimizer.step()
        assert not any(map(torch.equal, snapshot(params), after))


def test_an_error_of_a_step_that_has_converted_the_weights_is_the_one_that_is_seen():
    optimizer, params, evaluate = _two_params(None, BASES["RMSprop"])

    def convert(*_):
        for param in params:
            param.data, param.grad = param.data.half(), None
        raise ValueError("in the middle")

    optimizer.base_optimizer.register_step_pre_hook(convert)
    evaluate()
    with optimizer.perturbed():
        evaluate()
    with pytest.raises(ValueError, match="in the middle"):
        optimizer.step()
    assert optimizer._control.state is State.CLEAN


@pytest.mark.parametrize("how", ["perturbed", "first_step"])
def test_interrupt_at_any_line_of_an_ascent(backend, how):
    optimizer, params, evaluate = _two_params(backend, BASES["SGD"])
    evaluate()
    optimizer.first_step()
    moved = snapshot(params)

    def prepare():
        optimizer, params, evaluate = _two_params(backend, BASES["SGD"])
        evaluate()
        before = snapshot(params)

        def perturbed():
            with optimizer.perturbed():
                pass

        def check():
            now = snapshot(params)
            if optimizer._control.state in (State.CLEAN, State.READY) and all(map(torch.equal, now, before)):
                return None
            if how == "first_step" and optimizer._control.state is State.PERTURBED and all(map(torch.equal, now, moved)):
                return None
            return f"state {optimizer._control.state}, weights {'clean' if all(map(torch.equal, now, before)) else 'perturbed'}"

        return perturbed if how == "perturbed" else optimizer.first_step, check

    interrupted_everywhere(prepare)


# ---- missing gradients -----------------------------------------------------------------------------------------------


class Switching:
    """Three weights; each is used only in the passes it is given. Passes count from 1 within a step."""

    def __init__(self, used, dtype=torch.float64):
        self.params = [parameter([3.0, -1.0], dtype), parameter([4.0], dtype), parameter([0.5, 0.25, -2.0], dtype)]
        self.used, self.passes = used, 0

    def evaluate(self):
        number = self.passes % 2 + 1
        self.passes += 1
        active = [p for p, passes in zip(self.params, self.used, strict=True) if number in passes]
        loss = sum(((p - 0.1) ** 2).sum() for p in active) if active else torch.zeros((), requires_grad=True).sum()
        loss.backward()
        return loss


def expected_after(params, used, rho, lr):
    """One SAM step with plain SGD of L = sum (w - .1)^2 over the weights used in each pass, by hand."""
    ascending = [i for i, passes in enumerate(used) if 1 in passes]
    norm = sum(((2 * (params[i] - 0.1)) ** 2).sum() for i in ascending) ** 0.5 if ascending else 0.0
    result = []
    for index, param in enumerate(params):
        shifted = param + rho * 2 * (param - 0.1) / norm if index in ascending else param
        result.append(param - lr * 2 * (shifted - 0.1) if 2 in used[index] else param)
    return result


MISSING = {
    "pass 1 only": [{1, 2}, {2}, {1, 2}],
    "pass 2 only": [{1, 2}, {1}, {1, 2}],
    "both": [{1, 2}, set(), {1, 2}],
    "one in each": [{2}, {1}, {1, 2}],
    "all in pass 1": [{2}, {2}, {2}],
    "all in pass 2": [{1}, {1}, {1}],
    "all in both": [set(), set(), set()],
}


@pytest.mark.parametrize("used", MISSING.values(), ids=MISSING)
def test_missing_gradients(backend, form, used):
    case = Switching(used)
    optimizer = SAM(case.params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    for _ in range(3):
        start = [p.detach().clone() for p in case.params]
        take_step(optimizer, form, case.evaluate)
        for param, expected, clean, passes in zip(case.params, expected_after(start, used, 0.5, 0.1), start, used, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)
            if 2 not in passes:
                assert_same_bits([param], [clean])


@pytest.mark.parametrize("used", MISSING.values(), ids=MISSING)
def test_missing_gradients_touch_no_state(backend, base, form, used):
    """A weight without a second gradient gets no step and no state, as with the base optimizer alone."""
    case = Switching(used)
    optimizer = make(case.params, base, backend)
    for number in (1, 2):
        start = snapshot(case.params)
        take_step(optimizer, form, case.evaluate)
        for param, clean, passes in zip(case.params, start, used, strict=True):
            state = optimizer.state.get(param, {})
            if 2 in passes:
                assert state and ("step" not in state or float(state["step"]) == number)
                assert not torch.equal(snapshot([param])[0], clean)
            else:
                assert not state
                assert_same_bits([param], [clean])


def test_gradients_that_come_and_go(backend, form):
    """A model that drops modules at random, more patterns than are remembered, against the same numbers by hand."""
    case = Switching([set(), set(), set()])
    optimizer = SAM(case.params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    for number in range(64):
        case.used = [{p for p in (1, 2) if number * (index + 3) * (p + 1) % 5 % 2} for index in range(3)]
        start = [p.detach().clone() for p in case.params]
        take_step(optimizer, form, case.evaluate)
        expected = expected_after(start, case.used, 0.5, 0.1)
        torch.testing.assert_close([p.detach() for p in case.params], expected, rtol=1e-12, atol=1e-12)


def test_frozen_parameters(backend, base, form):
    case = Regression()
    case.params[0].requires_grad_(False)
    optimizer = make(case.params, base, backend)
    before = snapshot([case.params[0]])
    for _ in range(3):
        take_step(optimizer, form, case.evaluate)
        assert_same_bits([case.params[0]], before)
    # The same as a model in which that weight is not given to the optimizer.
    other = Regression()
    other.params[0].requires_grad_(False)
    smaller = make(other.params[1:], base, backend)
    for _ in range(3):
        take_step(smaller, form, other.evaluate)
    assert_same_bits(case.params, other.params)


def test_unfreezing_later(backend, base, form):
    case = Regression()
    case.params[0].requires_grad_(False)
    optimizer = make(case.params, base, backend)
    for _ in range(2):
        take_step(optimizer, form, case.evaluate)
    case.params[0].requires_grad_(True)
    before = snapshot(case.params)
    seen = []

    def evaluate():
        seen.append(snapshot([case.params[0]])[0])
        return case.evaluate()

    take_step(optimizer, form, evaluate)
    assert torch.equal(seen[0], before[0]) and not torch.equal(seen[1], before[0])
    assert not torch.equal(snapshot(case.params)[0], before[0])
    assert optimizer.state[case.params[0]]
    if "step" in optimizer.state[case.params[0]]:
        assert float(optimizer.state[case.params[0]]["step"]) == 1
        assert float(optimizer.state[case.params[1]]["step"]) == 3


def test_dampening_of_a_late_parameter(backend, form):
    """torch ignores dampening when it creates a momentum buffer, which for a late parameter is later."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, plain = Switching([{1, 2}, set(), {1, 2}]), Switching([{1, 2}, set(), {1, 2}])
    optimizer = SAM(ours.params, torch.optim.SGD, rho=0.0, backend=backend, **options)
    base = torch.optim.SGD(plain.params, **options)
    for number in range(4):
        if number == 2:
            ours.used = plain.used = [{1, 2}] * 3
        take_step(optimizer, form, ours.evaluate)
        plain.evaluate()
        base.zero_grad()
        plain.evaluate()
        base.step()
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-12, atol=1e-12)


# ---- zero, inf and NaN -----------------------------------------------------------------------------------------------

BAD = {"zero": 0.0, "inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_first_gradients_without_a_direction_make_a_plain_step(backend, form, dtype, bad):
    case, plain = Regression(dtype), Regression(dtype)
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer = SAM(case.params, torch.optim.SGD, rho=0.5, backend=backend, **options)
    clean, seen = snapshot(case.params), []

    def evaluate():
        seen.append(snapshot(case.params))
        loss = case.evaluate()
        if len(seen) == 1:
            for number, param in enumerate(case.params):
                if bad == 0.0:
                    param.grad.zero_()
                elif number == 1:
                    param.grad[0] = bad  # one element is enough
        return loss

    take_step(optimizer, form, evaluate)
    assert_same_bits(seen[1], clean)  # nothing moved for the second pass
    zero = SAM(plain.params, torch.optim.SGD, rho=0.0, backend=backend, **options)
    zero.step(plain.evaluate)
    assert_same_bits(case.params, plain.params)
    assert all(bool(p.isfinite().all()) for p in case.params)


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_one_bad_gradient_does_not_stop_the_others_in_the_second_pass(backend, form, bad):
    """What torch's own step does with a gradient that is not finite: that weight alone is lost, and no perturbation is."""
    a, b = parameter([1.0, 2.0]), parameter([3.0])
    optimizer = SAM([a, b], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    calls = []

    def evaluate():
        calls.append(1)
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        if len(calls) == 2:
            b.grad.fill_(BAD[bad])
        return loss

    take_step(optimizer, form, evaluate)
    assert bool(a.isfinite().all()) and not bool(b.isfinite().any())
    norm = (4 + 16 + 36) ** 0.5
    expected = [w - 0.1 * 2 * (w + 0.5 * 2 * w / norm) for w in (1.0, 2.0)]
    assert a.tolist() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_weights_that_are_not_finite_are_restored_too(backend, bad):
    w = parameter([bad, 1.0, -0.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    before = snapshot([w])
    w.grad = torch.ones_like(w)
    with optimizer.perturbed():
        assert w[1].item() != 1.0
    assert_same_bits([w], before)


# ---- what users do to weights in between -----------------------------------------------------------------------------


def test_weights_changed_between_the_passes_are_overwritten(backend, base):
    """The list of what to restore, and to what, is fixed when the weights are perturbed."""
    case, plain = Regression(), Regression()
    optimizer, other = make(case.params, base, backend), make(plain.params, base, backend)
    other.step(plain.evaluate)
    case.evaluate()
    optimizer.first_step(zero_grad=True)
    case.evaluate()
    with torch.no_grad():
        case.params[1].add_(1.0)
        case.params[2].fill_(float("nan"))
    optimizer.second_step()
    assert_same_bits(case.params, plain.params)


def test_weights_changed_after_perturbed_are_what_the_step_starts_from(backend):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    evaluate()
    with optimizer.perturbed():
        evaluate()
    with torch.no_grad():
        w.add_(10.0)
    optimizer.step()
    assert w.tolist() == pytest.approx([13 - 0.33, 14 - 0.44], abs=1e-11)


def test_weights_loaded_between_steps_are_what_the_step_starts_from(backend, base, form):
    case, fresh = Regression(), Regression()
    optimizer = make(case.params, base, backend)
    start = {k: v.clone() for k, v in case.model.state_dict().items()}
    for _ in range(2):
        take_step(optimizer, form, case.evaluate)
    state = optimizer.state_dict()
    other = make(fresh.params, base, backend)
    other.load_state_dict(copy.deepcopy(state))
    case.model.load_state_dict(start)
    take_step(optimizer, form, case.evaluate)
    take_step(other, form, fresh.evaluate)
    assert_same_bits(case.params, fresh.params)


def test_half_between_steps(backend, form):
    case = Regression(torch.float32)
    optimizer = make(case.params, BASES["SGD"], backend)
    optimizer.param_groups[0]["momentum"] = 0.0  # torch's own state would not follow the dtype either
    take_step(optimizer, form, case.evaluate)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        case.model.to(dtype)
        case.x, case.y = case.x.to(dtype), case.y.to(dtype)
        optimizer.zero_grad()
        before, seen = snapshot(case.params), []

        def evaluate(seen=seen):
            seen.append(snapshot(case.params))
            return case.evaluate()

        take_step(optimizer, form, evaluate)
        assert any(not torch.equal(a, b) for a, b in zip(seen[1], before, strict=True))
        assert all(p.dtype == dtype for p in case.params)
        # With the weights as they were and lr 0 nothing remains of e.
        optimizer.param_groups[0]["lr"] = 0.0
        before = snapshot(case.params)
        take_step(optimizer, form, case.evaluate)
        assert_same_bits(case.params, before)
        optimizer.param_groups[0]["lr"] = 0.1


def test_data_swapped_between_steps(backend, base, form):
    case, plain = Regression(), Regression()
    optimizer, other = make(case.params, base, backend), make(plain.params, base, backend)
    keep = []
    for _ in range(4):
        take_step(optimizer, form, case.evaluate)
        take_step(other, form, plain.evaluate)
        for param in case.params:
            keep.append(param.data)
            param.data = param.data.clone()
    assert_same_bits(case.params, plain.params)


def test_data_swapped_for_a_view_of_the_same_memory(backend):
    """The address stays and the order of the elements does not: a transposed square matrix, with its momentum."""
    values = torch.randn(3, 3, dtype=torch.float64)
    curvature = torch.rand(3, 3, dtype=torch.float64)
    results = []
    for swap in (lambda t: t.t(), lambda t: t.t().contiguous()):
        w = parameter(values)
        optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend)
        for _ in range(3):
            optimizer.step(backward_of(lambda w=w: (curvature * w**2).sum()))
            optimizer.zero_grad()
            w.data = swap(w.data)
        results.append(w.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_data_swapped_for_another_dtype_at_the_same_address(backend):
    memory = torch.zeros(64, dtype=torch.uint8)
    w = torch.nn.Parameter(memory[:32].view(torch.float32))
    with torch.no_grad():
        w.copy_(torch.arange(8.0))
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend)
    optimizer.step(backward_of(lambda: (w**2).sum()))
    optimizer.zero_grad()
    values = w.detach().clone()
    w.grad = None
    w.data = memory[:16].view(torch.bfloat16)
    with torch.no_grad():
        w.copy_(values)
    before = snapshot([w])
    w.grad = torch.ones_like(w)
    with optimizer.perturbed():
        assert not torch.equal(snapshot([w])[0], before[0])
    assert_same_bits([w], before)


def test_backups_of_dtypes_that_are_gone_are_not_kept(backend):
    """Switching a model's dtype back and forth must not hold a buffer for each time."""
    w = torch.nn.Parameter(torch.randn(1000))
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.0, backend=backend)
    for number in range(8):
        w.data = w.data.to(torch.float64 if number % 2 else torch.float32)
        optimizer.zero_grad()
        optimizer.step(backward_of(lambda: (w**2).sum()))
    assert optimizer.buffer_bytes <= 2 * 8 * 1100
