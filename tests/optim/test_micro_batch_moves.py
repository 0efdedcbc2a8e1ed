"""What is possible when between micro-batches, and what everything else is answered: nothing is lost and weights are clean."""

import copy
import pickle

import pytest
import torch
from torch.optim import SGD

from sam_fused.optim.state import TABLE, Move, State
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    assert_same_state,
    parameter,
    snapshot,
    snapshot_state,
)
from tests.optim.interrupts import interrupted_everywhere
from tests.optim.test_micro_batch import BASES, make, take

# A whole batch is three micro-batches here: after two of them, in the second pass of the second, after all three.
SITUATIONS = ("accumulated", "inside", "complete")
ALLOWED = {
    "micro_batch": {"accumulated"},
    "step": {"complete"},
    "restore": {"accumulated", "complete"},
    "zero_grad": {"accumulated", "inside", "complete"},
    "state_dict": set(),
    "load_state_dict": set(),
    "add_param_group": set(),
    "release_buffers": set(),
    "set_num_micro_batches": set(),
    "first_step": set(),
    "second_step": set(),
    "perturbed": set(),
    "step_closure": set(),
}


class Case:
    """A net in the middle of a step by hand."""

    def __init__(self, backend, base="SGD"):
        self.net = Regression()
        base_class, kwargs = BASES[base]
        self.optimizer = make(self.net.params, base_class, 3, backend=backend, rho=0.1, **kwargs)
        self.pieces = list(zip(self.net.x.split([6, 5, 5]), self.net.y.split([6, 5, 5]), strict=True))

    @property
    def params(self):
        return self.net.params

    def evaluate(self, x, y):
        loss = torch.nn.functional.mse_loss(self.net.model(x), y)
        loss.backward()
        return loss

    def micro_batch(self, number, inside=lambda: None):
        x, y = self.pieces[number]
        self.optimizer.zero_grad()
        self.evaluate(x, y)
        with self.optimizer.micro_batch(weight=len(x) / 16):
            inside()
            self.evaluate(x, y)

    def run(self, situation, action):
        self.micro_batch(0)
        if situation == "inside":
            self.micro_batch(1, action)
        else:
            self.micro_batch(1)
            if situation == "complete":
                self.micro_batch(2)
            action()

    def act(self, move):
        optimizer = self.optimizer
        if move == "step_closure":
            return optimizer.step(self.evaluate, self.net.x, self.net.y)
        if move in ("perturbed", "micro_batch"):
            arguments = {"weight": 0.01} if move == "micro_batch" else {}
            with getattr(optimizer, move)(**arguments):
                self.evaluate(*self.pieces[0])
            return None
        if move == "set_num_micro_batches":
            optimizer.num_micro_batches = 4
            return None
        if move == "load_state_dict":
            return optimizer.load_state_dict(Case(None).optimizer.state_dict())
        if move == "add_param_group":
            return optimizer.add_param_group({"params": [parameter([5.0])]})
        return getattr(optimizer, move)()


@pytest.fixture(scope="module")
def whole_step():
    case = Case("native")
    for number in range(3):
        case.micro_batch(number)
    case.optimizer.step()
    return [p.detach().clone() for p in case.params]


REFUSED = [(move, where) for move, allowed in ALLOWED.items() for where in SITUATIONS if where not in allowed]


