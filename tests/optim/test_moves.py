"""The written table of moves, cell by cell: what is allowed gives the right weights, what is refused changes nothing.

The table below is written from docs/architecture.md's promises, not from the code. A step goes clean -> perturbed ->
clean. While the weights are perturbed only what ends the step, or clears gradients, is possible; while they are clean, only
what needs no perturbation. Inside a ``perturbed()`` block or a closure the way out is to leave it.

Numbers: L = 0.5 w' diag(1, 3) w at w = (3, 4/3), rho 0.5, lr 0.1, momentum 0.9, so g = (3, 4), e = (.3, .4), gs = (3.3, 5.2).
"""

import copy
import math
import pickle

import pytest
import torch

from sam_fused import SAM
from sam_fused.optim.state import TABLE, Move, State
from tests.optim.helpers import (
    assert_one_sentence,
    assert_same_bits,
    assert_same_state,
    backward_of,
    parameter,
    snapshot,
    snapshot_state,
)

START = [3.0, 4 / 3]
CURVATURE = torch.tensor([1.0, 3.0], dtype=torch.float64)
LR, RHO, MOMENTUM = 0.1, 0.5, 0.9

SITUATIONS = ("clean", "perturbed", "inside", "closure", "ready")
MOVES = (
    "first_step",
    "second_step",
    "step",
    "step_closure",
    "perturbed",
    "restore",
    "state_dict",
    "load_state_dict",
    "zero_grad",
    "add_param_group",
    "release_buffers",
)

# Where each move is allowed; everywhere else it is refused.
ALLOWED = {
    "first_step": {"clean", "ready"},
    "second_step": {"perturbed"},
    "step": {"perturbed", "ready"},
    "step_closure": {"clean", "ready"},
    "perturbed": {"clean", "ready"},
    "restore": {"clean", "perturbed", "ready"},
    "state_dict": {"clean", "ready"},
    "load_state_dict": {"clean", "ready"},
    "zero_grad": {"clean", "perturbed", "inside", "closure", "ready"},
    "add_param_group": {"clean", "ready"},
    "release_buffers": {"clean", "ready"},
}

REFUSED = [(move, situation) for move in MOVES for situation in SITUATIONS if situation not in ALLOWED[move]]
SOUND = [(move, situation) for move in MOVES for situation in SITUATIONS if situation in ALLOWED[move]]


def gradient(w):
    return [w[0], 3 * w[1]]


def perturbed_at(w, g):
    length = math.hypot(*g)
    return [w[0] + RHO * g[0] / length, w[1] + RHO * g[1] / length]


def stepped(w, gs):
    return [w[0] - LR * gs[0], w[1] - LR * gs[1]]


W = START
G = gradient(W)
P = perturbed_at(W, G)
GS = gradient(P)
STEPPED = stepped(W, GS)


class Situation:
    """An optimizer in one of the situations, with the gradients that belong there, and the rest of its step."""

    def __init__(self, name, backend):
        self.name = name
        self.w = parameter(START)
        self.optimizer = SAM([self.w], torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, backend=backend)
        self.calls = 0

    def loss(self):
        return 0.5 * (CURVATURE * self.w * self.w).sum()

    def evaluate(self):
        self.calls += 1
        loss = self.loss()
        loss.backward()
        return loss

    def run(self, action):
        """Calls ``action`` in the situation, then finishes the step if it was begun."""
        optimizer = self.optimizer
        if self.name == "closure":
            acted = []

            def closure():
                loss = self.evaluate()
                if optimizer._control.state is State.INSIDE and not acted:
                    acted.append(True)
                    action(self)
                return loss

            optimizer.step(closure)
            assert acted
            return
        self.evaluate()
        if self.name == "clean":
            action(self)
        elif self.name == "perturbed":
            optimizer.first_step(zero_grad=True)
            self.evaluate()
            action(self)
            if optimizer._control.state is State.PERTURBED:
                optimizer.second_step()
        elif self.name == "inside":
            with optimizer.perturbed():
                self.evaluate()
                action(self)
            optimizer.step()
        else:
            with optimizer.perturbed():
                self.evaluate()
            action(self)

    def act(self, move):
        optimizer = self.optimizer
        if move == "step_closure":
            return optimizer.step(self.evaluate)
        if move == "perturbed":
            with optimizer.perturbed():
                self.evaluate()
            return None
        if move == "load_state_dict":
            # torch takes a checkpoint's tensors over without copying them.
            return optimizer.load_state_dict(copy.deepcopy(CHECKPOINT))
        if move == "add_param_group":
            return optimizer.add_param_group({"params": [parameter([5.0])], "rho": 0.2})
        return getattr(optimizer, move)()

    @property
    def weights(self):
        return self.w.tolist()


