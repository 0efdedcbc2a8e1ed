"""Batches, closures, weights and counts that micro-batches cannot be made of: one sentence each, and weights that are clean."""

import pytest
import torch
from torch.optim import SGD, AdamW

from sam_fused import MicroBatchSAM
from sam_fused.optim.state import State
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    parameter,
    snapshot,
)
from tests.optim.test_micro_batch import make, take


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
