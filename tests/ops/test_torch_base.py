"""Without a perturbation the last pass is torch's own optimizer."""

import itertools

import pytest
import torch

from sam_fused import ops
from tests.devices import randn
from tests.ops.cases import BF16, FP16, FP32, FP64
from tests.ops.runner import table

STEPS = 20
SIZES = ((3,), (17, 5), (1000,), ())

SGD_FORMS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, weight_decay, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening)) and not (dampening and not momentum)
]


def _params_and_grads(dtype):
    generator = torch.Generator().manual_seed(5)
    params = [randn(size, generator, torch.float64).to(dtype) for size in SIZES]
    grads = [[randn(size, generator, torch.float64).to(dtype) for size in SIZES] for _ in range(STEPS)]
    return params, grads


def _torch_run(optimizer_class, dtype, fused=False, **options):
    params, grads = _params_and_grads(dtype)
    optimizer = optimizer_class(params, foreach=False, fused=fused, **options)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("storage", [FP32, FP64], ids=lambda s: s.name)
def test_sgd_is_torch_bit_for_bit(storage, backend):
    """native: torch's single-tensor form. foreach: torch's fused one, a unit away from that where there is momentum.

    The reference rounds fewer times and is held to a bound: 20 steps of at most 2 units each on values of order 1.
    """
    for form in SGD_FORMS:
        want, optimizer = _torch_run(torch.optim.SGD, storage.dtype, fused=backend == "foreach", lr=0.1, **form)
        params, grads = _params_and_grads(storage.dtype)
        buffers = [torch.zeros_like(p) for p in params] if form["momentum"] else []
        row = [0.1, *(float(form[k]) for k in ("momentum", "dampening", "weight_decay", "nesterov", "maximize"))]
        for index, step in enumerate(grads):
            first = [1] * len(params) if index == 0 else []
            ops.restore_sgd_(params, params, step, buffers, table([row]), first=first, backend=backend)
        held = [optimizer.state[p]["momentum_buffer"] for p in want] if buffers else []
        for got, wanted in zip([*params, *buffers], [*want, *held], strict=True):
            if backend == "reference":
                bound = 2 * STEPS * storage.roundoff * 2 * max(1.0, float(wanted.abs().max()))
                assert (got - wanted).abs().max().item() <= bound, form
            else:
                assert torch.equal(got, wanted), (form, (got - wanted).abs().max().item())


ADAM_FORMS = [
    {"weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    for weight_decay, amsgrad, maximize in itertools.product((0.0, 0.1), (False, True), (False, True))
]

# torch's vector sqrt and division on the CPU may be off by one unit each, it rounds lr / (1 - beta^t) differently and decays
# the weights in another order: about 4 units of the step a step. The steps are of size lr, 1/100 of the weights' size.
ADAM_UNITS_PER_STEP = 4


@pytest.mark.parametrize("storage", [FP32, FP64], ids=lambda s: s.name)
@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_adam_is_torch_within_units(decoupled, storage, backend):
    for form in ADAM_FORMS:
        options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, **form}
        want, optimizer = _torch_run(torch.optim.AdamW if decoupled else torch.optim.Adam, storage.dtype, **options)
        params, grads = _params_and_grads(storage.dtype)
        m, v, largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
        steps = [torch.zeros(()) for _ in params]
        row = [0.01, 0.9, 0.999, 1e-8, form["weight_decay"], float(decoupled), float(form["amsgrad"]), float(form["maximize"])]
        for step in grads:
            ops.restore_adamw_(
                params, params, step, m, v, largest if form["amsgrad"] else [], steps, table([row]), backend=backend
            )
        state = [optimizer.state[p] for p in want]
        assert [float(s) for s in steps] == [float(s["step"]) for s in state] == [STEPS] * len(params)
        unit = 2 * storage.roundoff
        for got, wanted in zip(params, want, strict=True):
            allowed = STEPS * unit * (wanted.abs().clamp(min=1.0) + ADAM_UNITS_PER_STEP * 0.01)
            assert bool(((got - wanted).abs() <= allowed).all()), form
        # m is a sum of gradients of order 1 that may cancel, v of squares that do not.
        for ours, key, size in ((m, "exp_avg", 1.0), (v, "exp_avg_sq", 1e-3)):
            for got, wanted in zip(ours, (s[key] for s in state), strict=True):
                assert bool(((got - wanted).abs() <= STEPS * unit * wanted.abs().clamp(min=size)).all()), (form, key)


def test_two_steps_by_hand(backend):
    """Momentum 0.9, L = w^2 / 2, w = 1, rho = lr = 0.1: 0.89, then 0.692. Pass-1 gradients never enter the buffer."""
    w, backup, v = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0, 0.0))
    for first, wanted in ((1, 0.89), (0, 0.692)):
        norm, _ = ops.grad_norm([w.clone()], backend=backend)
        ops.perturb_([w], [backup], [w.clone()], norm, table([[0.1, 0.0]]), backend=backend)
        ops.restore_sgd_([w], [backup], [w.clone()], [v], table([[0.1, 0.9, 0, 0, 0, 0]]), first=[first], backend=backend)
        assert w.item() == pytest.approx(wanted, rel=1e-14)


# Torch rounds d, the momentum, m, v and the denominator to storage, up to 5 times half a unit of the update each in one step;
# we round each stored value once. Both round the weight, and AdamW's torch a decayed weight before that.
HALF_UNITS = {"update": 8, "weight": 2}


@pytest.mark.parametrize("storage", [BF16, FP16], ids=lambda s: s.name)
@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_one_step_of_half_types_is_torch_within_units(base, storage, backend):
    torch.manual_seed(7)
    w, g, v, m = (torch.randn(4000).to(storage.dtype) for _ in range(4))
    s = torch.rand(4000).add(0.5).to(storage.dtype)
    param = torch.nn.Parameter(w.clone())
    param.grad = g.clone()
    lr, unit = 0.5, 2 * storage.roundoff
    if base == "sgd":
        optimizer = torch.optim.SGD([param], lr=lr, momentum=0.9, weight_decay=0.01, nesterov=True, foreach=False)
        optimizer.state[param]["momentum_buffer"] = v.clone()
        ops.restore_sgd_([w], [w], [g], [v], table([[lr, 0.9, 0, 0.01, 1, 0]]), backend=backend)
        terms = g.float().abs() + 0.9 * optimizer.state[param]["momentum_buffer"].float().abs()
    else:
        optimizer_class = torch.optim.AdamW if base == "adamw" else torch.optim.Adam
        optimizer = optimizer_class([param], lr=lr, weight_decay=0.1, foreach=False)
        state = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": s.clone()}
        optimizer.state[param].update(state)
        row = [lr, 0.9, 0.999, 1e-8, 0.1, float(base == "adamw"), 0, 0]
        ops.restore_adamw_([w], [w], [g], [m], [s], [], [torch.tensor(3.0)], table([row]), backend=backend)
        # The moments' terms without their signs, since they may cancel, with the bias corrections of step 4.
        terms = (0.9 * state["exp_avg"].float().abs() + 0.1 * g.float().abs()) / (1 - 0.9**4)
        terms = terms / (state["exp_avg_sq"].float() / (1 - 0.999**4)).sqrt()
    before = param.detach().clone()
    optimizer.step()
    size = before.float().abs().maximum(param.detach().float().abs())
    allowed = unit * (HALF_UNITS["weight"] * size + HALF_UNITS["update"] * lr * terms)
    assert bool(((w.float() - param.float()).abs() <= allowed).all())
    assert float((param.detach() - before).abs().float().mean()) > float(
        allowed.mean()
    )  # the step is larger than what is allowed