CHECKPOINT = {
    "state": {0: {"momentum_buffer": torch.tensor([10.0, 20.0], dtype=torch.float64)}},
    "param_groups": [
        {**torch.optim.SGD([parameter(START)], lr=LR, momentum=MOMENTUM).state_dict()["param_groups"][0], "lr": 0.2}
    ],
}


def close(values):
    return pytest.approx(values, abs=1e-11)


@pytest.mark.parametrize(("move", "situation"), REFUSED, ids=lambda value: value)
def test_refused_moves_change_nothing(backend, move, situation):
    case = Situation(situation, backend)
    seen = []

    def attempt(case):
        optimizer = case.optimizer
        before = snapshot([case.w, case.w.grad]), snapshot_state(optimizer), optimizer.buffer_bytes
        grad, grads_version, version, calls = case.w.grad, case.w.grad._version, case.w._version, case.calls
        for _ in range(2):
            with pytest.raises(RuntimeError) as raised:
                case.act(move)
            assert_one_sentence(raised.value, {"step_closure": "step(closure)"}.get(move, move.split("_")[0]))
            assert case.w.grad is grad and grad._version == grads_version and case.w._version == version
            assert case.calls == calls
            assert_same_bits([case.w, case.w.grad], before[0])
            assert_same_state(snapshot_state(optimizer), before[1])
            assert len(optimizer.param_groups) == 1 and optimizer.buffer_bytes == before[2]
        seen.append(True)
        if situation == "ready":
            optimizer.step()

    case.run(attempt)
    assert seen
    # The step goes on as if nothing had been asked.
    undisturbed = Situation(situation, backend)
    undisturbed.run(lambda case: case.optimizer.step() if situation == "ready" else None)
    assert_same_bits([case.w], [undisturbed.w])
    assert_same_state(snapshot_state(case.optimizer), snapshot_state(undisturbed.optimizer))
    assert case.weights == close(W if situation == "clean" else STEPPED)


def allowed_first_step(case):
    along = case.w.grad.tolist()
    case.act("first_step")
    assert case.weights == close(perturbed_at(W, along))
    assert case.w.grad is not None  # zero_grad=False
    case.optimizer.zero_grad()
    case.evaluate()
    case.optimizer.second_step()
    return stepped(W, gradient(perturbed_at(W, along)))


def allowed_perturbed(case):
    along = case.w.grad.tolist()
    with case.optimizer.perturbed():
        assert case.w.grad is None
        assert case.weights == close(perturbed_at(W, along))
        case.evaluate()
    assert case.weights == W
    case.optimizer.step()
    return stepped(W, gradient(perturbed_at(W, along)))


def allowed_step_closure(case):
    case.calls = 0
    if case.name == "ready":
        # The base step, and it clears nothing: the closure's gradient comes on top of the one that is there.
        loss = case.act("step_closure")
        assert case.calls == 1 and loss.item() == close(7.1666666666667)
        return stepped(W, [GS[0] + G[0], GS[1] + G[1]])
    case.optimizer.zero_grad()
    loss = case.act("step_closure")
    assert case.calls == 2 and loss.item() == close(7.1666666666667)
    return STEPPED


def allowed_end(move):
    def act(case):
        case.act(move)
        assert case.weights == close(STEPPED)
        return STEPPED

    return act


def allowed_restore(case):
    case.act("restore")
    assert_same_bits([case.w], [parameter(START)])
    # The step is given up: what began in this situation needs a new first pass.
    with pytest.raises(RuntimeError):
        case.optimizer.second_step()
    case.optimizer.zero_grad()
    case.optimizer.step(case.evaluate)
    return STEPPED


def finish(case):
    """Ends the step that ``case`` is in; the weights to expect then."""
    if case.name == "clean":
        case.optimizer.zero_grad()
        case.optimizer.step(case.evaluate)
    elif case.name == "ready":
        case.optimizer.step()
    return STEPPED


def allowed_state_dict(case):
    saved = case.act("state_dict")
    assert saved["state"] == {}
    assert case.weights == W
    return finish(case)


def allowed_load_state_dict(case):
    case.act("load_state_dict")
    assert case.weights == W
    finish(case)
    # The loaded buffer (10, 20) and learning rate 0.2.
    return [W[0] - 0.2 * (9 + GS[0]), W[1] - 0.2 * (18 + GS[1])]


def allowed_zero_grad(case):
    before = snapshot([case.w])
    case.act("zero_grad")
    assert case.w.grad is None
    assert_same_bits([case.w], before)
    if case.name == "clean":
        return finish(case)
    # Without a second gradient the step is empty, and the weights are exactly clean.
    if case.name == "perturbed":
        case.optimizer.second_step()
    elif case.name == "ready":
        case.optimizer.step()
    return W


