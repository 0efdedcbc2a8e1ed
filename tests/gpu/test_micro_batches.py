"""A step over micro-batches: the CPU's bits through all its passes, and the eager bits from a captured graph."""

import pytest
import torch

from sam_fused.ops import native
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.prepared import Factors, TensorSet
from tests.gpu.problems import DEVICE, values
from tests.ops.runner import table

PERTURB, SGD = table([[0.3, 1e-12]]), table([[0.1, 0.9, 0.0, 0.01, 1.0, 0.0]])
WEIGHTS = (0.3, 0.2, 0.5)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MicroBatches:
    """Prepared sets: one that perturbs, one that ends every micro-batch. Each micro-batch has the same gradients."""

    def __init__(self, device, backend, dtype):
        self.params, self.first, self.second = (values(seed=seed, dtype=dtype, device=device) for seed in (1, 2, 3))
        backups, self.buffers = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.sums = [torch.full_like(p, float("nan"), dtype=arithmetic_dtype(dtype)) for p in self.params]
        self.weights = [torch.tensor(weight, device=device) for weight in WEIGHTS]
        self.norm = torch.tensor(1.5, device=device)
        self.overflows = torch.tensor(0, device=device)
        self.ascent = TensorSet(self.params, backups, backend=backend)
        self.end = TensorSet(
            self.params,
            backups,
            backend=backend,
            states=(self.buffers,),
            accumulators=self.sums,
            perturbed=self.ascent.perturbed,
        )

    def step(self):
        for number, weight in enumerate(self.weights):
            first, second = self.ascent.checked(self.first), self.end.checked(self.second)
            # The norm that perturbs is a given one: two devices' norms agree to their last digits alone.
            self.ascent.grad_norm(first, overflows=self.overflows)
            self.ascent.perturb_(first, self.norm, PERTURB)
            if number + 1 < len(self.weights):
                self.end.restore_accumulate_(second, weight, fresh=number == 0)
            else:
                self.end.restore_sgd_(second, SGD, Factors(weight=weight))

    def state(self):
        return [t.cpu() for t in (*self.params, *self.buffers, *self.sums)]


def assert_same(ours, wanted):
    for index, (a, b) in enumerate(zip(ours.state(), wanted.state(), strict=True)):
        assert torch.equal(a, b), f"tensor {index} of the state differs in {int((a != b).sum())} elements"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpus_bits(kernels, dtype):
    assert native.status().reason is None
    card, cpu = MicroBatches(DEVICE, kernels, dtype), MicroBatches(torch.device("cpu"), "native", dtype)
    for _ in range(2):
        card.step()
        cpu.step()
        assert_same(card, cpu)
    assert int(card.overflows) == 0
    card.first[0][-1] = float("inf")
    card.step()
    assert int(card.overflows) == len(WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_reads_the_weights_it_finds(kernels, dtype):
    replayed, eager = (MicroBatches(DEVICE, kernels, dtype) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        replayed.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for share in (0.1, 0.4):
        for micro_batches in (replayed, eager):
            micro_batches.weights[1].fill_(share)
        graph.replay()
        eager.step()
        assert_same(replayed, eager)
