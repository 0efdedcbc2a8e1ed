"""A hundred steps against naive SAM written out in the tests, and the three forms of a step against each other."""

from functools import cache

import pytest
import torch

from sam_fused import SAM
from tests.devices import randn
from tests.optim.helpers import FORMS, NaiveSAM, Regression, assert_same_bits, take_step

STEPS = 100

# Largest difference of any weight after 100 steps. The weights are of order 1 and the net is smooth, so that roundings of one
# unit in the last place grow by two orders of magnitude at most. Adam divides by the root of its second moment, which
# magnifies the differences of small gradients.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD-momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "SGD-nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD-dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.001}),
}


@cache
def naive(dtype, name, rho, adaptive):
    base_class, options = BASES[name]
    case = Regression(dtype)
    optimizer = NaiveSAM(base_class(case.params, **options), rho, adaptive)
    losses = [optimizer.step(case.evaluate).item() for _ in range(STEPS)]
    return [p.detach() for p in case.params], losses


def ours(dtype, base_class, options, rho, adaptive, backend, form, steps=STEPS):
    case = Regression(dtype)
    optimizer = SAM(case.params, base_class, rho=rho, adaptive=adaptive, backend=backend, **options)
    losses = [take_step(optimizer, form, case.evaluate).item() for _ in range(steps)]
    return [p.detach() for p in case.params], losses


def assert_close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


SOME = ("SGD-nesterov", "AdamW-amsgrad", "RMSprop")
CASES = [
    *((name, torch.float64, False) for name in BASES),
    *((name, torch.float64, True) for name in SOME),
    *((name, torch.float32, name == "SGD-nesterov") for name in SOME),
]


@pytest.mark.parametrize(("name", "dtype", "adaptive"), CASES)
def test_against_naive_sam(backend, name, dtype, adaptive):
    base_class, options = BASES[name]
    rho = 0.5 if adaptive else 0.1
    expected, expected_losses = naive(dtype, name, rho, adaptive)
    actual, losses = ours(dtype, base_class, options, rho, adaptive, backend, "closure")
    assert_close(actual, expected, dtype)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE[dtype])
    # The comparison means something: plain training ends elsewhere.
    plain, _ = naive(dtype, name, 0.0, False)
    assert max(float((a - b).abs().max()) for a, b in zip(actual, plain, strict=True)) > 100 * TOLERANCE[dtype]


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SGD-nesterov", "AdamW-amsgrad", "RMSprop"])
def test_the_three_forms_agree_bit_for_bit(backend, name, dtype, adaptive):
    base_class, options = BASES[name]
    results = [ours(dtype, base_class, options, 0.2, adaptive, backend, form, steps=15) for form in FORMS]
    for params, losses in results[1:]:
        assert_same_bits(params, results[0][0])
        assert losses == results[0][1]


def _groups(params):
    """Four groups that differ in everything that may differ."""
    return [
        {"params": params[:1], "rho": 0.3, "lr": 0.05, "momentum": 0.9, "nesterov": True},
        {"params": params[1:3], "rho": 0.0, "lr": 0.02, "momentum": 0.0, "weight_decay": 0.05},
        {"params": params[3:5], "rho": 0.5, "adaptive": True, "momentum": 0.7, "dampening": 0.2},
        {"params": params[5:], "perturb": False, "lr": 0.1},
    ]


def _naive_with(groups, base_class, **options):
    ours = {"rho": 0.1, "adaptive": False, "perturb": True}
    picked = {key: [group.get(key, default) for group in groups] for key, default in ours.items()}
    plain = [{k: v for k, v in group.items() if k not in ours} for group in groups]
    return NaiveSAM(base_class(plain, **options), **picked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_groups_with_hyper_parameters_of_their_own(backend, dtype):
    case, plain = Regression(dtype), Regression(dtype)
    optimizer = SAM(_groups(case.params), torch.optim.SGD, rho=0.1, lr=0.03, backend=backend)
    other = _naive_with(_groups(plain.params), torch.optim.SGD, lr=0.03)
    for _ in range(STEPS):
        optimizer.step(case.evaluate)
        other.step(plain.evaluate)
    assert_close(case.params, plain.params, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adam_groups_with_hyper_parameters_of_their_own(backend, dtype):
    def groups(params):
        return [
            {"params": params[:2], "rho": 0.3, "lr": 0.005, "betas": (0.8, 0.95), "eps": 1e-6},
            {"params": params[2:4], "adaptive": True, "amsgrad": True, "weight_decay": 0.2},
            {"params": params[4:], "perturb": False},
        ]

    case, plain = Regression(dtype), Regression(dtype)
    optimizer = SAM(groups(case.params), torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    other = _naive_with(groups(plain.params), torch.optim.AdamW, lr=0.01)
    for _ in range(STEPS):
        optimizer.step(case.evaluate)
        other.step(plain.evaluate)
    assert_close(case.params, plain.params, dtype)


def test_mixed_dtypes_in_one_optimizer(backend, form):
    """Half weights beside fp32 and fp64 ones, one norm over all: against naive SAM in the same dtypes."""

    def problem():
        generator = torch.Generator().manual_seed(1)
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        params = [torch.nn.Parameter(randn(33, generator).to(dtype)) for dtype in dtypes]

        def evaluate():
            loss = sum(((p.double() - 0.5) ** 2).sum() for p in params)
            loss.backward()
            return loss

        return params, evaluate

    params, evaluate = problem()
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer = SAM(params, torch.optim.SGD, rho=0.5, lr=0.05, momentum=0.5, backend=backend)
    other = NaiveSAM(torch.optim.SGD(wide, lr=0.05, momentum=0.5), 0.5)

    def wide_evaluate():
        loss = sum(((p - 0.5) ** 2).sum() for p in wide)
        loss.backward()
        return loss

    for _ in range(5):
        take_step(optimizer, form, evaluate)
        other.step(wide_evaluate)
    # Roundings to 8 (bf16) and 11 (fp16) bits in each step, of weights up to 3, five steps, and of the momentum.
    tolerance = {torch.float32: 4e-3, torch.bfloat16: 6e-2, torch.float64: 4e-3, torch.float16: 1e-2}
    for param, expected in zip(params, wide, strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=tolerance[param.dtype])
