"""A loss scale on the gradients: it changes nothing where it is told, and is asked for where it matters."""

import math

import pytest
import torch
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM
from tests.devices import default
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    snapshot,
)
from tests.optim.variants import VARIANTS, trained, variants

NEEDS_SCALE = {key: options for key, options in VARIANTS.items() if key.startswith(("unnormalised", "decay"))}


def scaled_steps(task, optimizer, scaler, told, by="perturbed"):
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(task.loss()).backward()
        scale = {"grad_scale": scaler.get_scale()} if told else {}
        if by == "perturbed":
            with optimizer.perturbed(**scale):
                scaler.scale(task.loss()).backward()
        elif by == "micro_batch":
            with optimizer.micro_batch(1.0, **scale):
                scaler.scale(task.loss()).backward()
        else:
            optimizer.first_step(zero_grad=True, **scale)
            scaler.scale(task.loss()).backward()
        scaler.step(optimizer)
        scaler.update()


@variants
@pytest.mark.parametrize("by", ["perturbed", "first_step", "micro_batch"])
def test_a_loss_scale_that_is_told_changes_nothing(backend, options, by):
    """To the bit where nothing is added to the gradient: the scale is a power of two."""
    expected = trained(backend, steps=2, perturb_eps=0.0, **options)
    task = Regression(torch.float32)
    cls, kwargs = (MicroBatchSAM, {"num_micro_batches": 1}) if by == "micro_batch" else (SAM, {})
    named = task.model.named_parameters()
    optimizer = cls(named, SGD, lr=0.1, rho=0.2, perturb_eps=0.0, backend=backend, **options, **kwargs)
    scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=1024.0), True, by)
    assert_same_bits(snapshot(task.params), expected)


TWO_KINDS = {
    "eta": ({"adaptive": "all", "eta": 0.3}, {}),
    "layerwise": ({}, {"adaptive": "layerwise"}),
    "decay": ({"weight_decay": 0.4}, {"weight_decay": 0.0}),
}


@pytest.mark.parametrize("by", ["perturbed", "first_step", "micro_batch"])
@pytest.mark.parametrize("kinds", TWO_KINDS.values(), ids=TWO_KINDS.keys())
def test_a_loss_scale_that_is_told_changes_nothing_of_two_kinds_of_groups(backend, kinds, by):
    """A direction that is written out beside one that the kernels form: one norm, with or without the scale, of both."""

    def groups(task):
        named = list(task.model.named_parameters())
        return [{"params": named[::2], **kinds[0]}, {"params": named[1::2], **kinds[1]}]

    options = {"lr": 0.1, "rho": 0.2, "perturb_eps": 0.0, "weight_decay_in_ascent": True, "backend": backend}
    plain, task = Regression(torch.float32), Regression(torch.float32)
    expected = SAM(groups(plain), SGD, **options)
    for _ in range(2):
        expected.step(plain.evaluate)
    cls, kwargs = (MicroBatchSAM, {"num_micro_batches": 1}) if by == "micro_batch" else (SAM, {})
    optimizer = cls(groups(task), SGD, **options, **kwargs)
    scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=65536.0), True, by)
    torch.testing.assert_close([p.detach() for p in task.params], [p.detach() for p in plain.params], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", NEEDS_SCALE.values(), ids=NEEDS_SCALE.keys())
def test_a_loss_scale_that_is_not_told_is_refused_where_it_matters(backend, options):
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.2, backend=backend, **options)
    before = snapshot(task.params)
    with pytest.raises(RuntimeError) as error:
        scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=1024.0), False)
    assert_one_sentence(error.value, "grad_scale=scaler.get_scale()")
    assert_same_bits(snapshot(task.params), before)
    optimizer.restore()
    optimizer.zero_grad()
    optimizer.step(task.evaluate)


@pytest.mark.parametrize("told", [(True, True), (True, False), (False, True), (False, False)])
def test_every_micro_batch_is_to_be_told(backend, told):
    """L = |w|^2 / 2, both halves alike, e = .1 w: w - .1 1.1 w. One that was not told would be off a thousand times."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MicroBatchSAM([w], SGD, num_micro_batches=2, lr=0.1, rho=0.1, normalize=False, backend=backend)
    scaler = torch.amp.GradScaler(default().type, init_scale=1024.0)
    for known in told:
        optimizer.zero_grad()
        scaler.scale(0.5 * (w * w).sum()).backward()
        with optimizer.micro_batch(0.5, **({"grad_scale": scaler.get_scale()} if known else {})):
            scaler.scale(0.5 * (w * w).sum()).backward()
    if all(told):
        scaler.step(optimizer)
        assert w.tolist() == pytest.approx([0.89, 1.78], rel=1e-6)
        return
    with pytest.raises(RuntimeError) as error:
        scaler.step(optimizer)
    assert_one_sentence(error.value, "grad_scale=scaler.get_scale()")
    optimizer.restore()
    assert w.tolist() == [1.0, 2.0]


def test_switched_off_no_scale_is_asked_for(backend):
    task = Regression(torch.float32)
    optimizer = SAM(task.params, SGD, lr=0.1, rho=0.2, normalize=False, backend=backend)
    optimizer.step(task.evaluate)
    optimizer.enabled = False
    scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=1024.0), False)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "1", True])
def test_a_scale_that_is_none_is_refused(scale):
    task = Regression()
    optimizer = SAM(task.params, SGD, lr=0.1, normalize=False)
    task.evaluate()
    before = snapshot(task.params)
    with pytest.raises(ValueError) as error, optimizer.perturbed(grad_scale=scale):
        pass
    assert_one_sentence(error.value, "grad_scale", repr(scale))
    assert_same_bits(snapshot(task.params), before)