@pytest.mark.parametrize(("move", "situation"), REFUSED, ids=lambda value: value)
def test_refused_moves_change_nothing(backend, move, situation, whole_step):
    case = Case(backend)
    seen = []

    def attempt():
        params, optimizer = case.params, case.optimizer
        before, state = snapshot([*params, *(p.grad for p in params)]), snapshot_state(optimizer)
        versions = [p._version for p in params]
        with pytest.raises(RuntimeError) as raised:
            case.act(move)
        assert_one_sentence(raised.value)
        assert_same_bits(snapshot([*params, *(p.grad for p in params)]), before)
        assert_same_state(snapshot_state(optimizer), state)
        assert [p._version for p in params] == versions
        seen.append(True)

    case.run(situation, attempt)
    assert seen
    for number in {"accumulated": [2], "inside": [2], "complete": []}[situation]:
        case.micro_batch(number)
    case.optimizer.step()
    torch.testing.assert_close([p.detach() for p in case.params], whole_step, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("action", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_in_the_middle_of_a_step_are_refused(backend, action, micro_batches):
    """After the last one, too: what was added up is in no checkpoint."""
    case = Case(backend)
    for number in range(micro_batches):
        case.micro_batch(number)
    with pytest.raises(RuntimeError) as raised:
        action(case.optimizer)
    assert_one_sentence(raised.value, "micro-batches")


def test_the_table_is_the_one_that_is_tested():
    states = {State.ACCUMULATED: "accumulated", State.INSIDE: "inside", State.COMPLETE: "complete"}
    for move in Move:
        found = {states[state] for state in states if TABLE[move][state] is None}
        wanted = ALLOWED[move.name.lower()]
        assert found == wanted, move
    assert TABLE[Move.MICRO_BATCH][State.CLEAN] is None and TABLE[Move.MICRO_BATCH][State.PERTURBED] is not None


@pytest.mark.parametrize("situation", ["accumulated", "complete"])
def test_a_step_that_is_given_up_leaves_nothing_behind(backend, situation, whole_step):
    case = Case(backend)
    before = snapshot(case.params)
    case.run(situation, case.optimizer.restore)
    assert_same_bits(case.params, before)
    with pytest.raises(RuntimeError):
        case.optimizer.step()
    for number in range(3):
        case.micro_batch(number)
    case.optimizer.step()
    torch.testing.assert_close([p.detach() for p in case.params], whole_step, rtol=1e-12, atol=1e-14)


def test_gradients_are_none_between_micro_batches_and_the_step_s_at_the_end(backend):
    case = Case(backend)
    seen = []
    case.run("accumulated", lambda: seen.append([p.grad for p in case.params]))
    assert all(grad is None for grad in seen[0])
    case.micro_batch(2)
    grads = [p.grad.clone() for p in case.params]
    other = Case(backend)
    take(other.optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(other.net.model(x), y), other.net.x, other.net.y)
    # SGD's first step with dampening ignored: buffer = gradient + decay.
    buffers = [other.optimizer.state[p]["momentum_buffer"] for p in other.params]
    wanted = [b - 0.01 * p.detach() for b, p in zip(buffers, case.params, strict=True)]
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-12)
    case.optimizer.step()
    assert all(p.grad is None for p in other.params)  # of the closure form, which has no place for it


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_a_batch_that_zero_grad_has_dropped_is_missed(backend, name):
    """``zero_grad()`` at the end of the loop's body: after the last block it drops the sum."""
    case = Case(backend, name)
    for number in range(3):
        case.micro_batch(number)
    case.optimizer.zero_grad()
    before = snapshot(case.params)
    with pytest.raises(RuntimeError) as raised:
        case.optimizer.step()
    assert_one_sentence(raised.value, "zero_grad()", "restore()")
    assert_same_bits(case.params, before)
    case.optimizer.restore()
    for number in range(3):
        case.micro_batch(number)
    case.optimizer.step()
    assert not any(map(torch.equal, case.params, before))


@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_model_of_halves_that_is_converted_before_its_step(backend, to):
    """What ``.grad`` holds after the conversion is what is stepped with."""
    w = parameter([1.0, 2.0], dtype=torch.bfloat16)
    optimizer = make([w], SGD, 2, backend=backend, lr=1.0, rho=0.0)
    for _ in range(2):
        (w * torch.tensor([0.5, 0.25], dtype=torch.bfloat16)).sum().backward()
        with optimizer.micro_batch():
            (w * torch.tensor([0.5, 0.25], dtype=torch.bfloat16)).sum().backward()
    w.data, w.grad = w.data.to(to), None
    w.grad = torch.tensor([0.5, 0.25], dtype=to)
    optimizer.step()
    assert w.tolist() == [0.5, 1.75] and w.dtype == to


def test_what_is_done_to_the_gradient_by_hand_counts(backend):
    """Clipping, masking, replacing: between the last micro-batch and the step."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for touch in ("scale", "replace", "drop"):
            w, other = (torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2))
            optimizer = make([w, other], SGD, 2, backend=backend, lr=1.0, rho=0.0)
            for scale in (1.0, 2.0):
                optimizer.zero_grad()
                ((w + other) * scale).sum().backward()
                with optimizer.micro_batch():
                    ((w + other) * scale).sum().backward()
            assert w.grad.tolist() == [1.5] * 3
            if touch == "scale":
                w.grad.mul_(2)
            else:
                w.grad = None if touch == "drop" else torch.full_like(w, 5.0)
            optimizer.step()
            assert w.tolist() == [{"scale": -3.0, "replace": -5.0, "drop": 0.0}[touch]] * 3 and other.tolist() == [-1.5] * 3


def test_zero_grad_to_zeros_does_not_reach_what_was_added_up(backend, whole_step):
    case = Case(backend)
    for number in range(3):
        x, y = case.pieces[number]
        case.optimizer.zero_grad(set_to_none=False)
        case.evaluate(x, y)
        case.optimizer.zero_grad(set_to_none=False)
        case.evaluate(x, y)
        with case.optimizer.micro_batch(weight=len(x) / 16):
            case.evaluate(x, y)
    case.optimizer.step()
    torch.testing.assert_close([p.detach() for p in case.params], whole_step, rtol=1e-12, atol=1e-14)


# ---- whatever is thrown ----------------------------------------------------------------------------------------------------


class Mishap(Exception):
    pass


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_an_exception_in_any_call_of_the_closure(backend, name, call, when):
    """The weights are clean, nothing of the base optimizer's exists, and the next step is a first step."""
    base, kwargs = BASES[name]
    case, fresh = Regression(), Regression()
    optimizer = make(case.params, base, 3, backend=backend, rho=0.1, **kwargs)
    calls = []

    def closure(x, y):
        calls.append(True)
        if len(calls) == call + 1 and when == "before backward":
            raise Mishap
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        if len(calls) == call + 1:
            raise Mishap
        return loss

    before = snapshot(case.params)
    with pytest.raises(Mishap):
        optimizer.step(closure, case.x, case.y)
    assert_same_bits(case.params, before)
    assert not optimizer.state and all(p.grad is None for p in case.params)
    optimizer.step(closure, case.x, case.y)
    undisturbed = make(fresh.params, base, 3, backend=backend, rho=0.1, **kwargs)
    take(undisturbed, "closure", lambda x, y: torch.nn.functional.mse_loss(fresh.model(x), y), fresh.x, fresh.y)
    assert_same_bits(case.params, fresh.params)
    assert_same_state(snapshot_state(optimizer), snapshot_state(undisturbed))


@pytest.mark.parametrize("number", range(3))
def test_an_exception_in_a_block_gives_the_step_up(backend, number, whole_step):
    case = Case(backend)
    before = snapshot(case.params)

    def fail():
        raise Mishap

    for index in range(number):
        case.micro_batch(index)
    with pytest.raises(Mishap):
        case.micro_batch(number, fail)
    assert_same_bits(case.params, before)
    # Going on with the rest of the batch would be a step along a part of it.
    for index in range(number + 1, 3):
        case.micro_batch(index)
    with pytest.raises(RuntimeError) as raised:
        case.optimizer.step()
    assert_one_sentence(raised.value)
    case.optimizer.restore()
    for index in range(3):
        case.micro_batch(index)
    case.optimizer.step()
    torch.testing.assert_close([p.detach() for p in case.params], whole_step, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_interrupt_at_any_line_of_a_step(fast_backend, name):
    base, kwargs = BASES[name]

    def begin():
        w, v = parameter([3.0, 4 / 3]), parameter([1.0, 1.0, -0.5])
        optimizer = make([w, v], base, 2, backend=fast_backend, rho=0.1, **kwargs)

        def closure(x):
            loss = ((w * x.mean()) ** 2).sum() + (v**4).sum()
            loss.backward()
            return loss

        x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        optimizer.step(closure, x)
        return optimizer, [w, v], lambda: optimizer.step(closure, x)

    _, params, step = begin()
    step()
    stepped = snapshot(params)

    def prepare():
        optimizer, params, step = begin()
        before = snapshot(params)

        def check():
            now = snapshot(params)
            if optimizer._control.state is not State.CLEAN or optimizer._accumulation.count:
                return f"state {optimizer._control.state}, {optimizer._accumulation.count} micro-batches"
            if not any(all(map(torch.equal, now, expected)) for expected in (before, stepped)):
                return "weights neither clean nor stepped"
            return None

        return step, check

    interrupted_everywhere(prepare)


def test_interrupt_at_any_line_of_a_block(fast_backend):
    def prepare():
        case = Case(fast_backend)
        case.micro_batch(0)
        x, y = case.pieces[1]
        case.evaluate(x, y)
        before = snapshot(case.params)

        def block():
            with case.optimizer.micro_batch(weight=5 / 16):
                for p in case.params:
                    p.grad = torch.ones_like(p)

        def check():
            state, count = case.optimizer._control.state, case.optimizer._accumulation.count
            if not all(map(torch.equal, snapshot(case.params), before)):
                return f"state {state}, weights perturbed"
            # Given up, or not begun, or over: never something that a later step would take for a whole batch.
            if (state, count) not in ((State.CLEAN, 0), (State.ACCUMULATED, 1), (State.ACCUMULATED, 2)):
                return f"state {state}, {count} micro-batches"
            case.optimizer.restore()
            for number in range(3):
                case.micro_batch(number)
            case.optimizer.step()
            return None

        return block, check

    interrupted_everywhere(prepare)


def test_interrupt_at_any_line_of_a_block_with_a_parameter_left_out(fast_backend):
    """Perturbed, and without a gradient in the second pass: restored by nothing but the leftover's own restore."""

    def prepare():
        w, v = parameter([3.0, 4 / 3]), parameter([1.0, 1.0, -0.5])
        optimizer = make([w, v], SGD, 2, backend=fast_backend, lr=0.1, rho=0.1)
        ((w**2).sum() + (v**4).sum()).backward()
        before = snapshot([w, v])

        def block():
            with optimizer.micro_batch():
                w.grad = torch.ones_like(w)

        def check():
            return None if all(map(torch.equal, snapshot([w, v]), before)) else "weights perturbed"

        return block, check

    interrupted_everywhere(prepare)


@pytest.mark.parametrize("how", ["channels_last", "double"])
@pytest.mark.parametrize("form", ["by_hand", "closure"])
def test_a_model_converted_in_the_middle_of_a_step(backend, how, form):
    """What was added up lies where the parameters were: the step is given up with a word, and not taken along garbage."""
    conv = torch.nn.Conv2d(2, 3, 2)
    optimizer = make(conv.parameters(), SGD, 2, backend=backend, lr=0.1, rho=0.1)
    calls = []

    def closure(x):
        calls.append(True)
        loss = (conv(x.to(conv.weight.dtype)) ** 2).mean()
        loss.backward()
        return loss

    def convert():
        conv.to(memory_format=torch.channels_last) if how == "channels_last" else conv.double()

    def converting(x):
        if len(calls) == 2:
            convert()
        return closure(x)

    x = torch.randn(4, 2, 5, 5)
    with pytest.raises(RuntimeError) as raised:
        if form == "closure":
            optimizer.step(converting, x)
        else:
            for piece in x.chunk(2):
                optimizer.zero_grad()
                closure(piece)
                with optimizer.micro_batch():
                    closure(piece)
                convert()
    assert_one_sentence(raised.value, "converted")
    assert optimizer._control.state is State.CLEAN and optimizer._accumulation.count == 0
    optimizer.zero_grad()
    optimizer.step(closure, x)


def test_parameters_that_come_and_go_in_the_middle_of_a_step(backend):
    case = Case(backend)
    before = snapshot(case.params)
    case.micro_batch(0)
    case.optimizer.base_optimizer.add_param_group({"params": [parameter([5.0])]})  # behind the wrapper's back
    with pytest.raises(RuntimeError) as raised:
        case.micro_batch(1)
    assert_one_sentence(raised.value, "same parameters", "between steps")
    assert_same_bits(case.params, before)
    assert case.optimizer._control.state is State.CLEAN
    for number in range(3):
        case.micro_batch(number)
    case.optimizer.step()


def test_an_accumulation_that_fails_half_way(backend, monkeypatch):
    """The second kernel of a micro-batch's end throws: the step is given up and the weights are clean."""
    from sam_fused.ops.prepared import TensorSet

    case = Case(backend)
    before = snapshot(case.params)
    case.micro_batch(0)

    def fail(self, *arguments, **keywords):
        raise Mishap

    with monkeypatch.context() as patched:
        patched.setattr(TensorSet, "restore_accumulate_", fail)
        with pytest.raises(Mishap):
            case.micro_batch(1)
    assert_same_bits(case.params, before)
    assert case.optimizer._accumulation.count == 0