def allowed_add_param_group(case):
    case.act("add_param_group")
    assert [g["rho"] for g in case.optimizer.param_groups] == [RHO, 0.2]
    added = case.optimizer.param_groups[1]["params"][0]
    expected = finish(case)
    assert added.tolist() == [5.0]
    return expected


def allowed_release_buffers(case):
    case.act("release_buffers")
    assert case.optimizer.buffer_bytes == 0
    return finish(case)


OUTCOMES = {
    "first_step": allowed_first_step,
    "second_step": allowed_end("second_step"),
    "step": allowed_end("step"),
    "step_closure": allowed_step_closure,
    "perturbed": allowed_perturbed,
    "restore": allowed_restore,
    "state_dict": allowed_state_dict,
    "load_state_dict": allowed_load_state_dict,
    "zero_grad": allowed_zero_grad,
    "add_param_group": allowed_add_param_group,
    "release_buffers": allowed_release_buffers,
}


@pytest.mark.parametrize(("move", "situation"), SOUND, ids=lambda value: value)
def test_allowed_moves_give_the_right_weights(backend, move, situation):
    case = Situation(situation, backend)
    expected = []
    case.run(lambda case: expected.append(OUTCOMES[move](case)))
    assert case.weights == close(expected[0])
    if expected[0] == W:
        assert_same_bits([case.w], [parameter(START)])
    # And the machine is ready for the next step.
    assert case.optimizer._control.state is State.CLEAN
    case.optimizer.zero_grad()
    here = case.weights
    buffer = [0.0, 0.0]
    if "momentum_buffer" in case.optimizer.state.get(case.w, {}):
        buffer = case.optimizer.state[case.w]["momentum_buffer"].tolist()
    case.optimizer.step(case.evaluate)
    direction = [MOMENTUM * b + g for b, g in zip(buffer, gradient(perturbed_at(here, gradient(here))), strict=True)]
    lr = case.optimizer.param_groups[0]["lr"]
    assert case.weights == close([here[0] - lr * direction[0], here[1] - lr * direction[1]])


def test_the_written_table_is_the_one_that_is_tested():
    """What micro-batches add to it is tested in test_micro_batch_moves.py."""
    states = {
        State.CLEAN: "clean",
        State.PERTURBED: "perturbed",
        State.INSIDE: "inside",
        State.READY: "ready",
    }
    assert set(TABLE) == set(Move) and set(states) | {State.ACCUMULATED, State.COMPLETE} == set(State)
    for move in set(Move) - {Move.MICRO_BATCH, Move.SET_NUM_MICRO_BATCHES}:
        row = {states[state] for state in states if TABLE[move][state] is None}
        assert row == ALLOWED[move.name.lower()] - {"closure"}


@pytest.mark.parametrize("action", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("situation", ["perturbed", "inside", "closure"])
def test_copies_of_a_perturbed_optimizer_are_refused(fast_backend, situation, action):
    case = Situation(situation, fast_backend)

    def attempt(case):
        with pytest.raises(RuntimeError) as raised:
            action(case.optimizer)
        assert_one_sentence(raised.value, "closure" if situation == "closure" else "perturbed")

    case.run(attempt)
    assert case.weights == close(STEPPED)


def test_repeated_first_step_cannot_bake_the_perturbation_in(backend):
    case = Situation("clean", backend)
    before = snapshot([case.w])
    case.evaluate()
    case.optimizer.first_step()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"first_step\(\) is not possible while the weights are perturbed"):
            case.optimizer.first_step()
    case.optimizer.zero_grad()
    case.optimizer.second_step()
    assert_same_bits([case.w], before)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("move", ["first_step", "perturbed", "step", "step_closure", "restore", "state_dict"])
def test_moves_within_the_first_pass_of_a_closure_are_refused(backend, move, enabled):
    """A closure that takes steps by itself would be trained on twice, also where each of its steps is whole."""
    case = Situation("clean", backend)
    entered = []

    def closure():
        loss = case.evaluate()
        if not entered:
            entered.append(True)
            if move == "step_closure":
                case.optimizer.zero_grad()
            case.act(move)
        return loss

    case.optimizer.enabled = enabled
    before = snapshot([case.w])
    with pytest.raises(RuntimeError) as raised:
        case.optimizer.step(closure)
    assert_one_sentence(raised.value, "closure that only evaluates")
    assert_same_bits([case.w], before)
    assert case.optimizer._control.state is State.CLEAN and not case.optimizer.state
    case.optimizer.enabled = True
    case.optimizer.step(closure)
    assert case.weights == close(STEPPED)


def test_nested_steps_with_closures_are_refused_in_the_second_pass(backend):
    case = Situation("closure", backend)

    def attempt(case):
        with pytest.raises(RuntimeError) as raised:
            case.optimizer.step(backward_of(case.loss))
        assert_one_sentence(raised.value, "step(closure)")

    case.run(attempt)
    assert case.weights == close(STEPPED)
