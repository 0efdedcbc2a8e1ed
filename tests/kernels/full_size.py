"""What only tables of full size can show. Run by `test_emulated_suite.py` in a process that has them."""

import pytest
import torch

from sam_fused.ops.hyper import HyperTable
from sam_fused.ops.prepared import Factors, TensorSet
from tests.kernels import emulated_backend
from tests.ops.runner import table

GRADIENTS = 3712
COUNTS = [(161, 1), (512, 1), (GRADIENTS, 1), (GRADIENTS + 1, 2), (2 * GRADIENTS + 1, 3)]


@pytest.fixture
def backend(request):
    return request.param


@pytest.mark.parametrize(("count", "launches"), COUNTS)
def test_launches_of_a_step(count, launches, backend, emulated_library):
    params = [torch.ones(1 + index % 3) for index in range(count)]
    buffers = [torch.zeros_like(p) for p in params]
    tensors = TensorSet(params, [p.clone() for p in params], backend=backend, states=(buffers,), first=[1] * count)
    grads = tensors.checked([torch.full_like(p, float(index)) for index, p in enumerate(params)])
    emulated_library.set_orders()
    norm, _ = tensors.grad_norm(grads)
    assert emulated_library.launches == launches
    wanted = sum(p.numel() * float(index) ** 2 for index, p in enumerate(params)) ** 0.5
    assert float(norm) == pytest.approx(wanted, rel=1e-7)
    tensors.perturb_(grads, norm, table([[0.0, 1e-12]]))
    tensors.restore_sgd_(grads, HyperTable().update([[0.5, 0.9, 0.1, 0, 0, 0]]).on(torch.device("cpu")))
    assert emulated_library.launches == 3 * launches
    assert all(bool((p == 1 - 0.5 * index).all()) for index, p in enumerate(params))


@pytest.mark.parametrize(("count", "launches"), COUNTS)
def test_launches_of_a_micro_batch(count, launches, backend, emulated_library):
    """As many as a step without any has: the restore that ends it keeps the gradient in the same pass."""
    params = [torch.ones(1 + index % 3, dtype=torch.bfloat16) for index in range(count)]
    backups, accumulators = [p.clone() for p in params], [torch.full(p.shape, float("nan")) for p in params]
    tensors = TensorSet(params, backups, backend=backend)
    summed = TensorSet(params, backups, backend=backend, accumulators=accumulators, perturbed=tensors.perturbed)
    grads = tensors.checked([torch.full_like(p, float(index % 7)) for index, p in enumerate(params)])
    hyper, weight, one = table([[0.5, 0, 0, 0, 0, 0]]), torch.tensor(0.25), torch.tensor(1.0)
    for fresh in (True, False):
        emulated_library.set_orders()
        norm, _ = tensors.grad_norm(grads)
        tensors.perturb_(grads, norm, table([[0.5, 1e-12]]))
        summed.restore_accumulate_(grads, weight, fresh)
        assert emulated_library.launches == 3 * launches
        assert all(bool((p == 1).all()) for p in params)
    assert all(bool((a == 0.5 * (index % 7)).all()) for index, a in enumerate(accumulators))
    emulated_library.set_orders()
    norm, _ = summed.grad_norm(grads, weight=one)
    wanted = sum(p.numel() * (1.5 * (index % 7)) ** 2 for index, p in enumerate(params)) ** 0.5
    assert float(norm) == pytest.approx(wanted, rel=1e-7)
    summed.restore_sgd_(grads, hyper, Factors(weight=one))
    assert emulated_library.launches == 2 * launches
    assert all(bool((p == 1 - 0.75 * (index % 7)).all()) for index, p in enumerate(params))


@pytest.fixture
def emulated_library(request):
    assert not emulated_backend.has_small_arguments()
    return emulated_backend.install(emulated_backend.built_once())
