"""What only tables of full size can show. Run by `test_emulated_suite.py` in a process that has them."""

import pytest
import torch

from sam_fused.ops.prepared import HyperTable, TensorSet
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
    tensors.restore_sgd_(grads, HyperTable().update([[0.5, 0.9, 0.1, 0, 0, 0]]))
    assert emulated_library.launches == 3 * launches
    assert all(bool((p == 1 - 0.5 * index).all()) for index, p in enumerate(params))


@pytest.fixture
def emulated_library(request):
    assert not emulated_backend.has_small_arguments()
    return emulated_backend.install(emulated_backend.built_once())
