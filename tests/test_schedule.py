"""When SAM is on over a run: positions, what it costs while off, momentum at the switch, checkpoints."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_fused import SAM, MicroBatchSAM, RhoScheduler, SwitchSchedule
from sam_fused.ops.prepared import TensorSet
from tests.optim.helpers import Regression, assert_one_sentence, assert_same_bits, assert_same_state, parameter, snapshot_state

pytestmark = pytest.mark.cpu_only


def make(**kwargs):
    return SAM([parameter([1.0, 2.0])], SGD, **{"lr": 0.1, **kwargs})


def positions_on(schedule, count):
    found = []
    for _ in range(count):
        found.append(schedule.optimizer.enabled)
        schedule.step()
    return [position for position, on in enumerate(found) if on]


# ---- when SAM is on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({}, range(12)),
        ({"start": 5}, range(5, 12)),
        ({"start": 0.75, "total": 12}, range(9, 12)),
        ({"start": 0.7, "total": 12}, range(9, 12)),  # 8.4: a fraction is not reached before its position
        ({"start": 2, "stop": 5}, range(2, 5)),
        ({"stop": 0.25, "total": 12}, range(3)),
        ({"every": 5}, (0, 5, 10)),
        ({"start": 3, "every": 4}, (3, 7, 11)),
        ({"start": 3, "stop": 11, "every": 4}, (3, 7)),
        ({"start": 1.0, "total": 12}, ()),
        ({"start": 12, "total": 12}, ()),
        ({"start": np.int64(1)}, range(1, 12)),  # a position, not the fraction 1.0
        ({"start": np.int64(2), "stop": np.int64(8), "every": np.int64(3), "total": np.int64(12)}, (2, 5)),
    ],
)
def test_positions(options, on):
    assert positions_on(SwitchSchedule(make(), **options), 12) == list(on)


def test_a_fraction_is_exact_where_its_product_is_not():
    assert 0.55 * 100 > 55
    for total in (100, 10**8, 10**10):
        starts = [SwitchSchedule(make(), start=percent / 100, total=total).start for percent in range(100)]
        assert starts == [percent * total // 100 for percent in range(100)]


class Task(Regression):
    """A regression whose closure says how often it was called, and at which weights."""

    def __init__(self, **kwargs):
        super().__init__()
        self.evaluations = 0
        self.optimizer = SAM(self.params, SGD, **{"lr": 0.1, "momentum": 0.9, "rho": 0.1, **kwargs})

    def closure(self):
        self.evaluations += 1
        return self.evaluate()


def test_while_off_there_is_one_evaluation_and_nothing_but_the_base_step(monkeypatch):
    """No norm, no perturbation, no restore, no backup: the passes over memory are the base optimizer's."""
    seen = []
    for name in ("grad_norm", "perturb_", "restore_", "restore_accumulate_"):
        own = getattr(TensorSet, name)
        monkeypatch.setattr(TensorSet, name, lambda self, *a, name=name, own=own, **k: seen.append(name) or own(self, *a, **k))
    task = Task()
    switch = SwitchSchedule(task.optimizer, start=2)
    for _ in range(2):
        task.optimizer.step(task.closure)
        switch.step()
    assert task.evaluations == 2 and seen == [] and task.optimizer.buffer_bytes == 0
    task.optimizer.step(task.closure)
    assert task.evaluations == 4 and seen == ["grad_norm", "perturb_"] and task.optimizer.buffer_bytes > 0


