"""``max_grad_norm``: ``clip_grad_norm_`` before the base step, inside the last pass. (With a scaler: test_loss_scaling.py.)"""

import copy
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, RMSprop

from sam_fused import SAM, MicroBatchSAM
from tests.optim.helpers import (
    assert_one_sentence,
    assert_same_bits,
    backups_of,
    backward_of,
    parameter,
    snapshot,
    snapshot_state,
)
from tests.optim.runs import ALL, BY_HAND, MICRO_BATCHES, Run, assert_same_runs

# A large eps, so that Adam's and RMSprop's steps depend on the gradients' length at all.
BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.01, "eps": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01, "eps": 0.1}),  # runs its own step
}

LIMIT = 0.3  # a few times less than what Regression's gradients have


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


@pytest.fixture(params=["SGD", "RMSprop"])
def fused_or_not(request):
    return BASES[request.param]


@pytest.fixture(params=ALL)
def in_form(request):
    return request.param


@pytest.fixture(params=BY_HAND)
def by_hand(request):
    return request.param


def left_out(params):
    """Three groups, the second of which is not perturbed. It is clipped as the others are."""
    return [{"params": params[:2]}, {"params": params[2:4], "perturb": False}, {"params": params[4:], "lr": 0.02, "rho": 0.4}]


def clipped_by_torch(form, base, backend, **options):
    """A run by hand that takes the same gradients as one in ``form``, and how it takes a step."""
    run = Run({"closure": "perturbed", "micro_closure": "micro_batch"}.get(form, form), base, backend, **options)
    norms = []

    def step(limit=LIMIT):
        run.step(between=lambda r: norms.append(clip_grad_norm_(r.params, limit)))
        return norms[-1]

    return run, step


def tensors_of_state(optimizer):
    return [value for entry in snapshot_state(optimizer)[0] for value in entry.values()]


