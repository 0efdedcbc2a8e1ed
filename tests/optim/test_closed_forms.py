"""SAM and ASAM against numbers worked out by hand."""

import math
from itertools import pairwise

import pytest
import torch

from sam_fused import SAM
from tests.devices import randn
from tests.optim.helpers import (
    BACKENDS,
    DTYPES,
    Regression,
    assert_same_bits,
    backward_of,
    parameter,
    snapshot,
    take_step,
)

# float64 throughout unless a test says otherwise; perturb_eps alone moves the last digits by about 1e-12.
ABS = 1e-11


def perturbation(params, grads, backend, groups=None, **options):
    """e, as the optimizer applies it for these gradients."""
    optimizer = SAM(groups or params, torch.optim.SGD, lr=0.1, backend=backend, **options)
    clean = [p.detach().double().clone() for p in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.as_tensor(grad, dtype=param.dtype).reshape(param.shape)
    optimizer.first_step()
    moved = [p.detach().double() - c for p, c in zip(params, clean, strict=True)]
    optimizer.second_step()
    return moved


def test_one_step_on_a_parabola(backend, form):
    w = parameter(1.0)
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    take_step(optimizer, form, backward_of(lambda: w * w))
    assert w.item() == pytest.approx(0.78, abs=ABS)


def test_many_steps_on_a_parabola_end_in_a_cycle_that_changes_sign(backend, form):
    w = parameter(1.0)
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    seen = []
    for _ in range(200):
        take_step(optimizer, form, backward_of(lambda: w * w))
        seen.append(w.item())
    assert [abs(value) for value in seen[-4:]] == pytest.approx([0.1 * 0.1 * 2 / (2 - 0.2)] * 4, abs=1e-9)
    assert all(a * b < 0 for a, b in pairwise(seen[-4:]))


def test_quadratic_with_two_curvatures(backend, form):
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    w = parameter([3.0, 4 / 3])
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    seen = []

    def evaluate():
        loss = 0.5 * (curvature * w * w).sum()
        loss.backward()
        seen.append((w.detach().tolist(), w.grad.tolist()))
        return loss

    take_step(optimizer, form, evaluate)
    assert seen[0][1] == pytest.approx([3, 4], abs=ABS)
    assert seen[1][0] == pytest.approx([3.3, 4 / 3 + 0.4], abs=ABS)
    assert seen[1][1] == pytest.approx([3.3, 5.2], abs=ABS)
    assert w.tolist() == pytest.approx([2.67, 4 / 3 - 0.52], abs=ABS)


def test_momentum_never_sees_the_first_gradient(backend, form):
    w = parameter(1.0)
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for expected in (0.89, 0.692):
        take_step(optimizer, form, backward_of(lambda: 0.5 * w * w))
        assert w.item() == pytest.approx(expected, abs=ABS)
    assert optimizer.state[w]["momentum_buffer"].item() == pytest.approx(1.98, abs=ABS)


def test_asam_perturbation(backend):
    (moved,) = perturbation([parameter([1.0, -2.0])], [[3.0, 0.5]], backend, rho=0.5, adaptive=True)
    assert moved.tolist() == pytest.approx([0.4743416490, 0.3162277660], abs=5e-11)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 7.0, 1e3])
def test_asam_is_scale_invariant(backend, scale):
    w1, w2 = parameter(2 * scale), parameter(1 / scale)
    optimizer = SAM([w1, w2], torch.optim.SGD, rho=0.1, lr=0.1, adaptive=True, backend=backend)
    (0.5 * (w1 * w2 - 1) ** 2).backward()
    with optimizer.perturbed():
        product = (w1 * w2).item()
    assert product == pytest.approx(2.292842712, abs=5e-10)


def test_plain_sam_is_not_scale_invariant(backend):
    products = []
    for scale in (1.0, 7.0):
        w1, w2 = parameter(2 * scale), parameter(1 / scale)
        optimizer = SAM([w1, w2], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
        (0.5 * (w1 * w2 - 1) ** 2).backward()
        with optimizer.perturbed():
            products.append((w1 * w2).item())
    assert abs(products[0] - products[1]) > 0.1


@pytest.mark.parametrize("rho", [0.0, 0.05, 3.0])
def test_linear_loss_gives_the_base_step_exactly(backend, form, rho):
    slope = torch.tensor([0.3, -1.7, 2.9], dtype=torch.float64)
    w, plain = parameter([0.1, 0.2, 0.3]), parameter([0.1, 0.2, 0.3])
    optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=0.1, backend=backend)
    base = torch.optim.SGD([plain], lr=0.1)
    for _ in range(10):
        take_step(optimizer, form, backward_of(lambda: (slope * w).sum()))
        base.zero_grad()
        (slope * plain).sum().backward()
        base.step()
    if backend == "reference":  # it rounds once where torch's multiply-add may round twice
        torch.testing.assert_close(w, plain, rtol=4e-16, atol=0)
    else:
        assert_same_bits([w], [plain])