class Passes(TorchDispatchMode):
    """The operations that meet a tensor of the parameters' size."""

    SIZE = 1000

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(isinstance(leaf, torch.Tensor) and leaf.numel() >= self.SIZE for leaf in tree_leaves((args, kwargs))):
            self.seen.append(str(operation).split(".")[1])
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "form", ["closure", "ascent closure", "first pass done", "by hand", "perturbed", "first_step", "micro"]
)
@pytest.mark.parametrize(
    ("base", "passes"),
    [
        ((SGD, {"momentum": 0.9}), ["restore_sgd_"]),  # 5 accesses: the weights are their own backups
        ((AdamW, {}), ["restore_adamw_"]),
        ((RMSprop, {}), None),  # the base optimizer's own
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_while_off_the_only_passes_over_memory_are_the_base_steps(form, base, passes):
    """Counted by torch: no norm, no copy, no restore. The closure hands gradients over and makes none."""
    (cls, options), w, held = base, torch.nn.Parameter(torch.ones(Passes.SIZE)), torch.ones(Passes.SIZE)
    optimizer = MicroBatchSAM([w], cls, num_micro_batches=1, lr=0.1, same_dropout=True, **options)
    SwitchSchedule(optimizer, start=100)
    calls = []

    def closure(*_):
        calls.append(1)
        w.grad = held
        return 1.0

    def step():
        if form in ("closure", "ascent closure"):
            optimizer.step(closure, **({"ascent_closure": closure} if form != "closure" else {}))
            return
        if form == "micro":
            optimizer.step(closure, torch.ones(4))
            return
        optimizer.zero_grad()
        closure()
        if form == "first pass done":
            optimizer.step(closure, first_pass_done=True)
        elif form == "by hand":
            optimizer.step()
        elif form == "perturbed":
            with optimizer.perturbed():
                w.grad = held
            optimizer.step()
        else:
            optimizer.first_step(zero_grad=True)
            w.grad = held
            optimizer.second_step()

    if passes is None:
        alone = cls([torch.nn.Parameter(torch.ones(Passes.SIZE))], lr=0.1, **options)
        alone.param_groups[0]["params"][0].grad = held
        alone.step()
        with Passes() as counted:
            alone.step()
        passes = counted.seen
    step()  # creates the base optimizer's state
    calls.clear()
    with Passes() as counted:
        step()
    assert counted.seen == passes and len(calls) == 1 and optimizer.buffer_bytes == 0


def test_while_off_several_micro_batches_are_accumulated_and_nothing_more():
    """One call for each, so that the memory for activations stays a micro-batch's, and the sum of their gradients."""
    w, held, calls = torch.nn.Parameter(torch.ones(Passes.SIZE)), torch.ones(Passes.SIZE), []
    optimizer = MicroBatchSAM([w], SGD, num_micro_batches=4, lr=0.1)
    optimizer.enabled = False

    def closure(x):
        calls.append(len(x))
        w.grad = held
        return 1.0

    optimizer.step(closure, torch.ones(8))
    calls.clear()
    with Passes() as counted:
        optimizer.step(closure, torch.ones(8))
    assert calls == [2] * 4 and counted.seen == ["restore_accumulate_"] * 3 + ["restore_sgd_"]


@pytest.mark.parametrize("cls", [SAM, MicroBatchSAM])
def test_while_off_a_first_pass_that_is_done_is_the_step_s_gradient(cls):
    """Not added to the closure's: L = w^2 / 2 at 1 with lr .1 steps to .9, and its closure is not called again."""
    w = parameter([1.0])
    optimizer = cls([w], SGD, lr=0.1, **({"num_micro_batches": 1} if cls is MicroBatchSAM else {}))
    calls = []

    def closure():
        calls.append(1)
        loss = 0.5 * (w * w).sum()
        loss.backward()
        return loss

    optimizer.enabled = False
    closure()
    assert optimizer.step(closure, first_pass_done=True) is None
    assert w.item() == pytest.approx(0.9, abs=1e-12) and len(calls) == 1
    optimizer.zero_grad()
    optimizer.enabled = True
    closure()
    optimizer.step(closure, first_pass_done=True)
    assert w.item() == pytest.approx(0.9 - 0.1 * 0.95, abs=1e-12) and len(calls) == 3


@pytest.mark.parametrize("form", ["closure", "by hand", "micro-batches"])
def test_late_sam_is_the_base_optimizer_and_then_sam(form):
    """Four steps of SGD, and bit for bit those of a SAM that is switched by hand."""
    ours, plain = Regression(), Regression()
    kwargs = {"lr": 0.05, "momentum": 0.9}
    micro = form == "micro-batches"

    def sam(case, base, **options):
        return MicroBatchSAM(case.params, base, num_micro_batches=2, **options) if micro else SAM(case.params, base, **options)

    def step(optimizer, case):
        def closure(x=case.x, y=case.y):
            loss = torch.nn.functional.mse_loss(case.model(x), y)
            loss.backward()
            return loss

        if form == "by hand":
            optimizer.zero_grad()
            closure()
            if optimizer.enabled:
                with optimizer.perturbed():
                    closure()
            optimizer.step()
        else:
            optimizer.step(closure, *((case.x, case.y) if micro else ()))

    late = sam(ours, SGD, rho=0.1, **kwargs)
    switch = SwitchSchedule(late, start=0.5, total=8)
    reference = sam(plain, SGD, rho=0.1, **kwargs)
    for number in range(8):
        reference.enabled = number >= 4
        step(late, ours)
        step(reference, plain)
        switch.step()
    assert_same_bits(ours.params, plain.params)
    moved = Regression()
    base = SGD(moved.params, **kwargs)
    for _ in range(4):
        base.zero_grad()
        moved.evaluate()
        base.step()
    again = Regression()
    early = sam(again, SGD, rho=0.1, **kwargs)
    SwitchSchedule(early, start=100)
    for _ in range(4):
        step(early, again)
    torch.testing.assert_close([p.detach() for p in again.params], [p.detach() for p in moved.params], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_momentum_is_shared_or_starts_afresh_at_the_switch(base):
    options = {"momentum": 0.9} if base is SGD else {}
    found = {}
    for momentum in ("shared", "fresh"):
        case = Regression()
        optimizer = SAM(case.params, base, lr=0.01, **options)
        switch = SwitchSchedule(optimizer, start=3, every=2, momentum=momentum)
        for number in range(6):
            if number == 3:
                assert bool(optimizer.state) == (momentum == "shared")
            optimizer.step(case.evaluate)
            switch.step()
            assert number == 2 or optimizer.state  # at the switch alone, and not each time SAM is on again
        found[momentum] = [p.detach().clone() for p in case.params]
        case.params[0].grad = None
    assert not all(map(torch.equal, found["shared"], found["fresh"]))
    # Two optimizers over the same weights, as the authors have it.
    case = Regression()
    first, second = base(case.params, lr=0.01, **options), SAM(case.params, base, lr=0.01, **options)
    for number in range(6):
        if number < 3:
            first.zero_grad()
            case.evaluate()
            first.step()
            continue
        if number == 3:
            first.zero_grad()
        second.enabled = number in (3, 5)
        second.step(case.evaluate)
    torch.testing.assert_close([p.detach() for p in case.params], found["fresh"], rtol=1e-12, atol=1e-14)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SGD, Adam])
@pytest.mark.parametrize("cut", [2, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(base, cut):
    """Cut before the switch, at it, after it; rho and the learning rate are scheduled too."""

    def begin():
        case = Regression()
        options = {"momentum": 0.9} if base is SGD else {}
        optimizer = SAM(case.params, base, lr=0.05, rho=0.2, **options)
        schedules = (
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
            SwitchSchedule(optimizer, start=0.5, total=8, momentum="fresh"),
            RhoScheduler.cosine(optimizer, total=8, warmup=1),
            RhoScheduler.proportional_to_lr(make()),
        )
        return case, optimizer, schedules

    def train(case, optimizer, schedules, count):
        for _ in range(count):
            optimizer.step(case.evaluate)
            for schedule in schedules:
                schedule.step()

    whole = begin()
    train(*whole, 8)
    first = begin()
    train(*first, cut)
    saved = pickle.loads(pickle.dumps([part.state_dict() for part in (first[0].model, first[1], *first[2])]))
    second = begin()
    for part, state in zip((second[0].model, second[1], *second[2]), saved, strict=True):
        part.load_state_dict(state)
    second[1].zero_grad()
    train(*second, 8 - cut)
    assert_same_bits(second[0].params, whole[0].params)
    assert_same_state(snapshot_state(second[1]), snapshot_state(whole[1]))


def test_copies_of_a_run_go_on_by_themselves():
    optimizer = make(rho=0.5)
    run = optimizer, SwitchSchedule(optimizer, start=1), RhoScheduler.linear(optimizer, total=4)
    other, switch, rho = copy.deepcopy(run)
    switch.step()
    rho.step()
    assert (other.enabled, other.param_groups[0]["rho"]) == (True, 0.375)
    assert (optimizer.enabled, optimizer.param_groups[0]["rho"]) == (False, 0.5)


# ---- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"start": 5, "stop": 5}, "before the stop"),
        ({"start": 0.9, "stop": 0.5, "total": 10}, "before the stop"),
        ({"start": 20, "total": 10}, "within the run"),
        ({"start": 0.5}, "total"),
        ({"start": 1.5, "total": 10}, "fraction"),
        ({"start": -1}, "position"),
        ({"start": "late"}, "position"),
        ({"start": True}, "position"),
        ({"every": 0}, "every"),
        ({"total": 0}, "total"),
        ({"momentum": "old"}, "shared"),
    ],
)
def test_switches_that_mean_nothing(options, word):
    optimizer = make()
    optimizer.enabled = False
    with pytest.raises(ValueError) as raised:
        SwitchSchedule(optimizer, **options)
    assert_one_sentence(raised.value, word)
    assert optimizer.enabled is False


@pytest.mark.parametrize("state", [{"a": 1}, {"position": -1}, {"position": 2.5}, {"position": "5"}, {"position": True}, None])
def test_states_that_are_none(state):
    switch = SwitchSchedule(make(), start=3)
    rho = RhoScheduler.linear(make(rho=0.5), total=4)
    for schedule in (switch, rho):
        schedule.step()
        with pytest.raises(ValueError) as raised:
            schedule.load_state_dict(state)
        assert_one_sentence(raised.value, type(schedule).__name__, "position", "state_dict()")
        assert schedule.position == 1
    for rhos in (None, [-1.0], [math.nan], ["a"], 0.5):
        with pytest.raises(ValueError) as raised:
            rho.load_state_dict({"position": 2, "base_rhos": rhos})
        assert_one_sentence(raised.value, "base_rhos")
        assert rho.position == 1 and rho.optimizer.param_groups[0]["rho"] == 0.375


def test_schedules_say_where_they_are():
    optimizer = make(rho=0.5)
    switch, rho = SwitchSchedule(optimizer, start=0.5, stop=9, total=4), RhoScheduler.linear(optimizer, total=4)
    rho.step()
    assert repr(switch) == "SwitchSchedule(start=2, stop=9, every=1, momentum='shared'), off at 0"
    assert repr(rho) == "RhoScheduler: rho 0.375 at 1"
    assert repr(RhoScheduler.proportional_to_lr(optimizer)) == "ProportionalToLR: rho 0.375 at 0"


@pytest.mark.parametrize("schedule", [SwitchSchedule, RhoScheduler.constant, RhoScheduler.proportional_to_lr])
def test_other_optimizers_are_refused(schedule):
    with pytest.raises(TypeError) as raised:
        schedule(SGD([parameter([1.0])], lr=0.1))
    assert_one_sentence(raised.value, "SGD")
