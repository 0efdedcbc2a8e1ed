"""GradScaler on a card: overflows in pass 1, in pass 2, in both, without the host looking."""

import pytest
import torch

from tests.gpu.problems import DEVICE, Problem

BASES = ("SGD", "AdamW")
SCALE = 1024.0


def scaled_step(problem, scaler, overflow):
    for number, grads in ((1, problem.first), (2, problem.second)):
        given = [grad * SCALE for grad in grads]
        if number in overflow:
            given[0][3] = float("inf")
        problem.give(given)
        if number == 1:
            problem.optimizer.first_step()
    scaler.step(problem.optimizer)
    scaler.update()


def scaler():
    amp = torch.amp.GradScaler("cuda", init_scale=SCALE, growth_interval=1000)
    amp.scale(torch.ones((), device=DEVICE))  # its scale is made when first used
    return amp


def copies(problem):
    return [tensor.detach().clone() for tensor in problem.state()]


@pytest.mark.parametrize("base", BASES)
def test_without_an_overflow_the_scale_changes_nothing(kernels, base):
    """A power of two, so no bit but perturb_eps's."""
    problem, plain = Problem(base, kernels, perturb_eps=0.0), Problem(base, kernels, perturb_eps=0.0)
    amp = scaler()
    for _ in range(3):
        scaled_step(problem, amp, ())
        plain.step()
    assert amp.get_scale() == SCALE
    assert all(torch.equal(a, b) for a, b in zip(problem.state(), plain.state(), strict=True))


@pytest.mark.parametrize("base", BASES)
def test_an_overflow_in_the_first_pass_makes_a_base_step(kernels, base):
    problem, plain = Problem(base, kernels), Problem(base, kernels)
    plain.optimizer.enabled = False
    amp = scaler()
    scaled_step(problem, amp, (1,))
    plain.give(plain.second)
    plain.optimizer.step()
    assert amp.get_scale() == SCALE
    assert all(torch.equal(a, b) for a, b in zip(problem.state(), plain.state(), strict=True))


@pytest.mark.parametrize("overflow", [(2,), (1, 2)], ids=["second", "both"])
@pytest.mark.parametrize("base", BASES)
def test_an_overflow_in_the_second_pass_changes_nothing(kernels, base, overflow):
    problem, plain = Problem(base, kernels, perturb_eps=0.0), Problem(base, kernels, perturb_eps=0.0)
    amp = scaler()
    for instance in (problem, plain):
        scaled_step(instance, scaler(), ())
    before = copies(problem)
    scaled_step(problem, amp, overflow)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.state(), strict=True))
    assert amp.get_scale() == SCALE / 2
    plain.step()
    problem.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.state(), plain.state(), strict=True))


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_skipped_first_step_is_still_the_first(kernels, dampening):
    """The momentum buffer is created by the first step that is taken, whichever that was."""
    problem, plain = (Problem("SGD", kernels, dampening=dampening) for _ in range(2))
    scaled_step(problem, scaler(), (2,))
    for _ in range(2):
        problem.step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.state(), plain.state(), strict=True))