SGD_FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "decay": {"weight_decay": 0.1},
    "maximize": {"momentum": 0.5, "maximize": True, "lr": 1e-4},  # small: uphill the losses explode
}


def follow_sgd(backend, form, dtype, options, steps):
    """SAM with rho = 0 beside torch's SGD, step by step."""
    ours, plain = Regression(dtype), Regression(dtype)
    options = {"lr": 0.01, **options}
    optimizer = SAM(ours.params, torch.optim.SGD, rho=0.0, backend=backend, **options)
    # torch itself has two roundings of SGD: foreach calls the one behind fused=True, the kernels have the default one's.
    base = torch.optim.SGD(plain.params, fused=backend == "foreach", **options)
    for _ in range(steps):
        take_step(optimizer, form, ours.evaluate)
        base.zero_grad()
        plain.evaluate()
        base.step()
    if backend == "reference":
        # fp32 is computed in fp64 and rounded once, fp64 without fused multiply-adds: one unit per step at most.
        tolerance = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(ours.params, plain.params, rtol=tolerance, atol=tolerance)
    else:
        assert_same_bits(ours.params, plain.params)


@pytest.mark.parametrize("options", SGD_FORMS.values(), ids=SGD_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rho_is_sgd_bit_for_bit(backend, dtype, options):
    follow_sgd(backend, "closure", dtype, options, steps=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rho_is_sgd_bit_for_bit_in_every_form(backend, form, dtype):
    follow_sgd(backend, form, dtype, SGD_FORMS["nesterov"], steps=20)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*(("RMSprop", b) for b in BACKENDS), *((n, "foreach") for n in ("Adagrad", "NAdam", "Adamax", "ASGD", "Rprop"))],
    indirect=["backend"],
)
def test_zero_rho_is_an_unfused_base_bit_for_bit(backend, name):
    ours, plain = Regression(torch.float32), Regression(torch.float32)
    base_class = getattr(torch.optim, name)
    optimizer = SAM(ours.params, base_class, rho=0.0, lr=0.01, backend=backend)
    base = base_class(plain.params, lr=0.01)
    for _ in range(100):
        optimizer.step(ours.evaluate)
        base.zero_grad()
        plain.evaluate()
        base.step()
    assert_same_bits(ours.params, plain.params)


@pytest.mark.parametrize("base_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rho_is_adam_within_roundings(backend, base_class, dtype):
    # Not bit for bit: torch's own square root on the CPU is not correctly rounded. One step moves a weight by about lr.
    ours, plain = Regression(dtype), Regression(dtype)
    optimizer = SAM(ours.params, base_class, rho=0.0, lr=0.01, weight_decay=0.1, backend=backend)
    base = base_class(plain.params, lr=0.01, weight_decay=0.1)
    for _ in range(100):
        optimizer.step(ours.evaluate)
        base.zero_grad()
        plain.evaluate()
        base.step()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    torch.testing.assert_close(ours.params, plain.params, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=["plain", "momentum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_learning_rate_moves_nothing_ever(backend, form, dtype, options):
    params = [torch.nn.Parameter(randn(n, torch.Generator().manual_seed(n)).to(dtype)) for n in (1, 7, 65)]
    optimizer = SAM(params, torch.optim.SGD, rho=0.7, lr=0.0, backend=backend, **options)
    before = snapshot(params)
    for _ in range(8):
        take_step(optimizer, form, backward_of(lambda: sum((p.float() ** 4).sum() for p in params)))
        assert_same_bits(params, before)


@pytest.mark.parametrize("base_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_learning_rate_moves_nothing_with_other_bases(backend, dtype, base_class):
    w = torch.nn.Parameter(torch.randn(65).to(dtype))
    optimizer = SAM([w], base_class, rho=0.7, lr=0.0, backend=backend)
    before = snapshot([w])
    for _ in range(8):
        optimizer.step(backward_of(lambda: (w.float() ** 2).sum()))
        assert_same_bits([w], before)


def test_one_norm_over_two_tensors(backend):
    moved = perturbation([parameter(0.0), parameter(0.0)], [3.0, 4.0], backend, rho=1.0)
    assert [m.item() for m in moved] == pytest.approx([0.6, 0.8], abs=ABS)


def test_rho_per_group_but_one_norm(backend):
    a, b = parameter(0.0), parameter(0.0)
    groups = [{"params": [a], "rho": 0.1}, {"params": [b], "rho": 0.2}]
    moved = perturbation([a, b], [3.0, 4.0], backend, groups=groups)
    assert [m.item() for m in moved] == pytest.approx([0.06, 0.16], abs=ABS)


def test_a_group_left_out_is_left_out_of_the_norm(backend):
    a, b, c = parameter(0.0), parameter(0.0), parameter(0.0)
    groups = [{"params": [a, b]}, {"params": [c], "perturb": False}]
    moved = perturbation([a, b, c], [3.0, 4.0, 12.0], backend, groups=groups, rho=1.0)
    assert [m.item() for m in moved] == pytest.approx([0.6, 0.8, 0.0], abs=ABS)


def test_adaptive_in_one_group_only_mixes_in_one_norm(backend):
    a, b = parameter(2.0), parameter(5.0)
    groups = [{"params": [a], "adaptive": True}, {"params": [b], "adaptive": False}]
    # T g = (2 * 1.5, 4), its norm 5; e = rho T^2 g / 5 = (4 * 1.5 / 5, 4 / 5)
    moved = perturbation([a, b], [1.5, 4.0], backend, groups=groups, rho=1.0)
    assert [m.item() for m in moved] == pytest.approx([1.2, 0.8], abs=ABS)


@pytest.mark.parametrize("adaptive", [False, True])
def test_scaling_the_loss_changes_nothing(backend, adaptive):
    grads = [torch.randn(5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)]
    results = []
    for scale in (1.0, 65536.0):
        params = [parameter(torch.linspace(0.5, 2, 5)), parameter(torch.linspace(-3, -1, 6).reshape(3, 2))]
        results.append(perturbation(params, [g * scale for g in grads], backend, rho=0.3, adaptive=adaptive))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float32, 1e30, 1e-6),
        (torch.float32, 1e18, 1e-6),
        (torch.float64, 1e200, 1e-12),
        (torch.float64, 1e-150, 1e-12),
        (torch.bfloat16, 1e30, 4e-3),
        (torch.float16, 300.0, 1e-3),
        (torch.float16, 6e-5, 1e-2),
    ],
    ids=str,
)
def test_the_norm_neither_overflows_nor_vanishes(backend, dtype, size, tolerance):
    """||e|| = rho with 10,000 equal elements; the weights are 0, so that e is stored with its own precision."""
    w = torch.nn.Parameter(torch.zeros(10_000, dtype=dtype))
    grad = torch.full((10_000,), size, dtype=dtype)
    (moved,) = perturbation([w], [grad], backend, rho=50.0, perturb_eps=0.0)
    assert moved.norm().item() == pytest.approx(50.0, rel=tolerance)


def test_small_gradients_count_in_fp32(backend):
    # Their squares, 1e-50, are far below the smallest float32.
    w, grad = parameter(torch.zeros(100), torch.float32), torch.full((100,), 1e-25)
    (moved,) = perturbation([w], [grad], backend, rho=1.0, perturb_eps=0.0)
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-6)


