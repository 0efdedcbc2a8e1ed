"""The ends of the range: nothing overflows into a silent plain step, nothing that is not finite moves a weight."""

import math

import pytest
import torch

from sam_fused import ops
from tests.devices import here
from tests.ops.cases import BF16, FP16, FP32, FP64, STORAGES
from tests.ops.runner import Lists, table

RHO = 0.05


def through(runner, op, lists, *args, **kwargs):
    """``op`` through a door; the prepared one may have to build its set first."""
    from sam_fused.ops.prepared import TensorSet

    if not runner.startswith("prepared"):
        if op == "grad_norm":
            return ops.grad_norm(lists.grads, lists.params if any(kwargs.get("scaling", ())) else (), backend=runner, **kwargs)
        return ops.perturb_(lists.params, lists.backups, lists.grads, *args, backend=runner, **kwargs)
    inv_scale = kwargs.pop("inv_scale", None)
    tensors = TensorSet(
        lists.params, lists.backups, backend=runner.removeprefix("prepared").removeprefix("-") or "native", **kwargs
    )
    grads = tensors.checked(lists.grads)
    assert grads.addresses is not None
    if op == "grad_norm":
        return tuple(t.clone() for t in tensors.grad_norm(grads, inv_scale=inv_scale))
    return tensors.perturb_(grads, *args, inv_scale=inv_scale)


def lists_of(*grads, weight=1.0):
    params = [torch.full_like(grad, weight) for grad in grads]
    return Lists(params=params, backups=[torch.zeros_like(p) for p in params], grads=list(grads))


NORMS = [
    ("fp32-tiny", FP32, 1e-25, 100, 1e-24),
    ("fp32-huge", FP32, 1e30, 100, 1e31),
    ("bf16-tiny", BF16, 2.0**-83, 100, 10 * 2.0**-83),
    ("bf16-huge", BF16, 2.0**100, 100, 10 * 2.0**100),
    ("fp16-squares-overflow", FP16, 300.0, 10_000, 30_000.0),
    ("fp16-largest", FP16, 65504.0, 10_000, 6_550_400.0),
    ("fp16-smallest", FP16, 2.0**-24, 10_000, 100 * 2.0**-24),
    ("fp64-huge", FP64, 1e200, 100, 1e201),
    ("fp64-tiny", FP64, 1e-200, 100, 1e-199),
    ("fp64-subnormal", FP64, 2.0**-1070, 10_000, 100 * 2.0**-1070),
    ("fp64-largest", FP64, 1.5e308, 1, 1.5e308),
    # Either side of where an accumulator's scale changes.
    ("fp64-2^400", FP64, 2.0**400, 64, 2.0**403),
    ("fp64-above-2^400", FP64, 2.0**401, 64, 2.0**404),
    ("fp64-below-2^-400", FP64, 2.0**-401, 64, 2.0**-398),
]


@pytest.mark.parametrize("name, storage, element, count, norm", NORMS, ids=[n[0] for n in NORMS])
def test_norm_over_the_range(name, storage, element, count, norm, runner):
    lists = lists_of(torch.full((count,), element, dtype=storage.dtype))
    found, found_inf = through(runner, "grad_norm", lists)
    assert float(found) == pytest.approx(norm, rel=storage.norm_tolerance, abs=0)
    assert float(found_inf) == 0


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_perturbation_has_length_rho_over_the_range(storage, runner):
    """Elements of 1e30: |e| = rho, where squares in fp32 would be infinite and c zero. The halves at their own extremes."""
    element = {"fp32": 1e30, "fp64": 1e200, "bf16": 2.0**100, "fp16": 60000.0}[storage.name]
    lists = lists_of(torch.full((4, 4), element, dtype=storage.dtype), weight=0.0)
    norm, _ = through(runner, "grad_norm", lists)
    through(runner, "perturb_", lists, norm, table([[4.0, 1e-12]]))
    assert lists.params[0].double().norm().item() == pytest.approx(4.0, rel=4 * storage.roundoff)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_tiny_gradients_still_move(storage, runner):
    """c is large here: 5e5 for fp16's smallest gradients, far above fp16's largest number."""
    element = {"fp32": 1e-25, "fp64": 1e-200, "bf16": 2.0**-83, "fp16": 2.0**-24}[storage.name]
    lists = lists_of(torch.full((4, 4), element, dtype=storage.dtype), weight=0.0)
    norm, _ = through(runner, "grad_norm", lists)
    through(runner, "perturb_", lists, norm, table([[4.0, 0.0]]))
    assert lists.params[0].double().norm().item() == pytest.approx(4.0, rel=4 * storage.roundoff)


