"""perturb() and restore(): closed forms, the optimizer's bits, and weights that come back whatever happens."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch

from sam_fused import SAM, functions, moved
from sam_fused.functions import Perturbation, perturb, restore
from sam_fused.ops.backends import available_backends
from sam_fused.ops.prepared import TensorSet
from tests.devices import default, here, randn
from tests.optim.helpers import DTYPES, Regression, assert_one_sentence, assert_same_bits, parameter, snapshot

ABS = 1e-11


@pytest.fixture(autouse=True)
def _nothing_is_left_perturbed(monkeypatch):
    monkeypatch.delenv("SAM_FUSED_BACKEND", raising=False)
    torch.set_num_threads(1)  # with two these few elements take several times as long
    yield
    left = list(moved._perturbed.values())
    moved._perturbed.clear()  # one test's failure is not the next one's
    assert not left


@pytest.fixture
def backend(request):
    reason = available_backends(default())[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def ones(tensors):
    return [torch.ones_like(tensor) for tensor in tensors]


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_quadratic_with_two_curvatures(backend):
    curvature, w = double([1.0, 3.0]), parameter([3.0, 4 / 3])
    (grad,) = torch.autograd.grad(0.5 * (curvature * w * w).sum(), [w])
    with perturb([w], [grad], rho=0.5, backend=backend) as perturbation:
        assert w.tolist() == pytest.approx([3.3, 4 / 3 + 0.4], abs=ABS)
        (sharp,) = torch.autograd.grad(0.5 * (curvature * w * w).sum(), [w])
    assert sharp.tolist() == pytest.approx([3.3, 5.2], abs=ABS)
    assert w.tolist() == [3.0, 4 / 3]
    assert perturbation.norm.item() == pytest.approx(5, abs=ABS)


def test_one_norm_over_all_tensors(backend):
    tensors = [double([0.0]), double([[0.0]])]
    with perturb(tensors, [double([3.0]), double([[4.0]])], rho=1.0, backend=backend) as perturbation:
        assert [tensor.item() for tensor in tensors] == pytest.approx([0.6, 0.8], abs=ABS)
        assert perturbation.norm.shape == () and perturbation.norm.item() == pytest.approx(5, abs=ABS)
    assert [tensor.item() for tensor in tensors] == [0.0, 0.0]


def test_one_norm_over_two_dtypes(backend):
    tensors = [torch.zeros(1), double([0.0]), torch.zeros(1, dtype=torch.bfloat16)]
    grads = [torch.full_like(tensor, value) for tensor, value in zip(tensors, (2.0, 3.0, 6.0), strict=True)]
    with perturb(tensors, grads, rho=7.0, backend=backend) as perturbation:
        assert [tensor.item() for tensor in tensors] == pytest.approx([2.0, 3.0, 6.0])
        assert perturbation.norm.item() == pytest.approx(7)


def test_adaptive(backend):
    """T g = (2, 2) with T = |w| = (2, 1/2); e = rho T^2 g / ||T g|| = rho (4, 1) / sqrt(8)."""
    w = double([2.0, -0.5])
    with perturb([w], [double([1.0, 4.0])], rho=0.5, adaptive=True, backend=backend) as perturbation:
        assert perturbation.norm.item() == pytest.approx(math.sqrt(8), abs=ABS)
        assert w.tolist() == pytest.approx([2 + 0.5 * 4 / math.sqrt(8), -0.5 + 0.5 / math.sqrt(8)], abs=ABS)


def test_a_given_norm_is_divided_by(backend):
    w, norm = double([0.0]), double(20.0)
    with perturb([w], [double([4.0])], rho=1.0, norm=norm, backend=backend) as perturbation:
        assert w.item() == pytest.approx(0.2, abs=ABS) and perturbation.norm.item() == 20
    for given in (double([20.0]), torch.tensor(20.0), double(20.0).requires_grad_()):
        with perturb([w], [double([4.0])], rho=1.0, norm=given, backend=backend) as perturbation:
            assert w.item() == pytest.approx(0.2, abs=1e-7)
            assert perturbation.norm.shape == () and not perturbation.norm.requires_grad


def test_perturb_eps_is_added_to_the_norm(backend):
    w = double([0.0])
    with perturb([w], [double([1.0])], rho=1.0, perturb_eps=1.0, backend=backend):
        assert w.item() == pytest.approx(0.5, abs=ABS)


@pytest.mark.parametrize("rho", [0.25, torch.tensor(0.25), double(0.25), torch.tensor(1), 1, True])
def test_rho_is_a_number_or_a_tensor_on_the_cpu(rho):
    w = double([0.0])
    with perturb([w], [double([-8.0])], rho.cpu() if isinstance(rho, torch.Tensor) else rho):
        assert w.item() == pytest.approx(-float(rho), abs=ABS)


def test_rho_zero_and_the_default():
    w = double([0.5])
    with perturb([w], [double([2.0])], 0):
        assert w.item() == 0.5
    with perturb([w], [double([2.0])]):
        assert w.item() == pytest.approx(0.55, abs=ABS)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_zero_or_broken_gradient_moves_nothing(backend, value):
    w, other = double([1.0, -0.0]), double([5.0])
    before = snapshot([w, other])
    with perturb([w, other], [double([value, 0.0]), double([0.0])], rho=1.0, backend=backend) as perturbation:
        assert_same_bits([w, other], before)
        assert perturbation.is_perturbed and not 0 < perturbation.norm.item() < math.inf
    assert_same_bits([w, other], before)


def test_tensors_without_a_gradient_stay_and_do_not_count():
    first, second = double([1.0]), double([1.0])
    with perturb([first, second], [None, double([2.0])], rho=1.0) as perturbation:
        assert (first.item(), second.item()) == (1.0, pytest.approx(2.0, abs=ABS))
        assert perturbation.norm.item() == 2


@pytest.mark.parametrize("how", ["no tensors", "no gradients", "grad is None"])
def test_nothing_to_move(how):
    tensors = [] if how == "no tensors" else [parameter([1.0]), parameter([2.0])]
    grads = None if how == "grad is None" else [None] * len(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with perturb(tensors, grads) as perturbation:
            assert perturbation.norm.shape == () and perturbation.norm.item() == 0
            assert perturbation.is_perturbed
        assert not perturbation.is_perturbed
        perturb(tensors, grads)  # dropped: nothing has to be restored, and nobody needs to hear of it
        gc.collect()
    assert [tensor.item() for tensor in tensors] == [1.0, 2.0][: len(tensors)]


def test_gradients_left_out_are_those_of_the_tensors():
    w, b = parameter([3.0]), parameter([0.0])
    (w * 4).sum().backward()
    with perturb(iter([w, b]), rho=1.0):  # any iterable, as model.parameters() is one
        assert w.item() == pytest.approx(4.0, abs=ABS) and b.item() == 0
        assert w.grad.item() == 4  # left alone: perturb() does not know what else it is needed for
    assert w.item() == 3


# ---- the optimizer's numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_the_bits_are_those_of_the_optimizer(backend, dtype, adaptive):
    generator = torch.Generator().manual_seed(3)
    dtypes = DTYPES if dtype == "mixed" else (dtype,) * 4
    shapes = ((7, 5), (), (9000,), (3, 4, 2))
    values = [randn(shape, generator, torch.float64).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)]
    grads = [randn(shape, generator, torch.float64).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)]
    grads[1] = None if dtype == torch.float64 else grads[1]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = SAM(params, torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1, backend=backend)
    optimizer.first_step()
    expected = snapshot(params)
    optimizer.restore()
    before = snapshot(params)
    assert any(not torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    perturbation = perturb(params, grads, 0.3, adaptive=adaptive, backend=backend)
    assert_same_bits(params, expected)
    perturbation.restore()
    assert_same_bits(params, before)
    with perturb(values, grads, 0.3, adaptive=adaptive, backend=backend):  # plain tensors just the same
        assert_same_bits(values, expected)
    assert_same_bits(values, before)


def test_gradients_of_another_dtype_than_their_tensors(backend):
    w, grad = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), double([3.0, 4.0])
    with perturb([w], [grad], rho=5.0, backend=backend):
        assert w.tolist() == [4.0, 6.0]
    assert w.tolist() == [1.0, 2.0]


LAYOUTS = {
    "transposed": lambda: torch.randn(4, 3).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "with gaps": lambda: torch.randn(4, 6)[:, ::2],
    "empty": lambda: torch.randn(0, 3),
    "unaligned": lambda: torch.randn(9)[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_nothing_beside_it(backend, layout):
    w = LAYOUTS[layout]()
    whole = w if w._base is None else w._base
    before, address = whole.clone(), w.data_ptr()
    grad = torch.randn(w.shape)
    with perturb([w, torch.zeros(1)], [grad, torch.ones(1)], rho=0.5, backend=backend) as perturbation:
        moved = torch.empty_like(w).copy_(w)
        inside = whole.clone()
    torch.testing.assert_close(moved, w + 0.5 * grad / perturbation.norm)
    assert torch.equal(whole, before) and w.data_ptr() == address
    if layout == "with gaps":
        assert torch.equal(inside[:, 1::2], before[:, 1::2])


# ---- restoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_bit_for_bit_and_in_place(backend, dtype):
    """-0.0 and subnormals: adding e and taking it away again would lose them."""
    w = torch.nn.Parameter(here(torch.tensor([-0.0, 1.0, -3.7, 6e-8, 0.1], dtype=dtype, device="cpu")))
    before, address = snapshot([w]), w.data_ptr()
    for _ in range(3):
        with perturb([w], [torch.full_like(w, 0.3)], rho=10.0, backend=backend):
            assert (w.detach() != 0).all()
        assert_same_bits([w], before)
        assert w.data_ptr() == address


def test_restore_is_idempotent(backend):
    w = double([1.0])
    perturbation = perturb([w], [double([1.0])], 1.0, backend=backend)
    assert isinstance(perturbation, Perturbation) and perturbation.is_perturbed and w.item() != 1.0
    perturbation.restore()
    assert not perturbation.is_perturbed and w.item() == 1.0
    w.fill_(7.0)
    perturbation.restore()
    restore(perturbation)
    assert w.item() == 7.0


def test_restore_as_a_function():
    w = double([1.0])
    perturbation = perturb([w], [double([1.0])], 1.0)
    assert restore(perturbation) is None and w.item() == 1.0
    with pytest.raises(TypeError) as error:
        restore([w])
    assert_one_sentence(error.value, "perturbation", "list", "perturb()")


def test_restored_by_hand_inside_the_block():
    w = double([1.0])
    with perturb([w], [double([1.0])], 1.0) as perturbation:
        perturbation.restore()
        w.fill_(7.0)
    assert w.item() == 7.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_passes_through_clean_weights(backend, error):
    w = double([1.0, 2.0])
    with pytest.raises(error, match="mine"), perturb([w], [double([1.0, 0.0])], 1.0, backend=backend):
        assert w[0].item() == pytest.approx(2.0)
        raise error("mine")
    assert w.tolist() == [1.0, 2.0]


def test_a_used_perturbation_cannot_be_entered_again():
    w = double([1.0])
    used = perturb([w], [double([1.0])], 1.0)
    used.restore()
    left = perturb([w], [double([1.0])], 1.0)
    with left:
        pass
    inside = perturb([w], [double([1.0])], 1.0)
    with inside:
        for perturbation in (used, left, inside):
            with pytest.raises(RuntimeError) as error, perturbation:
                pass
            assert_one_sentence(error.value, "with", "perturb()")
        assert w.item() == pytest.approx(2.0)  # entering it twice would have restored it at the inner exit
    assert w.item() == 1.0


def test_backups_are_freed_with_the_restore():
    w = double([1.0])
    perturbation = perturb([w], [double([1.0])], 1.0)
    backups = [weakref.ref(backup) for members in perturbation._moved._sets for backup in members.backups]
    assert [backup() is not None for backup in backups] == [True]
    perturbation.restore()
    assert backups[0]() is None


def test_autograd_sees_that_the_weights_moved(backend):
    """A graph recorded at w must not run backward at w + e in silence; one recorded inside must not, outside."""
    for where in ("inside", "outside"):
        w = parameter([2.0])
        loss = (w * w).sum()
        with perturb([w], [double([1.0])], 1.0, backend=backend):
            if where == "outside":
                loss = (w * w).sum()
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
        if where == "outside":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_in_inference_mode(backend):
    w = torch.nn.Parameter(torch.tensor([3.0]))
    with torch.inference_mode(), perturb([w], [torch.tensor([2.0])], 1.0, backend=backend):
        assert w.item() == pytest.approx(4.0)
    assert w.item() == 3.0


def test_a_model_converted_inside_comes_back_converted():
    model = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    with perturb(model.parameters(), ones(model.parameters()), 10.0):
        model.half()
    assert_same_bits(model.parameters(), [value.half() for value in before])


# ---- what is thrown while it is at work ------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_if_a_part_fails_no_part_has_moved(monkeypatch, when):
    """Two parts as with two devices: backends stand for those. The second fails, before or after it has moved."""
    first, second = double([1.0]), double([2.0])
    monkeypatch.setattr(functions, "partition", lambda *_: {("here", "foreach"): [0], ("there", "reference"): [1]})
    perturb_ = TensorSet.perturb_
    seen = []

    def failing(self, *arguments, **options):
        fails = self.params[0] is second
        if not (fails and when == "before"):
            perturb_(self, *arguments, **options)
        if fails:
            seen.append((first.item(), second.item()))
            raise Broken

    monkeypatch.setattr(TensorSet, "perturb_", failing)
    with pytest.raises(Broken) as caught:
        perturb([first, second], [double([3.0]), double([4.0])], 5.0)
    assert caught.tb is not None  # whoever looks at the traceback holds the call's frame: restoring cannot wait for it to go
    assert seen == [(pytest.approx(4.0), pytest.approx(6.0) if when == "after" else 2.0)]
    assert (first.item(), second.item()) == (1.0, 2.0)
    assert not moved._perturbed


def test_parts_share_one_norm(monkeypatch):
    monkeypatch.setattr(functions, "partition", lambda *_: {("here", "foreach"): [0], ("there", "reference"): [1]})
    tensors = [double([0.0]), double([0.0])]
    with perturb(tensors, [double([3.0]), double([4.0])], 1.0) as perturbation:
        assert [tensor.item() for tensor in tensors] == pytest.approx([0.6, 0.8], abs=ABS)
    assert perturbation.norm.item() == pytest.approx(5)


def test_a_restore_that_was_interrupted_can_be_taken_again(monkeypatch):
    w = double([1.0])
    perturbation = perturb([w], [double([1.0])], 1.0)
    restore_ = TensorSet.restore_

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorSet, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perturbation.restore()
    assert perturbation.is_perturbed and w.item() != 1.0
    monkeypatch.setattr(TensorSet, "restore_", restore_)
    perturbation.restore()
    assert not perturbation.is_perturbed and w.item() == 1.0


# ---- a handle that is lost -------------------------------------------------------------------------------------------


def test_a_lost_perturbation_is_restored_with_one_warning(backend):
    w = double([1.0])
    with pytest.warns(RuntimeWarning) as caught:
        perturb([w], [double([1.0])], 1.0, backend=backend)
        gc.collect()
    assert w.item() == 1.0
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_one_sentence(caught[0].message, "perturb()", "with", "restore()")


def test_a_lost_perturbation_in_a_cycle_is_restored():
    w = double([1.0])
    perturbation = perturb([w], [double([1.0])], 1.0)
    perturbation.itself = perturbation
    del perturbation
    with pytest.warns(RuntimeWarning):
        gc.collect()
    assert w.item() == 1.0


def test_a_lost_perturbation_does_not_undo_torch_s_fused_optimizers():
    """Which leave no trace in version counters."""
    w = torch.nn.Parameter(torch.tensor([1.0]))
    other = torch.nn.Parameter(torch.tensor([1.0]))
    lost, kept = perturb([w], [torch.ones(1)], 0.5), perturb([other], [torch.ones(1)], 0.5)
    optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
    w.grad = torch.ones(1)
    optimizer.step()
    here = w.item()
    with pytest.warns(RuntimeWarning) as caught:
        del lost
        gc.collect()
    assert w.item() == here and "stay as they are" in str(caught[0].message)
    with pytest.warns(RuntimeWarning, match="are restored"):
        del kept  # nobody has stepped that one
        gc.collect()
    assert other.item() == 1.0
    assert not moved._watching


@pytest.mark.parametrize("view", [lambda w: w.detach(), lambda w: w[:1]])
def test_a_perturbation_of_a_view_on_top_is_nobody_s_writing(view):
    w = double([1.0, 2.0])
    lost = perturb([w], [double([1.0, 1.0])], 1.0)
    with perturb([view(w)], [torch.ones_like(view(w))], 1.0):
        pass
    with pytest.warns(RuntimeWarning, match="are restored"):
        del lost
        gc.collect()
    assert w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("nested", [False, True])
def test_a_lost_perturbation_does_not_undo_what_was_trained_since(nested):
    """The garbage collector chooses the moment: a traceback may have held the handle for an hour."""
    w, other = double([1.0]), double([1.0])
    lost = perturb([w, other], [double([1.0])] * 2, 1.0)
    if nested:
        with perturb([w], [double([1.0])], 1.0):
            other.add_(5.0)
    else:
        w.add_(5.0)
    here = w.item(), other.item()
    with pytest.warns(RuntimeWarning) as caught:
        del lost
        gc.collect()
    assert (w.item(), other.item()) == here
    assert_one_sentence(caught[0].message, "stay as they are")
    # And nothing stands in the way of the next one.
    with perturb([w], [double([1.0])], 1.0):
        pass
    assert w.item() == here[0]


def test_a_lost_perturbation_below_another_is_restored_after_it():
    w = double([1.0])
    for inside in (lambda: None, lambda: w.mul_(3.0)):  # what is written inside is the upper one's to undo
        lost, upper = perturb([w], [double([1.0])], 1.0), None
        upper = perturb([w], [double([1.0])], 1.0)
        inside()
        with pytest.warns(RuntimeWarning, match="when the later perturbations of them are"):
            del lost
            gc.collect()
        upper.restore()
        assert w.item() == 1.0


def test_a_lost_perturbation_that_was_written_before_another_stays():
    w = double([1.0])
    lost = perturb([w], [double([1.0])], 1.0)
    w.add_(5.0)
    upper = perturb([w], [double([1.0])], 1.0)
    with pytest.warns(RuntimeWarning, match="later"):
        del lost
        gc.collect()
    with pytest.warns(RuntimeWarning, match="stay as they are"):
        upper.restore()
    assert w.item() == pytest.approx(7.0)


def test_restored_ones_are_dropped_in_silence():
    w = double([1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perturb([w], [double([1.0])], 1.0).restore()
        with perturb([w], [double([1.0])], 1.0):
            pass
        gc.collect()
    assert w.item() == 1.0


def test_the_tensors_live_as_long_as_they_are_perturbed_and_no_longer():
    w = double([1.0])
    perturbation, alive = perturb([w], [double([1.0])], 1.0), weakref.ref(w)
    del w
    gc.collect()
    assert alive() is not None
    perturbation.restore()
    assert alive() is None


# ---- more than one ---------------------------------------------------------------------------------------------------


def test_nested_over_the_same_tensor(backend):
    w = double([0.0])
    with perturb([w], [double([1.0])], 1.0, backend=backend):
        with perturb([w], [double([1.0])], 2.0, backend=backend):
            assert w.item() == pytest.approx(3.0, abs=ABS)
        assert w.item() == pytest.approx(1.0, abs=ABS)
        with perturb([w], [double([-1.0])], 5.0, backend=backend):
            assert w.item() == pytest.approx(-4.0, abs=ABS)
    assert w.item() == 0.0


OVERLAPS = {
    "the same tensor": lambda w, flat: [w],
    "one of several": lambda w, flat: [double([9.0]), w],
    "its .data": lambda w, flat: [w.data],
    "detached": lambda w, flat: [w.detach()],
    "a part of it": lambda w, flat: [w.detach()[2:3]],
    "a part with gaps": lambda w, flat: [w.detach()[::3]],
    "all that it is a part of": lambda w, flat: [flat],
    "a wide step into it": lambda w, flat: [flat[0:6:5]],
    "over a small one in its gaps": lambda w, flat: [flat[0:6:5], flat[1:3]],
    "its bytes as another dtype": lambda w, flat: [w.detach().view(torch.float32)],
}


@pytest.mark.parametrize("order", ["over", "under"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_outer_one_first_is_refused_before_anything_is_written(overlap, order):
    flat = torch.arange(12, dtype=torch.float64)
    w = torch.nn.Parameter(flat[4:8])
    before, lists = flat.clone(), [[w], OVERLAPS[overlap](w, flat)]
    if order == "under":
        lists.reverse()
    outer = perturb(lists[0], ones(lists[0]), 1.0)
    between = snapshot([flat])
    inner = perturb(lists[1], ones(lists[1]), 1.0)
    inside = snapshot([flat])
    with pytest.raises(RuntimeError) as error:
        outer.restore()
    assert_one_sentence(error.value, "restore()", "reverse order")
    assert_same_bits([flat], inside)
    assert outer.is_perturbed and inner.is_perturbed
    inner.restore()
    assert_same_bits([flat], between)
    outer.restore()
    assert_same_bits([flat], [before])


def test_the_same_parameters_at_another_address_are_the_same():
    """What will be written is where the parameter is then."""
    model = torch.nn.Linear(2, 1)
    before = [p.detach().half() for p in model.parameters()]
    outer = perturb(model.parameters(), ones(model.parameters()), 1.0)
    model.half()
    inner = perturb(model.parameters(), ones(model.parameters()), 1.0)
    with pytest.raises(RuntimeError, match="reverse order"):
        outer.restore()
    inner.restore()
    outer.restore()
    assert_same_bits(model.parameters(), before)


class Tagged(torch.Tensor):
    """A subclass's memory may be anything: it is known by its identity, and served by torch's own calls."""


def test_tensors_of_a_subclass():
    w, before = double([1.0, 2.0]).as_subclass(Tagged), double([1.0, 2.0])
    outer = perturb([w], [double([3.0, 4.0])], 5.0)
    assert w.tolist() == pytest.approx([4.0, 6.0], abs=ABS)
    inner = perturb([w], [double([3.0, 4.0])], 5.0)
    with pytest.raises(RuntimeError, match="reverse order"):
        outer.restore()
    inner.restore()
    outer.restore()
    assert torch.equal(w, before) and type(w) is Tagged


def test_three_deep_only_the_innermost_may_go():
    w = double([0.0])
    stack = [perturb([w], [double([1.0])], 1.0) for _ in range(3)]
    for perturbation in stack[:2]:
        with pytest.raises(RuntimeError, match="reverse order"):
            perturbation.restore()
    for level in (2, 1, 0):
        assert w.item() == pytest.approx(level + 1, abs=ABS)
        stack[level].restore()
    assert w.item() == 0.0


def test_others_come_back_in_any_order():
    """Neighbours in one block of memory, a tensor without a gradient, tensors of another model: none of these is shared."""
    flat = torch.zeros(8, dtype=torch.float64)
    a, b, c, empty = flat[:3], flat[3:8], double([0.0]), flat[3:3]
    first = perturb([a, b, c], [torch.ones_like(a), None, None], 1.0)
    second = perturb([b, empty], [torch.ones_like(b), torch.ones_like(empty)], 1.0)
    third = perturb([c, a], [torch.ones_like(c), None], 1.0)
    first.restore()
    assert a.tolist() == [0.0] * 3 and b[0].item() > 0 and c.item() > 0
    second.restore()
    third.restore()
    assert flat.tolist() == [0.0] * 8 and c.item() == 0.0


def test_what_lies_over_several_is_in_the_way_of_each():
    a, b, c = (double([0.0]) for _ in range(3))
    below = [perturb([tensor], [double([1.0])], 1.0) for tensor in (a, b, c)]
    above = perturb([b, a], [double([1.0]), double([1.0])], 1.0)
    below[2].restore()
    for perturbation in below[:2]:
        with pytest.raises(RuntimeError):
            perturbation.restore()
    above.restore()
    for perturbation in below[:2]:
        perturbation.restore()
    assert [a.item(), b.item(), c.item()] == [0.0] * 3


def test_a_long_outer_block_holds_on_to_nothing_of_the_inner_ones():
    w = double([0.0])
    with perturb([w], [double([1.0])], 1.0) as outer:
        for _ in range(50):
            with perturb([w], [double([1.0])], 1.0):
                pass
        assert len(outer._moved._above) == 0


def test_leaving_the_outer_block_by_an_exception_restores_what_is_inside_it():
    """An inner perturbation kept by hand, whose restore() is never reached: the weights are clean where the error arrives."""
    w, other = double([1.0]), double([5.0])
    kept = []
    with pytest.raises(Broken), perturb([w], [double([1.0])], 1.0):
        kept.append(perturb([w], [double([1.0])], 1.0))
        kept.append(perturb([w, other], [double([1.0]), double([1.0])], 1.0))
        kept.append(perturb([other], [double([1.0])], 1.0))
        raise Broken
    assert w.item() == 1.0 and other.item() == 5.0
    assert not any(perturbation.is_perturbed for perturbation in kept)
    for perturbation in kept:
        perturbation.restore()
    assert w.item() == 1.0 and other.item() == 5.0


def test_leaving_the_outer_block_without_one_says_what_is_open():
    w = double([1.0])
    outer = perturb([w], [double([1.0])], 1.0)
    with pytest.raises(RuntimeError, match="reverse order"), outer:
        inner = perturb([w], [double([1.0])], 1.0)
    assert w.item() == pytest.approx(3.0)
    inner.restore()
    outer.restore()
    assert w.item() == 1.0


def test_an_outer_one_that_is_lost_waits_for_the_inner_one():
    w = double([1.0])
    stack = [perturb([w], [double([1.0])], 1.0) for _ in range(3)]
    with pytest.warns(RuntimeWarning):
        del stack[0]
        gc.collect()
    assert w.item() == pytest.approx(4.0)
    with pytest.warns(RuntimeWarning):
        del stack[0]
        gc.collect()
    assert w.item() == pytest.approx(4.0)
    stack[0].restore()
    assert w.item() == 1.0


# ---- two networks ----------------------------------------------------------------------------------------------------


def test_two_networks_with_one_of_them_perturbed(backend):
    """The generator's step in a GAN's way: its loss goes through the discriminator, which stays where it is."""
    generator, discriminator = Regression(seed=1), torch.nn.Linear(3, 1).double()
    before = snapshot(generator.params), snapshot(discriminator.parameters())

    def loss():
        return discriminator(generator.model(generator.x)).exp().mean()

    grads = torch.autograd.grad(loss(), generator.params)
    clean = loss().item()
    with perturb(generator.params, grads, rho=0.1, backend=backend):
        assert_same_bits(discriminator.parameters(), before[1])
        assert loss().item() > clean
        sharp = torch.autograd.grad(loss(), generator.params)
    assert_same_bits(generator.params, before[0])
    assert any(not torch.equal(a, b) for a, b in zip(grads, sharp, strict=True))

    twin = copy.deepcopy(generator.model)
    with torch.no_grad():
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for param, grad in zip(twin.parameters(), grads, strict=True):
            param += 0.1 * grad / norm
    by_hand = torch.autograd.grad(discriminator(twin(generator.x)).exp().mean(), list(twin.parameters()))
    torch.testing.assert_close(list(sharp), list(by_hand))


def test_two_networks_with_a_common_norm_in_one_call_and_in_two(backend):
    one, two = Regression(seed=1), Regression(seed=2)
    grads = [torch.autograd.grad(net.loss(), net.params) for net in (one, two)]
    both = [*one.params, *two.params]
    before = snapshot(both)
    with perturb(both, [*grads[0], *grads[1]], rho=0.2, backend=backend) as perturbation:
        together, norm = snapshot(both), perturbation.norm
    lengths = [torch.stack([grad.norm() for grad in each]).norm() for each in grads]
    assert norm.item() == pytest.approx(math.hypot(*map(float, lengths)), rel=1e-12)
    with (
        perturb(one.params, grads[0], rho=0.2, norm=norm, backend=backend),
        perturb(two.params, grads[1], rho=0.2, norm=norm, backend=backend),
    ):
        assert_same_bits(both, together)
    assert_same_bits(both, before)
    with perturb(one.params, grads[0], rho=0.2, backend=backend) as alone:
        assert alone.norm.item() == pytest.approx(lengths[0].item(), rel=1e-12)
        assert any(not torch.equal(a, b) for a, b in zip(snapshot(one.params), together, strict=False))


def test_a_whole_step_by_hand_is_the_optimizers(backend):
    ours, theirs = Regression(seed=4), Regression(seed=4)
    base = torch.optim.SGD(ours.params, lr=0.1)
    optimizer = SAM(theirs.params, torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    for _ in range(3):
        base.zero_grad()
        ours.evaluate()
        with perturb(ours.params, rho=0.1, backend=backend):
            base.zero_grad()
            ours.evaluate()
        base.step()
        optimizer.step(theirs.evaluate)
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-14, atol=0)


@pytest.mark.parametrize("how", ["with", "by hand"])
def test_in_a_compiled_step(how):
    ours, theirs = Regression(seed=5), Regression(seed=5)
    bases = [torch.optim.SGD(net.params, lr=0.1) for net in (ours, theirs)]

    def step(net, base):
        base.zero_grad()
        net.loss().backward()
        if how == "with":
            with perturb(net.params, rho=0.1):
                base.zero_grad()
                net.loss().backward()
        else:
            perturbation = perturb(net.params, rho=0.1)
            base.zero_grad()
            net.loss().backward()
            perturbation.restore()
        base.step()

    compiled = torch.compile(step, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")  # torch's word for having looked inside
        for _ in range(3):
            compiled(ours, bases[0])
            step(theirs, bases[1])
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-12, atol=0)
    torch.compiler.reset()


# ---- bad input -------------------------------------------------------------------------------------------------------


def two():
    return [double([1.0, 2.0]), double([3.0])]


def refused(error, words, *arguments, watched=(), **options):
    before = snapshot(watched)
    with pytest.raises(error) as caught:
        perturb(*arguments, **options)
    assert_one_sentence(caught.value, "expected", "got", *words)
    assert_same_bits(watched, before)


@pytest.mark.parametrize("name", ["rho", "perturb_eps"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan)])
def test_numbers_out_of_range(name, value):
    tensors = two()
    value = value.cpu() if isinstance(value, torch.Tensor) else value
    refused(ValueError, [name, ">= 0"], tensors, ones(tensors), watched=tensors, **{name: value})


@pytest.mark.parametrize("value", ["0.1", None, torch.ones(2), torch.ones(1), 1j, [0.1]])
def test_rho_that_is_no_number(value):
    tensors = two()
    refused(TypeError, ["rho", type(value).__name__], tensors, ones(tensors), value, watched=tensors)


def test_rho_on_another_device():
    refused(ValueError, ["rho", "meta"], two(), ones(two()), torch.tensor(0.1, device="meta"))


@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_different_lengths(count):
    tensors = two()
    refused(ValueError, ["grads", "2", str(count)], tensors, ones(tensors * 2)[:count], watched=tensors)


def test_a_gradient_of_another_shape():
    tensors = two()
    refused(ValueError, ["grads[1]", "(1,)", "(2,)"], tensors, [None, torch.ones(2)], watched=tensors)


def test_a_gradient_on_another_device():
    tensors = two()
    elsewhere = torch.ones(1, dtype=torch.float64, device="meta")
    refused(ValueError, ["grads[1]", "meta", str(default())], tensors, [torch.ones(2), elsewhere], watched=tensors)


@pytest.mark.parametrize("which", ["tensors", "grads"])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.ones(1, dtype=torch.int64), "int64"),
        (lambda: torch.ones(1, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(1).to_sparse(), "sparse"),
        (lambda: 3.0, "float"),
    ],
)
def test_what_cannot_be_read(which, make, word):
    good = two()
    tensors, grads = [good[0], make()], [torch.ones(2), torch.ones(1)]
    if which == "grads":
        tensors, grads = good, [torch.ones(2), make()]
    refused(TypeError, [f"{which}[1]", word], tensors, grads, watched=[good[0]])


def test_a_single_tensor_is_not_taken_apart():
    w = double([[1.0, 2.0], [3.0, 4.0]])
    refused(TypeError, ["tensors", "[tensor]"], w, [torch.ones(2)] * 2, watched=[w])
    refused(TypeError, ["grads", "[tensor]"], list(w), torch.ones(2, 2), watched=[w])


def test_the_result_of_an_operation():
    w = parameter([1.0])
    refused(ValueError, ["tensors[0]", "leaf"], [w * 2], [double([1.0])])
    refused(ValueError, ["tensors[0]", "leaf"], [w * 2])


def test_an_expanded_tensor():
    refused(ValueError, ["tensors[0]", "expanded"], [double([1.0]).expand(3)], [torch.ones(3)])


@pytest.mark.parametrize("kind", ["twice", "view", "tied"])
def test_memory_under_two_tensors(kind):
    w = torch.nn.Parameter(double([1.0, 2.0, 3.0]))
    tensors = {"twice": [w, w], "view": [w, w.detach()[1:]], "tied": [w, torch.nn.Parameter(w.data)]}[kind]
    refused(ValueError, ["once" if kind == "twice" else "memory"], tensors, ones(tensors), watched=[w])


def test_memory_under_a_tensor_that_stays_is_nobodys_business():
    w = double([1.0, 2.0, 3.0])
    with perturb([w, w[1:]], [torch.ones_like(w), None], 1.0):
        pass
    assert w.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", [3.0, torch.ones(2), torch.tensor(3), torch.tensor(1.0, dtype=torch.bfloat16)])
def test_a_norm_that_is_no_scalar(value):
    tensors = two()
    refused(TypeError, ["norm", "one element"], tensors, ones(tensors), norm=value, watched=tensors)


@pytest.mark.cpu_only
def test_a_negative_norm():
    tensors = two()
    refused(ValueError, ["norm", "-2.0"], tensors, ones(tensors), norm=torch.tensor(-2.0), watched=tensors)


@pytest.mark.parametrize("tensors", [[], None])
def test_an_unknown_backend(tensors):
    tensors = two() if tensors is None else tensors
    refused(ValueError, ["backend", "'fast'"], tensors, ones(tensors), backend="fast", watched=tensors)


def test_a_backend_that_cannot_serve():
    with pytest.raises(RuntimeError) as error:
        perturb([torch.ones(1, device="meta")], [torch.ones(1, device="meta")], backend="native")
    assert_one_sentence(error.value, "native", "meta")


# ---- CUDA ------------------------------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_on_a_card_nothing_waits():
    w, grad = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    before = w.clone()
    with perturb([w], [grad]):
        pass
    torch.cuda.set_sync_debug_mode("error")
    try:
        with perturb([w], [grad], rho=1.0) as perturbation:
            moved = w.clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(moved, before + grad / perturbation.norm)
    assert torch.equal(w, before)


@pytest.mark.gpu
@needs_cuda
def test_a_capture_is_refused():
    w = torch.randn(8, device="cuda")
    before, outside = w.clone(), perturb([w], [torch.ones_like(w)])
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for move in (lambda: perturb([w], [w]), outside.restore):
            with pytest.raises(RuntimeError, match="capture"):
                move()
        torch.zeros(1, device="cuda")
    outside.restore()
    assert torch.equal(w, before)


@pytest.mark.gpu
@needs_cuda
def test_restored_on_another_stream_than_moved_on():
    """Neither may the restore overtake the perturbation, nor may the backup's memory be given out before it was read."""
    w = torch.zeros(1 << 22, device="cuda")
    grad, side = torch.ones_like(w), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    perturbation = perturb([w], [grad], rho=1.0)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        perturbation.restore()
    torch.full_like(w, 7.0)  # takes the freed backup's memory
    torch.cuda.synchronize()
    assert not w.any()
