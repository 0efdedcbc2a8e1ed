"""What each variant becomes at the edges, and what surrounds a step of it."""

import math

import pytest
import torch
from torch.optim import SGD, AdamW

from sam_fused import SAM, MicroBatchSAM, norm_parameters
from tests.optim.helpers import (
    DTYPES,
    Regression,
    assert_same_bits,
    backward_of,
    parameter,
    snapshot,
    take_step,
)
from tests.optim.variants import ABS, VARIANTS, defined, trained, two_steps, variants

# ---- what each becomes at the edges -------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_rho_zero_is_the_base_optimizer(backend, base, options):
    task = Regression(torch.float32)
    plain = {key: options[key] for key in ("weight_decay",) if key in options}
    optimizer = base(task.params, lr=0.1, foreach=False, **plain)
    for _ in range(3):
        optimizer.zero_grad()
        task.evaluate()
        optimizer.step()
    ours = trained(backend, base=base, rho=0.0, **options)
    if base is SGD:
        assert_same_bits(ours, snapshot(task.params))
    assert_same_bits(ours, trained(backend, base=base, **options, params=not_perturbed))


def not_perturbed(task):
    return [{"params": list(task.model.named_parameters()), "perturb": False}]


@variants
def test_one_micro_batch_is_sam(backend, form, options):
    expected = trained(backend, form, **options)
    assert_same_bits(trained(backend, form, cls=MicroBatchSAM, num_micro_batches=1, **options), expected)


@variants
def test_forms_have_the_same_bits(backend, options):
    expected = trained(backend, "closure", **options)
    for form in ("perturbed", "first_second"):
        assert_same_bits(trained(backend, form, **options), expected)


@variants
def test_lr_zero_never_moves_a_weight(backend, options):
    for dtype in DTYPES:
        before = snapshot(Regression(dtype).params)
        assert_same_bits(trained(backend, dtype=dtype, **{**options, "lr": 0.0}), before)


def only(kind):
    return lambda task: [(name, param) for name, param in task.model.named_parameters() if name.endswith(kind)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"adaptive": True}, {"adaptive": "all"}),
        ({"adaptive": "weights", "params": only("weight")}, {"adaptive": "all", "params": only("weight")}),
        ({"adaptive": "weights", "params": only("bias")}, {"params": only("bias")}),
        (
            {"adaptive": "weights", "eta": 0.3, "params": only("weight")},
            {"adaptive": "all", "eta": 0.3, "params": only("weight")},
        ),
        ({"weight_decay_in_ascent": True, "weight_decay": 0.0}, {}),
        ({"eta": 0.3}, {}),  # of what is not scaled
        ({"p": 2.0}, {}),
        ({"params": lambda task: norm_parameters(task.model[2])}, {"params": lambda task: list(task.model[2].parameters())}),
    ],
    ids=[
        "all",
        "weights of weights",
        "weights of biases",
        "weights with eta",
        "no decay",
        "eta of nothing",
        "p",
        "norms alone",
    ],
)
def test_the_same_by_another_name(backend, one, other):
    assert_same_bits(trained(backend, **one), trained(backend, **other))


def test_layerwise_of_unit_tensors_is_sam(backend):
    """And so is the unnormalised form where the gradient has length 1: the same e, but for rounding."""
    grads = [torch.tensor([0.6, 0.0], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)]
    moves = []
    for options in ({}, {"adaptive": "layerwise"}, {"normalize": False}):
        params = [parameter([0.6, -0.8]), parameter([1.0])]
        optimizer = SAM(params, SGD, lr=0.1, rho=0.5, backend=backend, **options)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        with optimizer.perturbed():
            moves.append([value for param in params for value in param.tolist()])
    assert moves[0] == pytest.approx([0.9, -0.8, 1.4], abs=ABS)
    assert moves[1] == pytest.approx(moves[0], abs=ABS) and moves[2] == pytest.approx(moves[0], abs=ABS)


def test_of_single_elements_layerwise_is_all(backend):
    moves = []
    for adaptive in ("all", "layerwise"):
        params = [parameter([-2.0]), parameter([0.5])]
        optimizer = SAM(params, SGD, lr=0.1, rho=0.5, adaptive=adaptive, backend=backend)
        for param, grad in zip(params, (3.0, -1.0), strict=True):
            param.grad = torch.full_like(param, grad)
        with optimizer.perturbed():
            moves.append([param.item() for param in params])
    assert moves[0] == pytest.approx(moves[1], abs=ABS)


