"""Compiled code: whole steps without a graph break, and training loops that break at the optimizer's host code alone."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from sam_fused import SAM, MicroBatchSAM, freeze_batch_norm_stats, ops
from tests.optim.helpers import assert_same_bits, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def table(*values):
    return torch.tensor([values], dtype=torch.float64)


def loss_of(params, x, y):
    return F.cross_entropy(torch.tanh(x @ params[0] + params[1]) @ params[2] + params[3], y)


def gradient(params, x, y):
    return torch.func.grad_and_value(lambda p: loss_of(p, x, y))(params)


def sam_step(params, backups, buffers, sums, x, y, ascent, descent, backend):
    grads, loss = gradient(params, x, y)
    norm, _ = ops.grad_norm(grads, backend=backend)
    ops.perturb_(params, backups, grads, norm, ascent, backend=backend)
    grads, _ = gradient(params, x, y)
    ops.restore_sgd_(params, backups, grads, buffers, descent, backend=backend)
    return loss


def micro_batch_step(params, backups, buffers, sums, x, y, ascent, descent, backend):
    half = torch.full((), 0.5, dtype=torch.float64)
    for number, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        grads, loss = gradient(params, a, b)
        norm, _ = ops.grad_norm(grads, backend=backend)
        ops.perturb_(params, backups, grads, norm, ascent, backup_exists=number > 0, backend=backend)
        grads, _ = gradient(params, a, b)
        if number == 0:
            ops.restore_accumulate_(params, backups, grads, sums, half, fresh=True, backend=backend)
            continue
        total, _ = ops.grad_norm(grads, accumulators=sums, weight=half, backend=backend)
        clip = (1.0 / (total + 1e-6)).clamp(max=1.0)
        ops.restore_sgd_(params, backups, grads, buffers, descent, accumulators=sums, weight=half, clip=clip, backend=backend)
    return loss


def run(step, backend, rhos=(0.1, 0.1, 0.3), lrs=(0.1, 0.01, 0.1)):
    torch.manual_seed(0)
    params = [torch.randn(8, 16), torch.randn(16), torch.randn(16, 3), torch.randn(3)]
    lists = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    x, y = torch.randn(12, 8), torch.randint(3, (12,))
    losses = []
    for rho, lr in zip(rhos, lrs, strict=True):
        losses.append(step(params, *lists, x, y, table(rho, 1e-12), table(lr, 0.9, 0, 0.01, 0, 0), backend))
    return [*params, *lists[1], *losses]


@pytest.mark.parametrize("step", [sam_step, micro_batch_step])
def test_a_whole_step_is_one_graph(backend, step):
    """Both passes, forward and backward, and the operations. rho and lr are tensors: another value is no other graph."""
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same_bits(run(compiled, backend), run(step, backend))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_whole_step_through_inductor(fast_backend):
    compiled = torch.compile(sam_step, fullgraph=True)
    torch.testing.assert_close(run(compiled, fast_backend), run(sam_step, fast_backend), rtol=1e-5, atol=1e-6)


# ---- training loops --------------------------------------------------------------------------------------------------------


class Task:
    def __init__(self, form, base, backend):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        )
        self.form = form
        count = {"num_micro_batches": 3} if form.startswith("micro") else {}
        optimizer = MicroBatchSAM if count else SAM
        self.optimizer = optimizer(self.model.parameters(), base, lr=0.1, rho=0.1, model=self.model, backend=backend, **count)
        self.x, self.y = torch.randn(12, 8), torch.randint(3, (12,))

    def train(self, x, y):
        optimizer, model = self.optimizer, self.model

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if self.form == "closure":
            return optimizer.step(closure)
        if self.form == "micro-batches":
            return optimizer.step(closure, x, y)
        if self.form == "perturbed":
            optimizer.zero_grad()
            loss = closure()
            with optimizer.perturbed():
                closure()
            optimizer.step()
            return loss
        for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
            optimizer.zero_grad()
            loss = closure(a, b)
            with optimizer.micro_batch():
                closure(a, b)
        optimizer.step()
        return loss

    def result(self):
        return snapshot([*self.model.parameters(), *self.model.buffers()])


FORMS = ("closure", "perturbed", "micro-batches", "micro-batches by hand")


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda base: base.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_training_step(fast_backend, form, base):
    """The same weights, hyper-parameters that change are seen, and the graph breaks at ``backward``, which is torch's, and at
    the optimizer's moves, never inside them."""
    ours, eager = Task(form, base, fast_backend), Task(form, base, fast_backend)
    compiled = torch.compile(ours.train, backend="aot_eager")
    for number in range(4):
        for task, train in ((ours, compiled), (eager, eager.train)):
            task.optimizer.param_groups[0].update(lr=0.1 / (number + 1), rho=0.05 * (number + 1))
            train(task.x, task.y)
    assert_same_bits(ours.result(), eager.result())
    for reason in counters["graph_break"]:
        moves = ("`SAM.", "`Refusals.", "`MicroBatchSAM.", "`Optimizer.zero_grad`", "`RunningStatistics.")
        assert "Tensor.backward()" in reason or any(f"the function {move}" in reason for move in moves), reason


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model(fast_backend, form):
    """The usual way. Batch norm's statistics are put back in place, which a compiled forward must not mind."""
    ours, eager = Task(form, SGD, fast_backend), Task(form, SGD, fast_backend)
    inside = ours.model
    ours.model = torch.compile(inside, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        ours.train(ours.x, ours.y)
        eager.train(eager.x, eager.y)
    ours.model = inside
    assert_same_bits(ours.result(), eager.result())


def test_frozen_statistics_of_a_compiled_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(8, 4)
    compiled(x)
    before = snapshot(model.buffers())
    with freeze_batch_norm_stats(compiled):
        compiled(2 * x).sum().backward()
    assert_same_bits(model.buffers(), before)
