"""A captured step: replayed over new numbers it gives the eager step's bits."""

import pytest
import torch

from tests.gpu.problems import BASES, DEVICE, Problem

REPLAYS = 5


def captured(problem, steps_before=2):
    """A graph of one step. The steps before it load modules, compile, and build tables, which a capture cannot."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps_before):
            problem.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.step()
    return graph


def assert_same(captured_problem, eager):
    for index, (ours, wanted) in enumerate(zip(captured_problem.state(), eager.state(), strict=True)):
        assert torch.equal(ours, wanted), f"tensor {index} of the state differs in {int((ours != wanted).sum())} elements"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_replays_are_the_eager_steps_bit_for_bit(kernels, base, dtype):
    replayed, eager = (Problem(base, kernels, dtype=dtype) for _ in range(2))
    for _ in range(2):
        eager.step()
    graph = captured(replayed)
    assert_same(replayed, eager)  # capturing runs nothing
    start = [param.detach().clone() for param in replayed.params]
    for number in range(REPLAYS):
        for problem in (replayed, eager):
            problem.renew(number + 1)
        graph.replay()
        eager.step()
        assert_same(replayed, eager)
    assert not any(torch.equal(a, b) for a, b in zip(start, replayed.params, strict=True) if a.numel())


@pytest.mark.parametrize("base", BASES)
def test_eager_steps_between_replays(kernels, base):
    """The graph has addresses of its own: tables that eager steps replace meanwhile are not its."""
    mixed, eager = (Problem(base, kernels) for _ in range(2))
    for _ in range(2):
        eager.step()
    graph = captured(mixed)
    static = mixed.first, mixed.second
    for number in range(12):
        mixed.first, mixed.second = static
        for problem in (mixed, eager):
            problem.renew(number + 1)
        eager.step()
        if number % 2:
            graph.replay()
            continue
        mixed.first, mixed.second = ([grad.clone() for grad in grads] for grads in static)
        mixed.step()
    assert_same(mixed, eager)


def test_zero_and_infinite_gradients_in_a_replay(kernels):
    """Whether anything moves is decided on the device, so a replay may decide otherwise than the capture."""
    replayed, eager = (Problem("SGD", kernels) for _ in range(2))
    for _ in range(2):
        eager.step()
    graph = captured(replayed)
    for value in (0.0, float("inf"), 1.0):
        for problem in (replayed, eager):
            problem.first[0].fill_(value)
            for grad in problem.first[1:]:
                grad.fill_(0.0)
        graph.replay()
        eager.step()
        assert_same(replayed, eager)
    assert all(bool(param.isfinite().all()) for param in replayed.params)


def test_a_skipped_step_in_a_replay(kernels):
    """found_inf changes between replays: Adam's step count advances only with a step that is taken."""
    problem = Problem("AdamW", kernels)
    scale, found_inf = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    plain = problem.step

    def scaled():
        problem.optimizer.grad_scale, problem.optimizer.found_inf = scale, found_inf
        plain("perturbed")
        del problem.optimizer.grad_scale, problem.optimizer.found_inf

    problem.step = scaled
    graph = captured(problem)
    for found, counted in ((0.0, 3.0), (1.0, 3.0), (0.0, 4.0)):
        before = [param.detach().clone() for param in problem.params]
        found_inf.fill_(found)
        graph.replay()
        moved = [not torch.equal(a, b) for a, b in zip(before, problem.params, strict=True) if a.numel()]
        assert moved == [not found] * len(moved)
        assert {float(problem.optimizer.state[param]["step"]) for param in problem.params} == {counted}


def test_capturable_adam_is_served_and_captured(kernels):
    """torch's flag for Adam in a graph: our kernels read and advance the step count on the device anyway."""
    ours, eager = Problem("AdamW", kernels, capturable=True), Problem("AdamW", kernels)
    for _ in range(2):
        eager.step()
    graph = captured(ours)
    graph.replay()
    eager.step()
    assert_same(ours, eager)


def test_a_first_step_of_momentum_is_not_captured_silently_wrong(kernels):
    """The buffer's creation, replayed, would drop the momentum: refused, or the replays are the eager steps."""
    problem, eager = Problem("SGD", kernels), Problem("SGD", kernels)
    problem.optimizer.enabled = eager.optimizer.enabled = False  # a base step alone: modules are loaded, no buffer is there
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            problem.give(problem.second)
            problem.optimizer.step()
    except RuntimeError as error:
        assert "capture" in str(error)
        return
    for _ in range(3):
        graph.replay()
        eager.give(eager.second)
        eager.optimizer.step()
    assert_same(problem, eager)
