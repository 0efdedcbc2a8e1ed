"""The host never waits, nothing is allocated once warm, and launches are few: counted, not timed."""

import math

import pytest
import torch

from benchmarks.gpu_measure import Device, launches
from tests.gpu.problems import BASES, DEVICE, FORMS, Problem

# Gradient addresses that a native launch has room for; Triton's travel in a table.
GRADIENTS_PER_LAUNCH = 3712


@pytest.fixture
def no_waiting():
    """torch raises at whatever would make the host wait. To be entered once everything is warm."""

    class Guard:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *exception):
            torch.cuda.set_sync_debug_mode("default")

    yield Guard()
    torch.cuda.set_sync_debug_mode("default")


def test_the_guard_notices_waiting(no_waiting):
    """Or the tests below could not fail."""
    one = torch.ones((), device=DEVICE)
    with no_waiting, pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_no_form_of_a_step_waits(kernels, base, form, no_waiting):
    problem = Problem(base, kernels)
    for _ in range(3):
        problem.step(form)
    with no_waiting:
        for _ in range(3):
            problem.step(form)


@pytest.mark.parametrize("base", BASES)
def test_a_step_over_fresh_gradients_does_not_wait(kernels, base, no_waiting):
    """Every step at other addresses, as zero_grad(set_to_none=True) makes them: tables of addresses are made anew."""
    problem = Problem(base, kernels)
    for _ in range(3):
        problem.step()
    kept = []
    with no_waiting:
        for _ in range(12):
            problem.first, problem.second = ([grad.clone() for grad in given] for given in (problem.first, problem.second))
            kept.append((problem.first, problem.second))
            problem.step()


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("base", BASES)
def test_a_step_under_a_loss_scale_does_not_wait(kernels, base, found, no_waiting):
    """What GradScaler.step leaves on the optimizer: the scale and the flag, on the device."""
    problem = Problem(base, kernels)
    for _ in range(2):
        problem.step()
    scale, found_inf = torch.full((), 1024.0, device=DEVICE), torch.full((), found, device=DEVICE)

    def scaled():
        problem.give(problem.first)
        with problem.optimizer.perturbed():
            problem.give(problem.second)
        problem.optimizer.grad_scale, problem.optimizer.found_inf = scale, found_inf
        problem.optimizer.step()
        del problem.optimizer.grad_scale, problem.optimizer.found_inf

    scaled()
    before = [t.detach().clone() for t in problem.state()]
    with no_waiting:
        scaled()
    alike = all(torch.equal(a, b) for a, b in zip(before, problem.state(), strict=True))
    assert alike == bool(found)


def test_a_change_of_a_hyper_parameter_does_not_wait(kernels, no_waiting):
    """A scheduler changes the learning rate in every step."""
    problem = Problem("SGD", kernels)
    problem.step()
    with no_waiting:
        for number in range(4):
            problem.optimizer.param_groups[0]["lr"] = 0.1 / (2 + number)
            problem.step()


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("tensors", [120, 161, 512, 4000])
def test_launches_of_a_step(kernels, base, tensors):
    problem = Problem(base, kernels, shapes=[(1 + 37 * (index % 5),) for index in range(tensors)])
    for _ in range(3):
        problem.step()
    counted = launches(problem.step, Device("cuda"))
    per_operation = math.ceil(tensors / GRADIENTS_PER_LAUNCH) if kernels == "native" else 1
    # Triton's norm is two launches: the sums of chunks, and their sum.
    assert counted.kernels == per_operation * 3 + (kernels == "triton")
    assert counted.copies == 0
    assert counted.kernels + counted.copies <= 4 or per_operation > 1


def test_two_dtypes_are_still_few_launches(kernels):
    """Native: a dtype belongs to a tensor, not to a launch. Triton: one launch per operation for each dtype."""
    problem = Problem("SGD", kernels, shapes=[(100,)] * 20)
    for param in problem.params[::2]:
        param.data = param.data.to(torch.bfloat16)
    for grads in (problem.first, problem.second):
        grads[::2] = [grad.to(torch.bfloat16) for grad in grads[::2]]
    for _ in range(3):
        problem.step()
    assert launches(problem.step, Device("cuda")).kernels == {"native": 3, "triton": 7}[kernels]


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_allocated_once_warm(kernels, base):
    problem = Problem(base, kernels)
    for _ in range(3):
        problem.step()
    torch.cuda.synchronize()

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = allocations()
    for _ in range(5):
        problem.step()
    assert allocations() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backup_is_one_copy_of_the_parameters(kernels, dtype):
    shapes = [(1000, 1000), (3000,), (513, 7)]
    problem = Problem("SGD", kernels, shapes=shapes, dtype=dtype)
    torch.cuda.synchronize()
    size = sum(param.numel() * param.element_size() for param in problem.params)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        problem.step()
    padding = 64 * (len(shapes) + 1)
    assert size <= problem.optimizer.buffer_bytes <= size + padding
    # Backup and momentum; tables, slots and scalars are a few blocks of the allocator, of 512 bytes and 2 MiB.
    assert torch.cuda.max_memory_allocated() - before <= 2 * (size + padding) + 2**20