@pytest.mark.parametrize("storage", [FP16, BF16], ids=lambda s: s.name)
def test_adaptive_products_of_halves_do_not_vanish(storage, runner):
    """w (w g) of small fp16 values is below fp16's smallest number: it must not be formed in fp16."""
    w, g = 0.02, 1e-4
    lists = lists_of(torch.full((10_000,), g, dtype=storage.dtype), weight=w)
    norm, _ = through(runner, "grad_norm", lists, scaling=[1])
    through(runner, "perturb_", lists, norm, table([[2.0, 1e-12]]), scaling=[1])
    clean, grad = float(lists.backups[0][0]), float(lists.grads[0][0])
    wanted = clean + 2.0 * clean * clean * grad / (100 * clean * grad)
    spacing = torch.tensor(clean, dtype=torch.float64).log2().floor().exp2().item() * 2 * storage.roundoff
    assert (lists.params[0].double() - wanted).abs().max().item() <= spacing


def test_ones(runner):
    """2^25 ones: a sum in fp32 stops at 2^24."""
    torch.set_num_threads(2)
    lists = Lists(params=[torch.empty(2**25)], grads=[torch.ones(2**25)])
    lists.backups = lists.params
    norm, _ = through(runner, "grad_norm", lists)
    assert float(norm) == pytest.approx(5792.618751, rel=1e-6)


def test_a_large_tensor_of_random_values(runner):
    """All ones add up exactly in any order; these do not: fp32 sums over one end to the other are off by 2e-3."""
    torch.set_num_threads(2)
    grad = here(torch.rand(2**24 + 2, generator=torch.Generator().manual_seed(2), device="cpu"))
    wanted = math.sqrt(float(torch.dot(grad.double(), grad.double())))
    lists = Lists(params=[grad], backups=[grad], grads=[grad])
    for shape in ((-1,), (3, -1)):
        lists.grads = lists.params = lists.backups = [grad.reshape(shape)]
        norm, _ = through(runner, "grad_norm", lists)
        assert float(norm) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_zeros_among_gradients(storage, runner):
    """Half of LoRA's gradients are zero at its start; neither they nor what only looks like zero may spoil the norm."""
    grads = [torch.zeros(300, dtype=storage.dtype), torch.ones(9, dtype=storage.dtype), torch.zeros(2, dtype=storage.dtype)]
    norm, found_inf = through(runner, "grad_norm", lists_of(*grads))
    assert float(norm) == 3 and float(found_inf) == 0


@pytest.mark.parametrize("storage", [FP32, FP64], ids=lambda s: s.name)
def test_one_huge_among_tiny(storage, runner):
    tiny, huge = (1e-25, 1e25) if storage is FP32 else (1e-200, 1e200)
    grads = [torch.full((1000,), tiny, dtype=storage.dtype) for _ in range(3)]
    grads[1][500] = huge
    norm, _ = through(runner, "grad_norm", lists_of(*grads))
    assert float(norm) == pytest.approx(huge, rel=storage.norm_tolerance)
    grads[1][500] = 0.0
    norm, _ = through(runner, "grad_norm", lists_of(*grads))
    assert float(norm) == pytest.approx(tiny * math.sqrt(2999), rel=storage.norm_tolerance)


def test_accumulators_of_fp64_meet(runner):
    """Tiny and middling together: sqrt(3^2 + 4^2) across the border between two accumulators."""
    for unit in (2.0**399, 2.0**-401):
        lists = lists_of(torch.tensor([3.0 * unit, 4.0 * unit], dtype=torch.float64))
        assert float(through(runner, "grad_norm", lists)[0]) == pytest.approx(5.0 * unit, rel=1e-14)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_not_finite_is_seen_anywhere_and_moves_nothing(bad, storage, runner):
    for tensor in (0, -1):
        for place in (0, -1):
            grads = [torch.ones(size, dtype=storage.dtype) for size in (1025, 3, 700)]
            grads[tensor][place] = bad
            lists = lists_of(*grads)
            before = [p.clone() for p in lists.params]
            norm, found_inf = through(runner, "grad_norm", lists)
            assert float(found_inf) == 1.0 and not math.isfinite(float(norm))
            through(runner, "perturb_", lists, norm, table([[RHO, 1e-12]]))
            assert all(torch.equal(p, b) for p, b in zip(lists.params, before, strict=True))
            assert all(torch.equal(p, b) for p, b in zip(lists.backups, before, strict=True))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("perturb_eps", [0.0, 1e-12])
def test_zero_gradients_move_nothing(storage, perturb_eps, runner):
    lists = lists_of(torch.zeros(600, dtype=storage.dtype), torch.zeros(3, dtype=storage.dtype))
    norm, found_inf = through(runner, "grad_norm", lists)
    assert float(norm) == 0 and float(found_inf) == 0
    through(runner, "perturb_", lists, norm, table([[RHO, perturb_eps]]))
    assert all(bool((t == 1).all()) for t in (*lists.params, *lists.backups))


