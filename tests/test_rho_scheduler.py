"""How large rho is over a run: the usual schedules, what they follow, what they are loaded with, what is none."""

import math

import numpy as np
import pytest
import torch
from torch.optim import SGD, lr_scheduler

from sam_fused import SAM, RhoScheduler
from tests.optim.helpers import assert_one_sentence, parameter

pytestmark = pytest.mark.cpu_only


def make(**kwargs):
    return SAM([parameter([1.0, 2.0])], SGD, **{"lr": 0.1, **kwargs})


def rhos(scheduler, count):
    found = []
    for _ in range(count):
        found.append(scheduler.optimizer.param_groups[0]["rho"])
        scheduler.step()
    return found


def test_rho_over_a_run():
    rho = 0.5
    close = lambda values: pytest.approx(values, abs=1e-12)  # noqa: E731
    assert rhos(RhoScheduler.constant(make(rho=rho)), 3) == [rho] * 3
    assert rhos(RhoScheduler.constant(make(rho=rho), warmup=4), 6) == close([0, 0.125, 0.25, 0.375, 0.5, 0.5])
    assert rhos(RhoScheduler.linear(make(rho=rho), total=4, final=0.2), 6) == close([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    half = [0.5 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    assert rhos(RhoScheduler.cosine(make(rho=rho), total=4), 6) == close([*half, 0.0])
    warmed = RhoScheduler.cosine(make(rho=rho), total=6, warmup=2, final=0.5)
    assert rhos(warmed, 8) == close([0, 0.25, *(0.25 + h / 2 for h in half), 0.25])
    assert rhos(RhoScheduler(make(rho=rho), lambda t: 2.0**-t), 3) == [0.5, 0.25, 0.125]


def test_rho_follows_the_learning_rate_of_its_group():
    a, b = parameter([1.0]), parameter([2.0])
    optimizer = SAM([{"params": [a]}, {"params": [b], "lr": 0.01, "rho": 0.2}], SGD, lr=0.1, rho=0.05)
    scheduler = RhoScheduler.proportional_to_lr(optimizer)
    lrs = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(7):
        optimizer.step(lambda: (a * b).sum().backward())
        lrs.step()
        scheduler.step()
        first, second = optimizer.param_groups
        assert first["rho"] == pytest.approx(0.05 * first["lr"] / 0.1, rel=1e-12)
        assert second["rho"] == pytest.approx(0.2 * second["lr"] / 0.01, rel=1e-12)
    assert first["rho"] < 0.02


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize(
    ("make_scheduler", "rhos"),
    [
        (lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=2), [0.025, 0.0375, 0.05]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: min(t / 2, 1.0)), [0.0, 0.025, 0.05]),
    ],
)
def test_rho_follows_a_warm_up_of_the_learning_rate(scheduler_first, make_scheduler, rhos):
    """rho_0 belongs to the learning rate that the warm-up leads to, not to the one that it begins with."""
    optimizer = make(rho=0.05)
    lrs = make_scheduler(optimizer) if scheduler_first else None
    scheduler = RhoScheduler.proportional_to_lr(optimizer)
    lrs = lrs or make_scheduler(optimizer)
    seen = [optimizer.param_groups[0]["rho"]] if scheduler_first else [rhos[0]]
    for _ in range(2):
        optimizer.step(lambda: optimizer.param_groups[0]["params"][0].sum().backward())
        lrs.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["rho"])
    assert seen == pytest.approx(rhos, rel=1e-12)


def test_rho_follows_a_cycle_from_its_largest_learning_rate():
    optimizer = make(rho=0.05)
    lrs = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)
    scheduler = RhoScheduler.proportional_to_lr(optimizer)
    seen = []
    for _ in range(9):
        seen.append(optimizer.param_groups[0]["rho"])
        optimizer.step(lambda: optimizer.param_groups[0]["params"][0].sum().backward())
        lrs.step()
        scheduler.step()
    assert max(seen) == pytest.approx(0.05, rel=1e-2) and seen[0] == pytest.approx(0.05 / 25)


def test_one_tensor_for_groups_whose_rhos_part_is_refused():
    rho = torch.tensor(0.05)
    optimizer = SAM([{"params": [parameter([1.0])]}, {"params": [parameter([2.0])], "lr": 0.2}], SGD, lr=0.1, rho=rho)
    scheduler = RhoScheduler.proportional_to_lr(optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ValueError) as raised:
        scheduler.step()
    assert_one_sentence(raised.value, "one tensor", "0.025")
    assert rho.item() == pytest.approx(0.05) and scheduler.position == 0
    optimizer.param_groups[1]["lr"] = 0.1
    scheduler.step()
    assert rho.item() == pytest.approx(0.025)


def test_groups_that_are_added_keep_the_rho_that_they_bring():
    optimizer = make(rho=0.5)
    schedulers = RhoScheduler.linear(optimizer, total=2), RhoScheduler.proportional_to_lr(optimizer)
    optimizer.add_param_group({"params": [parameter([1.0])], "rho": 0.3})
    for scheduler in schedulers:
        scheduler.step()
        assert optimizer.param_groups[1]["rho"] == 0.3


def test_rho_of_a_base_with_a_rho_of_its_own():
    optimizer = SAM([parameter([1.0])], torch.optim.Adadelta, sam_rho=0.5)
    RhoScheduler.linear(optimizer, total=2).step()
    assert optimizer.param_groups[0]["sam_rho"] == 0.25 and optimizer.param_groups[0]["rho"] == 0.9


