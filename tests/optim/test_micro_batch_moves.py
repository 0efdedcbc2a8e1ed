"""What is possible when between micro-batches, and what everything else is answered: nothing is lost and weights are clean."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop

from sam_fused import SAM, MicroBatchSAM
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


# ---- bad input -------------------------------------------------------------------------------------------------------------


def refused(optimizer, error, action, *words):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = snapshot(params)
    with pytest.raises(error) as raised:
        action()
    assert_one_sentence(raised.value, *words)
    assert_same_bits(params, before)
    assert optimizer._control.state is State.CLEAN and not optimizer.state


def test_bad_batches_and_closures(backend):
    case = Regression()
    optimizer = make(case.params, AdamW, 4, backend=backend)

    def closure(x, y):
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        return loss

    x, y = case.x, case.y
    step = optimizer.step
    refused(optimizer, ValueError, lambda: step(closure, x[:3], y[:3]), "4 micro-batches", "got 3")
    refused(optimizer, ValueError, lambda: step(closure, x, y[:5]), "16 in argument 0", "5 in argument 1")
    refused(optimizer, ValueError, lambda: step(closure), "got none")
    refused(optimizer, ValueError, lambda: step(closure, "text", torch.tensor(1.0)), "got none")
    refused(optimizer, TypeError, lambda: step(lambda x, y: closure(x, y) and None, x, y), "scalar", "NoneType")
    refused(optimizer, TypeError, lambda: step(lambda x, y: closure(x, y).expand(3), x, y), "shape (3,)")
    refused(optimizer, TypeError, lambda: step(lambda x, y: closure(x, y) is not None, x, y), "bool")
    refused(optimizer, RuntimeError, lambda: step(lambda x, y: case.model(x).mean(), x, y), "backward")
    calls = []

    def backward_once(x, y):
        calls.append(True)
        return closure(x, y) if len(calls) % 2 else case.model(x).mean()

    refused(optimizer, RuntimeError, lambda: step(backward_once, x, y), "backward")


def test_closures_that_take_steps_are_refused(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 2, backend=backend, lr=0.1, rho=0.1)
    before = snapshot(case.params)

    def closure(x, y):
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure, case.x, case.y)
    assert_one_sentence(raised.value, "step()")
    assert_same_bits(case.params, before)

    def nested(x, y):
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        with optimizer.micro_batch():
            torch.nn.functional.mse_loss(case.model(x), y).backward()
        return loss

    def whole(x, y):
        if len(x) == 8:  # else it would call itself for ever
            optimizer.step(whole, x[:4], y[:4])
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        return loss

    for closure in (nested, whole):
        with pytest.raises(RuntimeError) as raised:
            optimizer.step(closure, case.x, case.y)
        assert_one_sentence(raised.value, "evaluates")
        assert_same_bits(case.params, before)


def test_several_micro_batches_have_several_first_passes(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 2, backend=backend, lr=0.1)
    before = snapshot(case.params)
    case.evaluate()
    for error, arguments, named in (
        (RuntimeError, (lambda x: case.evaluate(), case.x), {"first_pass_done": True}),
        (TypeError, (None, case.x), {}),
    ):
        with pytest.raises(error) as raised:
            optimizer.step(*arguments, **named)
        assert_one_sentence(raised.value, "micro_batch()")
        assert_same_bits(case.params, before)
    optimizer = make(case.params, SGD, 1, backend=backend, lr=0.1)
    with optimizer.perturbed():
        case.evaluate()
    with pytest.raises(RuntimeError) as raised:
        optimizer.step(lambda x: case.evaluate(), case.x)
    assert_one_sentence(raised.value, "restore()")


@pytest.mark.parametrize("weight", [0, -0.1, 1.5, float("nan"), float("inf"), "half", True, torch.tensor(0.5)])
def test_weights_that_are_none(backend, weight):
    w = parameter([1.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1)
    w.grad = torch.ones_like(w)

    def enter():
        with optimizer.micro_batch(weight=weight):
            raise AssertionError("entered")

    refused(optimizer, ValueError, enter, "weight")
    assert w.grad.tolist() == [1.0]


def test_weights_that_sum_to_more_or_less_than_one(backend):
    """1 for each would be the sum over the micro-batches and not their mean."""
    w = parameter([1.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1)

    def micro_batch(weight):
        optimizer.zero_grad()
        w.sum().backward()
        with optimizer.micro_batch(weight=weight):
            w.sum().backward()

    micro_batch(0.6)
    with pytest.raises(ValueError, match=r"sum to 1 over a batch, got 1.2"):
        micro_batch(0.6)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert_one_sentence(raised.value, "sum to 1")
    micro_batch(0.4)
    optimizer.step()
    assert w.tolist() == pytest.approx([0.9])


def test_many_weights_whose_sum_is_rounded(backend):
    w = parameter([1.0])
    optimizer = make([w], SGD, 49, backend=backend, lr=0.1, rho=0.0)
    for _ in range(49):
        optimizer.zero_grad()
        w.sum().backward()
        with optimizer.micro_batch():
            w.sum().backward()
    assert sum([1 / 49] * 49) != 1
    optimizer.step()
    assert w.tolist() == pytest.approx([0.9])


def test_a_block_without_a_backward(backend):
    w = parameter([1.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1)
    w.sum().backward()

    def block():
        with optimizer.micro_batch():
            pass

    refused(optimizer, RuntimeError, block, "inside the block")


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", True, None])
def test_counts_that_are_none(count):
    with pytest.raises(ValueError) as raised:
        MicroBatchSAM([parameter([1.0])], SGD, num_micro_batches=count, lr=0.1)
    assert_one_sentence(raised.value, "num_micro_batches")
    optimizer = MicroBatchSAM([parameter([1.0])], SGD, num_micro_batches=2, lr=0.1)
    with pytest.raises(ValueError, match="num_micro_batches"):
        optimizer.num_micro_batches = count
    assert optimizer.num_micro_batches == 2


def test_gradients_that_the_first_pass_would_drop(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 2, backend=backend, lr=0.1)
    case.evaluate()
    loss = lambda x, y: torch.nn.functional.mse_loss(case.model(x), y)  # noqa: E731
    refused(optimizer, RuntimeError, lambda: take(optimizer, "closure", loss, case.x, case.y), "fresh")
    optimizer.zero_grad()
    take(optimizer, "closure", loss, case.x, case.y)


# ---- memory, addresses, what somebody else does ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 3), (torch.float16, 3)])
def test_memory_is_the_backup_and_an_accumulator_whatever_their_number(backend, dtype, copies):
    held = []
    for count in (2, 8):
        case = Regression(dtype)
        optimizer = make(case.params, SGD, count, backend=backend, lr=0.01, rho=0.01)
        for _ in range(2):
            take(optimizer, "closure", lambda x, y, case=case: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
        own = sum(p.numel() * p.element_size() for p in case.params)
        # Every tensor starts on a cache line, and so does the buffer.
        assert copies * own <= optimizer.buffer_bytes <= copies * own + 3 * 64 * (len(case.params) + 1)
        held.append(optimizer.buffer_bytes)
        optimizer.release_buffers()
        assert optimizer.buffer_bytes == 0
    assert held[0] == held[1]


def test_one_micro_batch_has_no_accumulator(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 1, backend=backend, lr=0.01)
    take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    assert optimizer._accumulation.nbytes == 0


def test_the_backup_is_written_once_a_step(backend, monkeypatch):
    from sam_fused.ops.prepared import TensorSet

    case, said = Regression(), []
    own = TensorSet.perturb_
    monkeypatch.setattr(
        TensorSet, "perturb_", lambda self, *a, **k: said.append(k.get("backup_exists", False)) or own(self, *a, **k)
    )
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.01, rho=0.1)
    for _ in range(2):
        take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    assert said == [False, True, True] * 2


def test_weights_that_change_between_micro_batches_are_kept(backend):
    """Weight clipping or a loaded checkpoint in the middle of a step: the old backup must not undo it."""
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.0, rho=0.5)
    for number in range(2):
        optimizer.zero_grad()
        (w**2).sum().backward()
        with optimizer.micro_batch():
            (w**2).sum().backward()
        if number == 0:
            with torch.no_grad():
                w.clamp_(max=1.5)
    assert w.tolist() == [1.0, 1.5]


def test_addresses_stay(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.01, rho=0.1)
    loss = lambda x, y: torch.nn.functional.mse_loss(case.model(x), y)  # noqa: E731
    take(optimizer, "closure", loss, case.x, case.y)
    here = [p.data_ptr() for p in case.params]
    take(optimizer, "by_hand", loss, case.x, case.y)
    assert [p.data_ptr() for p in case.params] == here


def test_gradients_are_not_written(backend):
    """Who else holds their storage cannot be known."""
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1, rho=0.1)
    kept = []

    def closure(x):
        loss = (w * x.mean(0)).sum()
        loss.backward()
        kept.append((w.grad, w.grad.clone()))
        return loss

    optimizer.step(closure, torch.randn(4, 2, dtype=torch.float64))
    assert len(kept) == 4
    assert_same_bits([grad for grad, _ in kept], [copy for _, copy in kept])


def test_autograd_sees_that_weights_were_written(backend):
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1, rho=0.1)
    waiting = (w**2).sum()
    optimizer.zero_grad()
    (w**2).sum().backward()
    with optimizer.micro_batch():
        (w**2).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


def test_the_sum_that_was_shown_is_not_overwritten_in_silence(backend):
    """``.grad`` of fp32 parameters is the accumulator: a graph that holds it has to hear of the next step."""
    case = Regression()
    optimizer = make(case.params, SGD, 2, backend=backend, lr=0.1)
    loss = lambda x, y: torch.nn.functional.mse_loss(case.model(x), y)  # noqa: E731
    take(optimizer, "by_hand", loss, case.x, case.y)
    kept = [p.grad for p in case.params]
    ones = [torch.ones_like(g, requires_grad=True) for g in kept]
    held = sum((g * one).sum() for g, one in zip(kept, ones, strict=True))
    optimizer.zero_grad()
    take(optimizer, "closure", loss, case.x, case.y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_a_framework_that_copies_attributes_sees_the_same_count():
    """Lightning's wrapper takes over ``__dict__`` and runs our methods with itself as self."""
    optimizer = make(Regression().params, SGD, 4, lr=0.1)
    wrapper = copy.copy(optimizer)
    wrapper.__dict__ = {**optimizer.__dict__}
    optimizer.num_micro_batches = 2
    assert wrapper.num_micro_batches == 2


def test_settings_survive_copies(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.1, momentum=0.9, max_grad_norm=2.0)
    take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(again) is MicroBatchSAM and again.num_micro_batches == 3 and again.max_grad_norm == 2.0
        assert_same_state(snapshot_state(again), snapshot_state(optimizer))
    assert repr(optimizer).startswith("MicroBatchSAM around SGD (")


def test_schedulers_and_hooks(backend):
    case = Regression()
    optimizer = make(case.params, RMSprop, 2, backend=backend, lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: fired.append("base"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
            scheduler.step()
    assert fired == ["pre", "base", "post"] * 2 and optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("form", ["step", "second_step"])
def test_hooks_fire_once_by_hand(form):
    """torch wraps the ``step`` of each class that is constructed: SAM's, too, as soon as there is one."""
    case = Regression()
    SAM(case.params, SGD, lr=0.1)
    optimizer = make(case.params, SGD, 1 if form == "second_step" else 2, lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    if form == "step":
        take(optimizer, "by_hand", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    else:
        case.evaluate()
        optimizer.first_step(zero_grad=True)
        case.evaluate()
        optimizer.second_step()
    assert fired == ["pre", "post"]