def test_perturb_eps_is_added_to_the_norm(backend):
    (moved,) = perturbation([parameter(0.0)], [3.0], backend, rho=1.0, perturb_eps=1.0)
    assert moved.item() == pytest.approx(0.75, abs=1e-15)


def test_limit_cycle_along_the_top_eigenvector(backend, form):
    curvature = torch.tensor([4.0, 1.0], dtype=torch.float64)
    w = parameter([0.3, -0.7])
    optimizer = SAM([w], torch.optim.SGD, rho=0.05, lr=0.1, backend=backend)
    for _ in range(100):
        take_step(optimizer, form, backward_of(lambda: 0.5 * (curvature * w * w).sum()))
    length = w.detach().norm().item()
    assert length == pytest.approx(0.1 * 0.05 * 4 / (2 - 0.4), abs=1e-5) == pytest.approx(0.0125, abs=1e-5)
    assert abs(w[0].item()) / length == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_length_of_the_perturbation_is_rho(backend, adaptive, dtype, tolerance):
    """||e|| = rho, and ||T^-1 e|| = rho for ASAM."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (1,), (17,), (5, 33), (2, 3, 4)]
    params = [torch.nn.Parameter(randn(s, generator).to(dtype)) for s in shapes]
    clean = [p.detach().double().clone() for p in params]
    grads = [randn(s, generator).to(dtype) for s in shapes]
    moved = perturbation(params, grads, backend, rho=0.3, adaptive=adaptive)
    scaled = [m / c.abs() if adaptive else m for m, c in zip(moved, clean, strict=True)]
    assert math.sqrt(sum((s**2).sum().item() for s in scaled)) == pytest.approx(0.3, rel=tolerance)


def test_the_order_of_tensors_changes_nothing(backend):
    shapes = [(3,), (70_000,), (5, 7), (1,), (1000,)]
    params = [torch.randn(s, dtype=torch.float32) for s in shapes]
    grads = [torch.randn(s, dtype=torch.float32) * 10.0 ** (i - 2) for i, s in enumerate(shapes)]
    orders = [list(range(5)), [4, 2, 0, 3, 1]]
    results = []
    for order in orders:
        leaves = [torch.nn.Parameter(p.clone()) for p in params]
        optimizer = SAM([leaves[i] for i in order], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        with optimizer.perturbed():
            results.append([leaf.detach().clone() for leaf in leaves])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=2.4e-7, atol=1e-9)