def test_a_factor_that_is_none_leaves_everything_as_it_was():
    scheduler = RhoScheduler(make(rho=0.5), lambda t: 1.0 - t)
    scheduler.step()
    for _ in range(2):
        with pytest.raises(ValueError, match="position 2"):
            scheduler.step()
        assert scheduler.position == 1 and scheduler.optimizer.param_groups[0]["rho"] == 0.0


def test_a_rho_that_is_a_tensor_is_written_in_place():
    rho = torch.tensor(0.5, requires_grad=True)
    optimizer = make(rho=rho)
    RhoScheduler.linear(optimizer, total=2).step()
    assert optimizer.param_groups[0]["rho"] is rho and rho.item() == 0.25


def test_the_perturbation_has_the_scheduled_length():
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, lr=0.0, rho=0.5)
    scheduler = RhoScheduler.linear(optimizer, total=2)
    lengths = []
    for _ in range(3):
        (0.5 * (w**2).sum()).backward()
        before = w.detach().clone()
        with optimizer.perturbed():
            lengths.append((w.detach() - before).norm().item())
            (0.5 * (w**2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert lengths == pytest.approx([0.5, 0.25, 0.0], abs=1e-12)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


def test_a_loaded_schedule_has_the_saved_rho_and_learning_rate_to_begin_with():
    """Not those of the optimizer that it is loaded into: a run may be resumed with other arguments."""
    saved = []
    for scheduler in (RhoScheduler.linear(make(rho=0.5), total=4), RhoScheduler.proportional_to_lr(make(rho=0.5, lr=0.1))):
        scheduler.step()
        saved.append(scheduler.state_dict())
    optimizer = make(rho=7.0)
    linear = RhoScheduler.linear(optimizer, total=4)
    linear.load_state_dict(saved[0])
    assert optimizer.param_groups[0]["rho"] == 0.5 * 0.75 and linear.position == 1
    optimizer = make(rho=7.0, lr=0.3)
    proportional = RhoScheduler.proportional_to_lr(optimizer)
    proportional.load_state_dict(saved[1])
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.5 * 0.3 / 0.1)
    optimizer.param_groups[0]["lr"] = 0.05
    proportional.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.25)


def test_a_state_that_cannot_be_loaded_changes_nothing():
    scheduler = RhoScheduler(make(rho=0.5), lambda t: 1.0 - t)
    proportional = RhoScheduler.proportional_to_lr(make(rho=0.5))
    two_groups = {"position": 1, "base_rhos": [0.1, 0.2], "base_lrs": [1.0, 1.0]}
    for loaded, state, word in (
        (scheduler, {"position": 7, "base_rhos": [0.4]}, "position 7"),
        (scheduler, two_groups, "one of 2"),
        (proportional, two_groups, "one of 2"),
    ):
        before = loaded.state_dict()
        with pytest.raises(ValueError) as raised:
            loaded.load_state_dict(state)
        assert_one_sentence(raised.value, word)
        assert loaded.state_dict() == before and loaded.optimizer.param_groups[0]["rho"] == 0.5


# ---- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "word"),
    [
        (lambda o: RhoScheduler(o, lambda t: -1.0), "factor"),
        (lambda o: RhoScheduler(o, lambda t: math.nan), "factor"),
        (lambda o: RhoScheduler(o, lambda t: "a"), "'a' at position 0"),
        (lambda o: RhoScheduler.cosine(o, total=4, final="0.1"), "final"),
        (lambda o: RhoScheduler.linear(o, total=4, final=-0.5), "final"),
        (lambda o: RhoScheduler.cosine(o, total=4, final=math.inf), "final"),
        (lambda o: RhoScheduler.cosine(o, total=0), "total"),
        (lambda o: RhoScheduler.cosine(o, total=4, warmup=4), "warmup"),
        (lambda o: RhoScheduler.constant(o, warmup=-1), "warmup"),
        (lambda o: o.param_groups[0].update(lr=0.0) or RhoScheduler.proportional_to_lr(o), "learning rates above 0"),
    ],
)
def test_rho_schedules_that_mean_nothing(attempt, word):
    with pytest.raises(ValueError) as raised:
        attempt(make())
    assert_one_sentence(raised.value, word)


def test_numbers_of_numpys_stay_out_of_checkpoints():
    """``torch.load(weights_only=True)`` refuses them."""
    optimizer = make(rho=0.5)
    RhoScheduler(optimizer, lambda t: np.float64(0.5) ** t).step()
    assert type(optimizer.param_groups[0]["rho"]) is float and optimizer.param_groups[0]["rho"] == 0.25


def test_a_function_that_fails_leaves_everything_as_it_was():
    scheduler = RhoScheduler(make(rho=0.5), lambda t: [1.0, 0.5][t])
    scheduler.step()
    for _ in range(2):
        with pytest.raises(IndexError):
            scheduler.step()
        assert scheduler.position == 1 and scheduler.optimizer.param_groups[0]["rho"] == 0.25


@pytest.mark.parametrize("lrs", [[0.0], [], [0.1, 0.1], None])
def test_learning_rates_that_cannot_be_divided_by_are_refused(lrs):
    scheduler = RhoScheduler.proportional_to_lr(make(rho=0.5))
    before = scheduler.state_dict()
    with pytest.raises(ValueError) as raised:
        scheduler.load_state_dict({"position": 1, "base_rhos": [0.05], "base_lrs": lrs})
    assert_one_sentence(raised.value, "base_lrs")
    assert scheduler.state_dict() == before and scheduler.optimizer.param_groups[0]["rho"] == 0.5


def test_a_factor_that_is_no_function_is_refused():
    with pytest.raises(TypeError) as raised:
        RhoScheduler(make(), 0.5)
    assert_one_sentence(raised.value, "factor", "float")
