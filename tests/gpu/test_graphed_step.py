"""``graphed_step`` with a capture: replays are the eager steps' bits, and see what changes between them."""

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from sam_fused import SAM, MicroBatchSAM, graphed_step
from tests.gpu.problems import DEVICE

BASES = {"SGD": (SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (AdamW, {"lr": 0.01})}
FORMS = {"sam": (SAM, {}), "micro-batches": (MicroBatchSAM, {"num_micro_batches": 4})}


class Task:
    def __init__(self, form, base, kernels, **kwargs):
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        self.model = torch.nn.Sequential(*layers).to(DEVICE)
        optimizer, own = FORMS[form]
        base_class, settings = BASES[base]
        settings = {"capturable": True, "backend": kernels, **settings, **kwargs}
        self.optimizer = optimizer(self.model.parameters(), base_class, rho=0.1, model=self.model, **own, **settings)
        self.batches = [(torch.randn(12, 6, device=DEVICE), torch.randint(3, (12,), device=DEVICE)) for _ in range(6)]

    def graphed(self):
        return graphed_step(self.model, F.cross_entropy, self.optimizer, self.batches[0])

    def eager(self, x, y):
        def closure(x=x, y=y):
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            return loss

        return self.optimizer.step(closure, *((x, y) if isinstance(self.optimizer, MicroBatchSAM) else ()))

    def tensors(self):
        state = [v for p in self.model.parameters() for v in self.optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_replays_are_the_eager_steps_with_what_changes_between_them(kernels, form, base, clip):
    """Learning rate, rho and the clipping limit change; batch norm's statistics see the first passes."""
    graphed, eager = (Task(form, base, kernels, max_grad_norm=clip) for _ in range(2))
    step = graphed.graphed()
    for number, (x, y) in enumerate(graphed.batches):
        for task in (graphed, eager):
            task.optimizer.param_groups[0].update(lr=0.1 / (number + 1), rho=0.05 * (number + 1))
            if clip is not None:
                task.optimizer.max_grad_norm = clip / (number + 1)
        loss = step(x, y)
        assert torch.equal(loss, eager.eager(x, y).detach())
        for ours, wanted in zip(graphed.tensors(), eager.tensors(), strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", ["rho", "lr"])
def test_hyper_parameters_that_live_on_the_device(kernels, name):
    """A tensor in the group is read by every replay: no call in between writes it."""
    values = {"rho": 0.1, "lr": 0.1}
    tensor = torch.tensor(values[name], device=DEVICE)
    graphed, eager = (Task("sam", "SGD", kernels) for _ in range(2))
    graphed.optimizer.param_groups[0][name] = tensor
    step = graphed.graphed()
    for number, (x, y) in enumerate(graphed.batches):
        tensor.fill_(0.1 / (number + 1))
        eager.optimizer.param_groups[0][name] = float(tensor)
        step(x, y)
        eager.eager(x, y)
    for ours, wanted in zip(graphed.tensors(), eager.tensors(), strict=True):
        assert torch.equal(ours, wanted)


def test_an_overflow_in_a_replay_is_counted(kernels):
    task = Task("sam", "SGD", kernels)
    step = task.graphed()
    x, y = task.batches[0]
    step(torch.full_like(x, float("inf")), y)
    assert int(task.optimizer.ascent_overflows) == 1


def test_a_replay_waits_for_nothing(kernels):
    task = Task("micro-batches", "SGD", kernels)
    step = task.graphed()
    step(*task.batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.optimizer.param_groups[0]["lr"] = 0.01
        step(*task.batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
