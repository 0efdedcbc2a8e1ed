"""Micro-batches: what is allocated, what is written, and what schedulers, hooks, copies and autograd hear of it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.optim import SGD, RMSprop

from sam_fused import SAM, MicroBatchSAM
from tests.optim.helpers import (
    Regression,
    assert_same_bits,
    assert_same_state,
    parameter,
    snapshot_state,
)
from tests.optim.test_micro_batch import make, take


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 3), (torch.float16, 3)])
def test_memory_is_the_backup_and_an_accumulator_whatever_their_number(backend, dtype, copies):
    held = []
    for count in (2, 8):
        case = Regression(dtype)
        optimizer = make(case.params, SGD, count, backend=backend, lr=0.01, rho=0.01)
        for _ in range(2):
            take(optimizer, "closure", lambda x, y, case=case: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
        own = sum(p.numel() * p.element_size() for p in case.params)
        # Every tensor starts on a cache line, and so does the buffer.
        assert copies * own <= optimizer.buffer_bytes <= copies * own + 3 * 64 * (len(case.params) + 1)
        held.append(optimizer.buffer_bytes)
        optimizer.release_buffers()
        assert optimizer.buffer_bytes == 0
    assert held[0] == held[1]


def test_one_micro_batch_has_no_accumulator(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 1, backend=backend, lr=0.01)
    take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    assert optimizer._accumulation.nbytes == 0


def test_the_backup_is_written_once_a_step(backend, monkeypatch):
    from sam_fused.ops.prepared import TensorSet

    case, said = Regression(), []
    own = TensorSet.perturb_
    monkeypatch.setattr(
        TensorSet, "perturb_", lambda self, *a, **k: said.append(k.get("backup_exists", False)) or own(self, *a, **k)
    )
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.01, rho=0.1)
    for _ in range(2):
        take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    assert said == [False, True, True] * 2


def test_weights_that_change_between_micro_batches_are_kept(backend):
    """Weight clipping or a loaded checkpoint in the middle of a step: the old backup must not undo it."""
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.0, rho=0.5)
    for number in range(2):
        optimizer.zero_grad()
        (w**2).sum().backward()
        with optimizer.micro_batch():
            (w**2).sum().backward()
        if number == 0:
            with torch.no_grad():
                w.clamp_(max=1.5)
    assert w.tolist() == [1.0, 1.5]


def test_addresses_stay(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.01, rho=0.1)
    loss = lambda x, y: torch.nn.functional.mse_loss(case.model(x), y)  # noqa: E731
    take(optimizer, "closure", loss, case.x, case.y)
    here = [p.data_ptr() for p in case.params]
    take(optimizer, "by_hand", loss, case.x, case.y)
    assert [p.data_ptr() for p in case.params] == here


def test_gradients_are_not_written(backend):
    """Who else holds their storage cannot be known."""
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1, rho=0.1)
    kept = []

    def closure(x):
        loss = (w * x.mean(0)).sum()
        loss.backward()
        kept.append((w.grad, w.grad.clone()))
        return loss

    optimizer.step(closure, torch.randn(4, 2, dtype=torch.float64))
    assert len(kept) == 4
    assert_same_bits([grad for grad, _ in kept], [copy for _, copy in kept])


def test_autograd_sees_that_weights_were_written(backend):
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1, rho=0.1)
    waiting = (w**2).sum()
    optimizer.zero_grad()
    (w**2).sum().backward()
    with optimizer.micro_batch():
        (w**2).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


def test_the_sum_that_was_shown_is_not_overwritten_in_silence(backend):
    """``.grad`` of fp32 parameters is the accumulator: a graph that holds it has to hear of the next step."""
    case = Regression()
    optimizer = make(case.params, SGD, 2, backend=backend, lr=0.1)
    loss = lambda x, y: torch.nn.functional.mse_loss(case.model(x), y)  # noqa: E731
    take(optimizer, "by_hand", loss, case.x, case.y)
    kept = [p.grad for p in case.params]
    ones = [torch.ones_like(g, requires_grad=True) for g in kept]
    held = sum((g * one).sum() for g, one in zip(kept, ones, strict=True))
    optimizer.zero_grad()
    take(optimizer, "closure", loss, case.x, case.y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_a_framework_that_copies_attributes_sees_the_same_count():
    """Lightning's wrapper takes over ``__dict__`` and runs our methods with itself as self."""
    optimizer = make(Regression().params, SGD, 4, lr=0.1)
    wrapper = copy.copy(optimizer)
    wrapper.__dict__ = {**optimizer.__dict__}
    optimizer.num_micro_batches = 2
    assert wrapper.num_micro_batches == 2


def test_settings_survive_copies(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 3, backend=backend, lr=0.1, momentum=0.9, max_grad_norm=2.0)
    take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(again) is MicroBatchSAM and again.num_micro_batches == 3 and again.max_grad_norm == 2.0
        assert_same_state(snapshot_state(again), snapshot_state(optimizer))
    assert repr(optimizer).startswith(
        f"MicroBatchSAM(backend={backend!r}, max_grad_norm=2.0, num_micro_batches=3) around SGD ("
    )


def test_schedulers_and_hooks(backend):
    case = Regression()
    optimizer = make(case.params, RMSprop, 2, backend=backend, lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: fired.append("base"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
            scheduler.step()
    assert fired == ["pre", "base", "post"] * 2 and optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("form", ["step", "second_step"])
def test_hooks_fire_once_by_hand(form):
    """torch wraps the ``step`` of each class that is constructed: SAM's, too, as soon as there is one."""
    case = Regression()
    SAM(case.params, SGD, lr=0.1)
    optimizer = make(case.params, SGD, 1 if form == "second_step" else 2, lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    if form == "step":
        take(optimizer, "by_hand", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    else:
        case.evaluate()
        optimizer.first_step(zero_grad=True)
        case.evaluate()
        optimizer.second_step()
    assert fired == ["pre", "post"]