def test_rho_zero_is_bit_identical_whatever_the_gradients(runner):
    """A product with zero would turn an infinite gradient into NaN, and -0.0 into 0.0."""
    for storage in STORAGES:
        grad = torch.tensor([math.inf, -math.inf, math.nan, 1.0, -0.0], dtype=storage.dtype)
        for norm in (1.0, math.inf):
            lists = lists_of(grad, weight=-0.0)
            through(runner, "perturb_", lists, torch.tensor(norm), table([[0.0, 1e-12]]))
            assert torch.equal(lists.params[0], torch.full_like(grad, -0.0))
            assert bool(torch.signbit(lists.params[0]).all()) and bool(torch.signbit(lists.backups[0]).all())


def test_a_group_that_does_not_move_among_ones_that_do(runner):
    lists = lists_of(torch.tensor([3.0]), torch.tensor([math.inf]), torch.tensor([4.0]))
    through(runner, "perturb_", lists, torch.tensor(5.0), table([[1.0, 0.0], [0.0, 0.0]]), groups=[0, 1, 0])
    assert [float(p) for p in lists.params] == pytest.approx([1.6, 1.0, 1.8])


def test_perturb_eps(runner):
    """It is added to the norm: at eps = norm the step is half as long, at zero exactly rho."""
    for perturb_eps, length in ((0.0, 1.0), (5.0, 0.5)):
        lists = lists_of(torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64), weight=0.0)
        norm, _ = through(runner, "grad_norm", lists)
        through(runner, "perturb_", lists, norm, table([[1.0, perturb_eps]]))
        assert [float(p) for p in lists.params] == pytest.approx([0.6 * length, 0.8 * length], rel=1e-15)


def test_numbers_by_hand(runner):
    """Two tensors, two groups of rho, and ASAM's definition, from the papers' formulas."""
    lists = lists_of(torch.tensor([3.0]), torch.tensor([4.0]), weight=0.0)
    norm, _ = through(runner, "grad_norm", lists)
    assert float(norm) == 5
    through(runner, "perturb_", lists, norm, table([[0.1, 0.0], [0.2, 0.0]]), groups=[0, 1])
    assert [float(p) for p in lists.params] == pytest.approx([0.06, 0.16])

    lists = Lists(
        params=[torch.tensor([1.0, -2.0], dtype=torch.float64)], grads=[torch.tensor([3.0, 0.5], dtype=torch.float64)]
    )
    lists.backups = [torch.zeros(2, dtype=torch.float64)]
    norm, _ = through(runner, "grad_norm", lists, scaling=[1])
    through(runner, "perturb_", lists, norm, table([[0.5, 0.0]]), scaling=[1])
    assert (lists.params[0] - lists.backups[0]).tolist() == pytest.approx([0.4743416490, 0.3162277660], abs=1e-10)


def test_inv_scale_undoes_a_loss_scale(runner):
    """Gradients 65536 times too large, brought back by inv_scale, perturb as the true ones do, bit for bit."""
    grads = [torch.randn(1000), torch.randn(7)]
    true, scaled = lists_of(*grads), lists_of(*[g * 65536 for g in grads])
    inv_scale = torch.tensor(1 / 65536)
    norm, _ = through(runner, "grad_norm", true)
    again, _ = through(runner, "grad_norm", scaled, inv_scale=inv_scale)
    assert torch.equal(norm, again)
    through(runner, "perturb_", true, norm, table([[RHO, 1e-12]]))
    through(runner, "perturb_", scaled, again, table([[RHO, 1e-12]]), inv_scale=inv_scale)
    assert all(torch.equal(a, b) for a, b in zip(true.params, scaled.params, strict=True))


def test_inv_scale_saves_what_overflows_unscaled(runner):
    """fp32 gradients of 1e38 under a scale of 2^100: the norm of the unscaled ones is representable, of the scaled ones not."""
    lists = lists_of(torch.full((10_000,), 1e38))
    norm, found_inf = through(runner, "grad_norm", lists, inv_scale=torch.tensor(2.0**-100))
    assert float(found_inf) == 0 and float(norm) == pytest.approx(1e40 * 2.0**-100, rel=1e-6)


@pytest.mark.parametrize("found", [1.0, math.inf])
def test_found_inf_leaves_the_state_alone(found, backend):
    w, clean = torch.full((5,), 9.0), torch.arange(5.0)
    grad, bad = torch.full((5,), math.nan), torch.tensor(found)
    v, m, s, largest, step = (torch.full((5,), float(i)) for i in range(1, 6))
    step = torch.tensor(3.0)
    ops.restore_sgd_([w], [clean], [grad], [v], table([[0.1, 0.9, 0, 0.1, 1, 1]]), found_inf=bad, backend=backend)
    assert torch.equal(w, clean) and bool((v == 1).all())
    w.fill_(9.0)
    hyper = table([[0.1, 0.9, 0.999, 1e-8, 0.1, 1, 1, 0]])
    ops.restore_adamw_([w], [clean], [grad], [m], [s], [largest], [step], hyper, found_inf=bad, backend=backend)
    assert torch.equal(w, clean) and [float(t[0]) for t in (m, s, largest)] == [2, 3, 4] and float(step) == 3