def assert_close_runs(actual, expected, tolerance):
    """``tolerance`` is relative to the largest element of each tensor."""
    pairs = zip(
        [*actual.params, *tensors_of_state(actual.optimizer)],
        [*expected.params, *tensors_of_state(expected.optimizer)],
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [list, left_out], ids=["one group", "groups"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_it_is_clipping_before_the_base_step(backend, base, in_form, dtype, tolerance, grouped):
    ours = Run(in_form, base, backend, dtype=dtype, grouped=grouped, max_grad_norm=LIMIT)
    by_torch, step_by_torch = clipped_by_torch(in_form, base, backend, dtype=dtype, grouped=grouped)
    for _ in range(3):
        ours.step()
        norm = step_by_torch()
        assert float(norm) > 2 * LIMIT
        torch.testing.assert_close(ours.optimizer.grad_norm, norm, rtol=tolerance, atol=0)
        assert_close_runs(ours, by_torch, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_clipped_gradient_is_as_long_as_the_limit(backend, in_form, dtype):
    """SGD's momentum holds the first step's gradient. bf16: half a unit of the last place of each element, 2^-9."""
    run = Run(in_form, BASES["SGD"], backend, dtype=dtype, max_grad_norm=LIMIT)
    run.step()
    held = torch.cat([entry["momentum_buffer"].double().flatten() for entry in snapshot_state(run.optimizer)[0]])
    factor = LIMIT / (float(run.optimizer.grad_norm) + 1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-9
    assert float(held.norm()) == pytest.approx(factor * float(run.optimizer.grad_norm), rel=tolerance)


def test_bf16_weights(backend, base, in_form):
    """torch computes the norm of bf16 gradients in bf16 and rounds the clipped gradient: 2^-7 of the largest element; ours
    rounds once, in the state."""
    ours = Run(in_form, base, backend, dtype=torch.bfloat16, max_grad_norm=LIMIT)
    by_torch, step_by_torch = clipped_by_torch(in_form, base, backend, dtype=torch.bfloat16)
    ours.step()
    norm = step_by_torch()
    torch.testing.assert_close(ours.optimizer.grad_norm, norm.float(), rtol=2**-7, atol=0)
    # Squares in the state have twice the error.
    assert_close_runs(ours, by_torch, 2**-6)


def test_below_the_limit_no_bit_changes(backend, fused_or_not, in_form):
    """The factor is 1 and not almost 1."""
    ours, plain = Run(in_form, fused_or_not, backend, max_grad_norm=1e3), Run(in_form, fused_or_not, backend)
    for _ in range(3):
        ours.step()
        plain.step()
        assert 0 < float(ours.optimizer.grad_norm) < 1e3
    assert_same_runs(ours, plain)


def test_no_limit_but_a_reading_of_the_norm(backend, in_form):
    ours, plain = Run(in_form, BASES["SGD"], backend, max_grad_norm=float("inf")), Run(in_form, BASES["SGD"], backend)
    ours.step()
    plain.step()
    assert_same_runs(ours, plain)
    assert float(ours.optimizer.grad_norm) > 0 and plain.optimizer.grad_norm is None


def test_it_clips_the_final_gradient_and_not_the_ascent(backend, by_hand):
    run, plain = Run(by_hand, BASES["SGD"], backend, max_grad_norm=1e-3), Run(by_hand, BASES["SGD"], backend)
    seen = {run: [], plain: []}
    for each in (run, plain):
        each.case.model.register_forward_pre_hook(lambda *_, each=each: seen[each].append(snapshot(each.params)))
        each.step()
    # The weights of every forward pass: clean and perturbed ones in turn, of each micro-batch.
    assert len(seen[run]) == len(seen[plain]) >= 2
    for ours, theirs in zip(seen[run], seen[plain], strict=True):
        assert_same_bits(ours, theirs)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(run.params, _weights_of(seen[run][0]), strict=True))
    assert moved**0.5 == pytest.approx(0.05 * 1e-3, rel=1e-2)


def _weights_of(bits):
    return [entry.view(torch.float32) for entry in bits]


@pytest.mark.parametrize("in_form", ["closure", "perturbed", "first_second"])
def test_parameters_without_a_gradient_have_no_part_in_the_norm(backend, in_form):
    base = (SGD, {"lr": 0.05})
    run, plain = Run(in_form, base, backend, max_grad_norm=LIMIT), Run(in_form, base, backend, max_grad_norm=LIMIT)
    unused = parameter([5.0], torch.float32)
    run.optimizer.add_param_group({"params": [unused]})
    run.step()
    plain.step()
    assert_same_bits(run.params, plain.params)
    assert_same_bits([run.optimizer.grad_norm], [plain.optimizer.grad_norm])
    assert unused.item() == 5.0


def test_switched_off_the_base_optimizer_is_clipped_as_well(backend, base):
    ours, plain = Run("closure", base, backend, max_grad_norm=LIMIT), Run("closure", base, backend)
    ours.optimizer.enabled = plain.optimizer.enabled = False
    ours.step()
    plain.optimizer.zero_grad()
    plain.backward(plain.case.x, plain.case.y)
    norm = clip_grad_norm_(plain.params, LIMIT)
    plain.optimizer.step()
    assert_close_runs(ours, plain, 1e-6)
    torch.testing.assert_close(ours.optimizer.grad_norm, norm, rtol=1e-6, atol=0)


def test_mixed_dtypes_have_one_norm(backend):
    """In the arithmetic of each, which is torch's own in fp32 and fp64; the result is in the widest."""
    values = [3.0, -4.0, 12.0]
    dtypes = (torch.float32, torch.float64, torch.float32)
    params = [parameter([value], dtype) for value, dtype in zip(values, dtypes, strict=True)]
    optimizer = SAM(params, SGD, rho=0.0, lr=1.0, max_grad_norm=1.3, backend=backend)
    optimizer.step(backward_of(lambda: sum(0.5 * (p.double() ** 2).sum() for p in params)))
    assert float(optimizer.grad_norm) == pytest.approx(13.0, rel=1e-6)
    assert [p.item() for p in params] == pytest.approx([0.9 * value for value in values], rel=1e-6)


class Subclass(torch.nn.Parameter):
    """Served by a backend of its own: its memory is not its alone."""


@pytest.mark.parametrize("optimizer_class", [SAM, MicroBatchSAM])
@pytest.mark.parametrize("base_class", [SGD, RMSprop], ids=lambda c: c.__name__)
def test_one_norm_over_tensors_of_several_backends(base_class, optimizer_class):
    a, b = parameter([3.0], torch.float32), Subclass(torch.tensor([4.0]))
    more = {"num_micro_batches": 2} if optimizer_class is MicroBatchSAM else {}
    options = {"rho": 0.0, "lr": 1.0, "max_grad_norm": 1.0, **({"eps": 1.0, "alpha": 0.0} if base_class is RMSprop else {})}
    optimizer = optimizer_class([a, b], base_class, **options, **more)

    def closure(*_):
        loss = 0.5 * (a**2).sum() + 0.5 * (b**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure, *([torch.ones(2)] if more else []))
    assert float(optimizer.grad_norm) == pytest.approx(5.0)
    steps = [0.6, 0.8] if base_class is SGD else [0.6 / 1.6, 0.8 / 1.8]
    assert [a.item(), b.item()] == pytest.approx([3 - steps[0], 4 - steps[1]], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_beyond_fp32s_squares_is_clipped_all_the_same(backend, base, dtype):
    """torch's own would be inf here, and the step one of zeros."""
    w = parameter([3.0, 4.0], dtype)
    optimizer = SAM([w], SGD, rho=0.0, lr=1.0, max_grad_norm=1.0, backend=backend)
    optimizer.step(backward_of(lambda: (w.float() * torch.tensor([3e30, 4e30])).sum()))
    assert float(optimizer.grad_norm) == pytest.approx(5e30, rel=2**-8)
    assert w.tolist() == pytest.approx([2.4, 3.2], rel=2**-8)


# ---- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_gradients_that_are_not_finite_do_what_they_do_in_torch(backend, base, by_hand, bad):
    """inf: a factor of 0, which leaves NaN where the inf was and zeros elsewhere; NaN: NaN everywhere."""
    ours = Run(by_hand, base, backend, max_grad_norm=LIMIT)
    by_torch = Run(by_hand, base, backend)

    def spoil(run):
        run.gradients()[1][0] = bad
        if run is by_torch:
            clip_grad_norm_(run.params, LIMIT)

    ours.step(between=spoil)
    by_torch.step(between=spoil)
    assert torch.equal(ours.optimizer.grad_norm.isnan(), torch.tensor(bad != bad))
    lengths = [int(p.isnan().sum()) for p in ours.params]
    assert lengths == ([0, 1] + [0] * (len(lengths) - 2) if bad == float("inf") else [p.numel() for p in ours.params])
    torch.testing.assert_close(ours.params, by_torch.params, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(
        tensors_of_state(ours.optimizer), tensors_of_state(by_torch.optimizer), rtol=1e-6, atol=1e-7, equal_nan=True
    )


def test_a_gradient_of_zeros_is_none_to_clip(backend, base):
    w = parameter([3.0, 4.0], torch.float32)
    optimizer = SAM([w], base[0], lr=0.1, max_grad_norm=1e-3, backend=backend)
    optimizer.step(backward_of(lambda: 0.0 * w.sum()))
    # AdamW decays weights whatever the gradient.
    assert float(optimizer.grad_norm) == 0.0 and w.tolist() == pytest.approx([3.0, 4.0], rel=2e-3)


def test_a_step_without_any_gradient(fast_backend, fused_or_not):
    """The norm of nothing is 0, as torch has it; the last step's would be taken for this one's."""
    run = Run("perturbed", fused_or_not, fast_backend, max_grad_norm=LIMIT)
    run.step()
    run.optimizer.zero_grad()
    before = snapshot(run.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no gradient
        with run.optimizer.perturbed():
            pass
    run.optimizer.step()
    assert_same_bits(run.params, before)
    assert run.optimizer.grad_norm is None or float(run.optimizer.grad_norm) == 0.0


# ---- grad_norm and .grad ---------------------------------------------------------------------------------------------


def test_grad_norm_is_the_unclipped_norm_and_stays_what_it_was(backend, fused_or_not, in_form):
    run = Run(in_form, fused_or_not, backend, max_grad_norm=LIMIT)
    assert run.optimizer.grad_norm is None
    run.step()
    first = run.optimizer.grad_norm
    value = float(first)
    assert value > LIMIT and first.dim() == 0 and first.device == run.params[0].device and not first.requires_grad
    for _ in range(2):
        run.step()
    assert float(first) == value
    assert run.optimizer.grad_norm is not first and float(run.optimizer.grad_norm) != value


def test_grad_norm_is_none_without_a_limit(backend, fused_or_not, in_form):
    run = Run(in_form, fused_or_not, backend)
    run.step()
    assert run.optimizer.grad_norm is None
    run.optimizer.max_grad_norm = LIMIT
    run.step()
    assert run.optimizer.grad_norm is not None


def test_grad_norm_is_none_again_without_a_limit(fast_backend, fused_or_not, in_form):
    """And not the norm of some earlier step."""
    run = Run(in_form, fused_or_not, fast_backend, max_grad_norm=LIMIT)
    run.step()
    run.optimizer.max_grad_norm = None
    run.step()
    assert run.optimizer.grad_norm is None


def test_no_gradient_is_written(backend, fused_or_not, by_hand):
    run = Run(by_hand, fused_or_not, backend, max_grad_norm=LIMIT)
    for _ in range(2):
        run.passes()
        grads, before = run.gradients(), snapshot(run.gradients())
        run.finish()
        assert all(now is then for now, then in zip(run.gradients(), grads, strict=True))
        assert_same_bits(run.gradients(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", ["grad", "grad.data", "a new tensor"])
def test_what_is_written_into_the_gradients_by_hand_counts(backend, by_hand, write, dtype):
    """Before the step, by one who clips each element; through ``.data``, too, which no version counter sees."""
    run, plain = Run(by_hand, BASES["SGD"], backend, dtype=dtype), Run("perturbed", BASES["SGD"], backend, dtype=dtype)
    run.passes()
    for param in run.params:
        if write == "grad":
            param.grad.fill_(0.25)
        elif write == "grad.data":
            param.grad.data.fill_(0.25)
        else:
            param.grad = torch.full_like(param, 0.25)
    run.finish()
    plain.passes()
    for param in plain.params:
        param.grad.fill_(0.25)
    plain.finish()
    assert_same_runs(run, plain)


# ---- settings --------------------------------------------------------------------------------------------------------


LIMITS = {
    "fp32": lambda: torch.tensor(LIMIT),
    "fp64": lambda: torch.tensor(LIMIT, dtype=torch.float64),
    "one element": lambda: torch.tensor([LIMIT]),
    "on the CPU": lambda: torch.tensor(LIMIT, device="cpu"),
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_the_limit_may_be_a_tensor_that_changes(backend, in_form, limit):
    limit = limit()
    ours, plain = (Run(in_form, BASES["SGD"], backend, max_grad_norm=value) for value in (limit, LIMIT))
    assert ours.optimizer.max_grad_norm is limit
    for value in (LIMIT, 0.1):
        limit.fill_(value)
        plain.optimizer.max_grad_norm = float(value)
        ours.step()
        plain.step()
        assert ours.optimizer.grad_norm.dim() == 0
        # 0.3 is another number in fp32 than in fp64.
        assert_close_runs(ours, plain, 1e-6)


def test_it_may_be_set_between_steps(backend, fused_or_not, in_form):
    """Step by step what a run with that limit does from the same weights and state."""
    run = Run(in_form, fused_or_not, backend)
    for limit in (None, LIMIT, 0.1, None, LIMIT):
        run.optimizer.max_grad_norm = limit
        assert run.optimizer.max_grad_norm == limit
        other = Run(in_form, fused_or_not, backend, max_grad_norm=limit)
        other.case.model.load_state_dict(run.case.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        run.step()
        other.step()
        assert_same_runs(run, other)


WRONG = [0, 0.0, -1.0, float("nan"), "1", True, [1.0], 1j, torch.tensor([1.0, 2.0]), torch.tensor(0.0), torch.tensor(-1.0)]
WRONG += [torch.tensor(1j), torch.tensor(True), torch.tensor([])]


@pytest.mark.cpu_only  # what is on a device is not looked at
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_limits_that_mean_nothing_are_refused_in_one_sentence(wrong):
    w = parameter([1.0])
    with pytest.raises(ValueError) as raised:
        SAM([w], SGD, lr=0.1, max_grad_norm=wrong)
    assert_one_sentence(raised.value, "max_grad_norm", repr(wrong))
    optimizer = SAM([w], SGD, lr=0.1, max_grad_norm=2.0)
    with pytest.raises(ValueError) as raised:
        optimizer.max_grad_norm = wrong
    assert_one_sentence(raised.value, "max_grad_norm", repr(wrong))
    assert optimizer.max_grad_norm == 2.0


def test_a_refused_limit_leaves_the_base_optimizer_as_it_was():
    base = SGD([parameter([1.0])], lr=0.1)
    before, hooks = snapshot_state(base), len(base._optimizer_load_state_dict_pre_hooks)
    with pytest.raises(ValueError, match="max_grad_norm"):
        SAM(base, max_grad_norm=-1.0)
    assert snapshot_state(base) == before and len(base._optimizer_load_state_dict_pre_hooks) == hooks


class Limited(SGD):
    """Somebody's optimizer, with a ``max_grad_norm`` of its own."""

    def __init__(self, params, lr=0.1, max_grad_norm=1.0):
        super().__init__(params, lr=lr)
        self.defaults["max_grad_norm"] = max_grad_norm
        for group in self.param_groups:
            group.setdefault("max_grad_norm", max_grad_norm)

    def step(self, closure=None):
        for group in self.param_groups:
            if group["max_grad_norm"] is not None:
                clip_grad_norm_(group["params"], group["max_grad_norm"])
        super().step()


@pytest.mark.parametrize(
    ("given", "theirs", "ours"),
    [
        ({}, 1.0, None),
        ({"max_grad_norm": 2.0}, 2.0, None),
        ({"max_grad_norm": None}, None, None),  # switched off: not left at its default
        ({"sam_max_grad_norm": 3.0}, 1.0, 3.0),
        ({"max_grad_norm": 2.0, "sam_max_grad_norm": 3.0}, 2.0, 3.0),
    ],
    ids=str,
)
def test_a_base_with_a_limit_of_its_own_keeps_it(given, theirs, ours):
    optimizer = SAM([parameter([1.0])], Limited, **given)
    assert (optimizer.param_groups[0]["max_grad_norm"], optimizer.max_grad_norm) == (theirs, ours)
    instance = {name: value for name, value in given.items() if name != "max_grad_norm"}
    optimizer = SAM(Limited([parameter([1.0])], max_grad_norm=theirs), **instance)
    assert (optimizer.param_groups[0]["max_grad_norm"], optimizer.max_grad_norm) == (theirs, ours)


def test_both_limits_take_effect(backend):
    """Ours on all gradients, then the base optimizer's own on what is left."""
    w = parameter([30.0, 40.0])
    optimizer = SAM([w], Limited, rho=0.0, lr=1.0, max_grad_norm=2.0, sam_max_grad_norm=5.0, backend=backend)
    optimizer.step(backward_of(lambda: 0.5 * (w**2).sum()))
    assert float(optimizer.grad_norm) == pytest.approx(50.0)
    assert w.tolist() == pytest.approx([30 - 1.2, 40 - 1.6], rel=1e-5)


def test_the_limit_is_in_no_group_and_no_checkpoint(fast_backend):
    run = Run("closure", BASES["SGD"], fast_backend, max_grad_norm=LIMIT)
    run.step()
    assert all("max_grad_norm" not in group for group in run.optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("form", MICRO_BATCHES)
def test_micro_batches_are_clipped_once_and_not_each(backend, form):
    """By the norm of their sum, which is less than the sum of theirs."""
    run, plain = Run(form, BASES["SGD"], backend, max_grad_norm=LIMIT), Run("micro_batch", BASES["SGD"], backend)
    run.step()
    plain.passes()
    total = torch.cat([grad.flatten() for grad in plain.gradients()]).double().norm()
    assert float(run.optimizer.grad_norm) == pytest.approx(float(total), rel=1e-6)
    backups = backups_of(run.optimizer)
    assert len(backups) == len(run.params)