def test_p_inf_of_a_single_number_is_sam(backend):
    signs, sam = (two_steps([("w", parameter([2.0]))], [0.7], backend, "closure", p=p) for p in (math.inf, 2))
    assert [w for (w,) in signs] == pytest.approx([w for (w,) in sam], abs=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
@pytest.mark.parametrize("options", [{"adaptive": "layerwise"}, {"adaptive": "all", "p": math.inf}], ids=str)
def test_scale_invariance(backend, options, scale):
    """Of layerwise T as of elementwise T, and of both norms: (w_1 c, w_2 / c) is the same net and is perturbed to the same."""
    products = []
    for c in (1.0, scale):
        w1, w2 = parameter(2 * c), parameter(1 / c)
        optimizer = SAM([w1, w2], SGD, rho=0.1, lr=0.1, backend=backend, **options)
        (0.5 * (w1 * w2 - 1) ** 2).backward()
        with optimizer.perturbed():
            products.append((w1 * w2).item())
    assert products[0] == pytest.approx(products[1], rel=1e-12) and products[0] > 2.1


def test_maximizing_perturbs_downhill_of_the_decayed_objective(backend):
    """Maximizing L with decay is minimizing -L + wd/2 |w|^2: with L the negative, everything is as without."""
    for options in VARIANTS.values():
        seen = []
        for sign, maximize in ((1, False), (-1, True)):
            task = Regression()
            optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.2, maximize=maximize, backend=backend, **options)
            for _ in range(2):
                take_step(optimizer, "closure", backward_of(lambda task=task, sign=sign: sign * task.loss()))
            seen.append([p.detach() for p in task.params])
        for one, other in zip(*seen, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


# ---- what surrounds a step ----------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_gradient_that_is_zero_or_not_finite_moves_nothing(backend, options, value):
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.5, backend=backend, **options)
    for param in task.params:
        param.grad = torch.zeros_like(param)
    task.params[0].grad[0, 0] = value
    before = snapshot(task.params)
    decays = value == 0 and "weight_decay_in_ascent" in options  # the direction is the decay's then
    with optimizer.perturbed():
        assert all(map(torch.equal, snapshot(task.params), before)) != decays
    assert_same_bits(snapshot(task.params), before)
    assert int(optimizer.ascent_overflows) == (not math.isfinite(value))


@variants
def test_the_gradient_is_only_read(backend, options):
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.5, backend=backend, **options)
    task.evaluate()
    held = [param.grad for param in task.params]
    before = snapshot(held)
    optimizer.first_step()
    assert_same_bits(snapshot(held), before)
    optimizer.restore()


@variants
def test_what_is_asked_for_is_what_is_measured(backend, options):
    task = Regression()
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.5, backend=backend, track_perturbation=True, **options)
    optimizer.step(task.evaluate)
    assert optimizer.perturbation.cosine.item() == pytest.approx(1, abs=1e-9)


def test_values_that_change_between_steps_are_seen(backend):
    """Also those that change what the kernels can do by themselves: eta from 0, a decay."""
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, adaptive="all", weight_decay=2.0, backend=backend)
    (group,) = optimizer.param_groups
    for change, expected in (
        ({}, defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {"adaptive": "all"})),
        ({"eta": 1.0}, defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {"adaptive": "all", "eta": 1.0})),
        ({"eta": 2.0}, defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {"adaptive": "all", "eta": 2.0})),
        ({"adaptive": False, "eta": 0.0}, defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {})),
        (
            {"weight_decay_in_ascent": True},
            defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {"weight_decay": 2.0}),
        ),
        ({"weight_decay": 5.0}, defined(["w"], [w.detach()], [torch.ones(2).double()], 0.5, {"weight_decay": 5.0})),
    ):
        group.update(change)
        w.grad = torch.ones(2, dtype=torch.float64)
        clean = w.detach().clone()
        optimizer.first_step()
        torch.testing.assert_close(w.detach() - clean, expected[0], rtol=1e-11, atol=0)
        optimizer.restore()


@variants
def test_resumed_from_a_checkpoint(backend, options):
    expected = trained(backend, steps=4, **options)
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.2, backend=backend, **options)
    for _ in range(2):
        optimizer.step(task.evaluate)
    saved = optimizer.state_dict()
    again = SAM(
        task.model.named_parameters(),
        SGD,
        lr=0.7,
        backend=backend,
        **{key: options[key] for key in ("p", "normalize") if key in options},
    )
    again.load_state_dict(saved)
    task.model.zero_grad()
    for _ in range(2):
        again.step(task.evaluate)
    assert_same_bits(snapshot(task.params), expected)
