"""A list's properties compared in one call: it must tell apart whatever an address does not."""

import pytest
import torch

from sam_fused.ops import fingerprint
from sam_fused.ops.fingerprint import Fingerprint


def of(*tensors):
    taken = Fingerprint()
    taken.take(tensors)
    return taken


@pytest.fixture
def without_the_class(monkeypatch):
    monkeypatch.setattr(fingerprint, "TensorGuards", None)


def test_this_torch_has_the_class():
    """Where it is missing, steps are slower and nothing else; the supported versions of torch have it."""
    assert fingerprint.TensorGuards is not None


def test_fresh_tensors_like_the_old_ones_match():
    taken = of(torch.zeros(2, 3), torch.zeros(4))
    assert taken.matches([torch.ones(2, 3), torch.ones(4)])
    assert not taken.matches([torch.ones(2, 3)]) and not taken.matches([torch.ones(2, 3), torch.ones(4), torch.ones(4)])
    assert not taken.matches([torch.ones(4), torch.ones(2, 3)])


DIFFERENT = {
    "dtype": lambda: torch.zeros(2, 3, dtype=torch.float64),
    "shape": lambda: torch.zeros(3, 2),
    "strides": lambda: torch.zeros(3, 2).t(),
    "gaps": lambda: torch.zeros(2, 6)[:, ::2],
    "sparse": lambda: torch.zeros(2, 3).to_sparse(),
    "negated view": lambda: torch._neg_view(torch.zeros(2, 3)),
    "no memory": lambda: torch._efficientzerotensor((2, 3)),
    "device": lambda: torch.zeros(2, 3, device="meta"),
    "subclass": lambda: torch.nn.Parameter(torch.zeros(2, 3)),
    "None": lambda: None,
    "number": lambda: 1.0,
}


@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_does_not_match(make):
    assert not of(torch.zeros(2, 3)).matches([make()])
    assert not of(torch.zeros(2, 3), torch.zeros(1)).matches([torch.zeros(2, 3), make()])


def test_nothing_matches_what_was_never_taken():
    assert not Fingerprint().matches([torch.zeros(1)]) and not Fingerprint().matches([]) and not of().matches([])


def test_subclasses_are_not_taken():
    class Marked(torch.Tensor):
        pass

    assert not of(torch.zeros(2).as_subclass(Marked)).matches([torch.zeros(2).as_subclass(Marked)])


def test_a_new_one_replaces_the_old_one():
    taken = of(torch.zeros(2))
    taken.take([torch.zeros(3)])
    assert taken.matches([torch.zeros(3)]) and not taken.matches([torch.zeros(2)])


def test_tensors_are_not_kept_alive():
    import weakref

    tensor = torch.zeros(2)
    seen, taken = weakref.ref(tensor), of(tensor)
    del tensor
    assert seen() is None and taken.matches([torch.zeros(2)])


def test_without_torchs_class_everything_takes_the_slow_way(without_the_class):
    assert not of(torch.zeros(2)).matches([torch.zeros(2)])
    from sam_fused.ops.prepared import TensorSet

    tensors = TensorSet([torch.ones(4)], [torch.zeros(4)], backend="foreach")
    for _ in range(2):
        grads = tensors.checked([torch.ones(4)])
        norm, _ = tensors.grad_norm(grads)
        tensors.perturb_(grads, norm, torch.tensor([[0.5, 0.0]], dtype=torch.float64))
        assert bool((tensors.params[0] == 1.25).all())
        tensors.restore_()
        assert tensors.is_current()
