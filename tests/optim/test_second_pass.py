"""What surrounds the second pass: ``model=`` keeps running statistics out of it, ``same_dropout`` draws its numbers again."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM
from sam_fused.optim.state import State
from tests.optim.helpers import assert_one_sentence, assert_same_bits, snapshot

FORMS = ("closure", "perturbed", "first_second", "micro-batches", "micro-batches by hand")


class Task:
    """Batch norm and dropout. Every pass notes what it drew."""

    def __init__(self, form, momentum=0.1, dropout=0.5, **kwargs):
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(6, momentum=momentum)
        self.dropout = torch.nn.Dropout(dropout)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), self.norm, self.dropout, torch.nn.Linear(6, 3))
        self.masks = []
        self.dropout.register_forward_hook(lambda module, args, out: self.masks.append((out == 0).clone()))
        self.form = form
        count = {"num_micro_batches": 2} if form.startswith("micro") else {}
        optimizer = MicroBatchSAM if count else SAM
        given = {"model": self.model, **kwargs}
        self.optimizer = optimizer(self.model.parameters(), SGD, lr=0.1, rho=0.5, **count, **given)
        self.x, self.y = torch.randn(12, 4), torch.randint(3, (12,))

    def evaluate(self, x=None, y=None):
        loss = F.cross_entropy(self.model(self.x if x is None else x), self.y if y is None else y)
        loss.backward()
        return loss

    def pieces(self):
        if not self.form.startswith("micro"):
            return [(self.x, self.y)]
        return list(zip(self.x.chunk(2), self.y.chunk(2), strict=True))

    def step(self, second=None):
        """``second`` takes the place of the second pass."""
        second = second or self.evaluate
        optimizer = self.optimizer
        by_hand = "hand" in self.form or self.form in ("perturbed", "first_second")
        if not by_hand:
            calls = []

            def closure(*batch):
                calls.append(True)
                return (second if len(calls) % 2 == 0 else self.evaluate)(*batch)

            return optimizer.step(closure, *((self.x, self.y) if self.form == "micro-batches" else ()))
        for x, y in self.pieces():
            optimizer.zero_grad()
            if optimizer._control.same_dropout:
                optimizer.remember_randomness()
            self.evaluate(x, y)
            if self.form == "first_second":
                optimizer.first_step(zero_grad=True)
                second(x, y)
                return optimizer.second_step()
            block = optimizer.micro_batch() if "micro" in self.form else optimizer.perturbed()
            with block:
                second(x, y)
        return optimizer.step()

    def statistics(self):
        return [self.norm.running_mean.clone(), self.norm.running_var.clone(), self.norm.num_batches_tracked.clone()]


def of_the_first_passes(task, steps=1):
    """What the statistics are if only first passes are seen, at the weights that they are run at."""
    other = torch.nn.BatchNorm1d(6, momentum=task.norm.momentum)
    linear = task.model[0]
    with torch.no_grad():
        for _ in range(steps):
            for x, _ in task.pieces():
                other(linear(x))
    return [other.running_mean, other.running_var, other.num_batches_tracked]


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("form", FORMS)
def test_running_statistics_see_the_first_passes_alone(form, momentum):
    task = Task(form, momentum)
    wanted = of_the_first_passes(task)
    addresses = [buffer.data_ptr() for buffer in task.norm.buffers()]
    task.step()
    torch.testing.assert_close(task.statistics(), wanted)
    assert int(task.norm.num_batches_tracked) == len(task.pieces())
    assert [buffer.data_ptr() for buffer in task.norm.buffers()] == addresses
    without = Task(form, momentum, model=None)
    without.step()
    assert int(without.norm.num_batches_tracked) == 2 * len(task.pieces())


@pytest.mark.parametrize("form", FORMS)
def test_statistics_after_an_exception_in_the_second_pass(form):
    task = Task(form)
    first = task.pieces()[0][0]
    other = torch.nn.BatchNorm1d(6)
    with torch.no_grad():
        other(task.model[0](first))
    before = snapshot(task.model.parameters())

    def fail(*batch):
        task.evaluate(*batch)
        raise KeyError

    with pytest.raises(KeyError):
        task.step(fail)
    if form == "first_second":
        task.optimizer.restore()
    assert_same_bits(task.model.parameters(), before)
    torch.testing.assert_close(task.statistics(), [other.running_mean, other.running_var, other.num_batches_tracked])
    assert task.optimizer._control.state is State.CLEAN


@pytest.mark.parametrize("form", FORMS)
def test_switched_off_every_pass_counts(form):
    task = Task(form)
    task.optimizer.enabled = False
    task.step()
    passes = 1 if form in ("closure", "micro-batches") else 2
    assert int(task.norm.num_batches_tracked) == passes * len(task.pieces())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_masks_in_both_passes(form):
    task = Task(form, same_dropout=True)
    task.step()
    pairs = list(zip(task.masks[::2], task.masks[1::2], strict=True))
    assert len(pairs) == len(task.pieces())
    # Units that are 0 in one and not in the other would be another mask; what batch norm gives is never exactly 0.
    assert all(torch.equal(first, second) for first, second in pairs)
    assert len(pairs) == 1 or not torch.equal(pairs[0][0], pairs[1][0])
    without = Task(form)
    without.step()
    assert not torch.equal(without.masks[0], without.masks[1])


@pytest.mark.parametrize("form", FORMS)
def test_random_numbers_go_on_as_if_there_had_been_one_pass(form):
    task = Task(form, same_dropout=True)
    torch.manual_seed(7)
    task.step()
    after = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():
        for x, _ in task.pieces():
            task.model(x)
    assert torch.equal(torch.rand(3), after)


def test_by_hand_the_first_pass_has_to_be_announced():
    task = Task("perturbed", same_dropout=True)
    before, random = snapshot(task.model.parameters()), torch.get_rng_state()
    task.evaluate()
    state = torch.get_rng_state()
    for enter in (task.optimizer.first_step, task.optimizer.perturbed().__enter__):
        with pytest.raises(RuntimeError) as raised:
            enter()
        assert_one_sentence(raised.value, "remember_randomness()")
        assert_same_bits(task.model.parameters(), before)
        assert torch.equal(torch.get_rng_state(), state)
    task.optimizer.zero_grad()
    task.optimizer.remember_randomness()
    task.evaluate()
    with task.optimizer.perturbed():
        task.evaluate()
    task.optimizer.step()
    assert not torch.equal(random, torch.get_rng_state())
    # Each step anew: the last step's numbers would be a mask that no first pass has drawn.
    task.optimizer.zero_grad()
    task.evaluate()
    with pytest.raises(RuntimeError, match=r"remember_randomness\(\)"):
        task.optimizer.first_step()


@pytest.mark.parametrize("how", ["given up", "switched off"])
def test_random_numbers_of_a_step_that_was_not_taken_are_not_the_next_one_s(how):
    task = Task("perturbed", same_dropout=True)
    task.optimizer.remember_randomness()
    task.evaluate()
    if how == "given up":
        task.optimizer.restore()
    else:
        task.optimizer.enabled = False
        with task.optimizer.perturbed():
            task.evaluate()
        task.optimizer.step()
        task.optimizer.enabled = True
    task.optimizer.zero_grad()
    task.evaluate()
    with pytest.raises(RuntimeError, match=r"remember_randomness\(\)"):
        task.optimizer.first_step()


def test_a_first_pass_done_by_hand_before_the_closure():
    task = Task("closure", same_dropout=True)
    task.optimizer.remember_randomness()
    task.evaluate()
    task.optimizer.step(task.evaluate, first_pass_done=True)
    assert torch.equal(*task.masks)


def test_copies_keep_the_model_of_their_own():
    task = Task("closure")
    model, optimizer = copy.deepcopy((task.model, task.optimizer))
    assert optimizer._control.model is model and model is not task.model
    dropped = pickle.dumps((torch.nn.Linear(2, 2), SAM(torch.nn.Linear(2, 2).parameters(), SGD, lr=0.1, same_dropout=True)))
    assert pickle.loads(dropped)[1]._control.same_dropout is True
