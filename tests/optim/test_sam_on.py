"""SAM-ON [2306.04226]: the normalisation layers alone are perturbed, make up the norm, and are backed up."""

import pytest
import torch
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM, norm_parameters
from tests.devices import default
from tests.optim.helpers import (
    backups_of,
    backward_of,
    parameter,
    snapshot,
    take_step,
)

ABS = 1e-11


def test_two_steps_of_sam_on_by_hand(backend, form):
    """Only the second tensor is perturbed, by rho along its own gradient: e = (0, .5)."""
    on, off = parameter([1.0]), parameter([3.0])
    optimizer = SAM([{"params": [off], "perturb": False}, {"params": [on]}], SGD, lr=0.1, rho=0.5, backend=backend)
    for expected in ((2.7, 0.55), (2.43, 0.235)):  # w_1 (1 - .1), w_2 - .1 3 (w_2 + .5)
        take_step(optimizer, form, backward_of(lambda: 0.5 * (off * off + 3 * on * on).sum()))
        assert [off.item(), on.item()] == pytest.approx(expected, abs=ABS)


def test_two_steps_of_sam_on_over_micro_batches_by_hand(backend):
    """Curvatures 1 and 5, each in a micro-batch of its own, are perturbed by rho each: w_2 - .1 mean(1, 5) (w_2 + .5)."""
    on, off = parameter([1.0]), parameter([3.0])
    groups = [{"params": [off], "perturb": False}, {"params": [on]}]
    optimizer = MicroBatchSAM(groups, SGD, num_micro_batches=2, lr=0.1, rho=0.5, backend=backend)

    def closure(curvature):
        loss = 0.5 * (off * off + curvature * on * on).sum()
        loss.backward()
        return loss

    for expected in ((2.7, 0.55), (2.43, 0.235)):
        optimizer.step(closure, torch.tensor([1.0, 5.0], dtype=torch.float64, device=default()))
        assert [off.item(), on.item()] == pytest.approx(expected, abs=ABS)


def test_sam_on_backs_up_what_it_perturbs_and_nothing_else(backend):
    """Of 2,140 parameters the 40 of the norm layer: their bytes rounded up to cache lines, twice over and no more."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 62))
    for adaptive, copies in ((False, 1), ("layerwise", 2)):  # the direction of a layerwise T is written out
        optimizer = SAM(norm_parameters(model), SGD, lr=0.1, adaptive=adaptive, backend=backend)
        x = torch.randn(8, 40, device=default())
        model.to(default())
        model(x).square().mean().backward()
        clean = snapshot(model.parameters())
        with optimizer.perturbed():
            moved = [not torch.equal(a, b) for a, b in zip(snapshot(model.parameters()), clean, strict=True)]
            model(x).square().mean().backward()
        assert moved == [False, False, True, True, False, False]
        assert 2 * 20 * 4 * copies <= optimizer.buffer_bytes <= copies * (2 * 128 + 64)
        assert len(backups_of(optimizer)) == 2
        optimizer.step()
        optimizer.release_buffers()
        assert optimizer.buffer_bytes == 0


def test_the_norm_is_over_the_norm_layers_alone(backend):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).to(default(), torch.float64)
    optimizer = SAM(norm_parameters(model), SGD, lr=0.1, rho=0.5, backend=backend)
    for param in model.parameters():
        param.grad = torch.full_like(param, 100.0)
    model[1].weight.grad.fill_(0.0)[0] = 3.0
    model[1].bias.grad.fill_(0.0)[1] = 4.0
    before = [p.detach().clone() for p in model[1].parameters()]
    with optimizer.perturbed():
        moves = [(p.detach() - w).tolist() for p, w in zip(model[1].parameters(), before, strict=True)]
    assert moves[0] == pytest.approx([0.3, 0, 0], abs=ABS) and moves[1] == pytest.approx([0, 0.4, 0], abs=ABS)
