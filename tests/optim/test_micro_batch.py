"""Micro-batch SAM against closed forms, and against every wrong implementation that is known.

L_k = 0.5 (w - c_k)' H_k (w - c_k) with H_1 = diag(1, 2), c_1 = (-3, -2), H_2 = diag(4, 1), c_2 = (0, -1), at w = 0, rho 0.5:
the gradients at 0 are (3, 4) and (0, 1). With SGD at lr 1 the first step is the negative gradient.
"""

import itertools
import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

from sam_fused import SAM, MicroBatchSAM
from tests.optim.helpers import DTYPES, Regression, assert_same_bits, assert_same_state, parameter, snapshot, snapshot_state

CURVATURES = torch.tensor([[1.0, 2.0], [4.0, 1.0]], dtype=torch.float64)
CENTRES = torch.tensor([[-3.0, -2.0], [0.0, -1.0]], dtype=torch.float64)
RHO = 0.5
HOW = ("closure", "by_hand", "hooked")


def quadratic(w, rows):
    """The mean loss of these samples."""
    return 0.5 * (CURVATURES[rows] * (w - CENTRES[rows]) ** 2).sum(1).mean()


def distances(w, samples):
    return 0.5 * ((w - samples) ** 2).sum(1).mean()


def take(optimizer, how, loss, *batch, sizes=None):
    """One step over ``num_micro_batches`` micro-batches, or over those of ``sizes``, by hand."""

    def evaluate(*micro_batch):
        value = loss(*micro_batch)
        value.backward()
        return value

    if how != "by_hand":
        assert sizes is None
        return optimizer.step(evaluate, *batch)
    samples = len(batch[0])
    count = optimizer.num_micro_batches
    sizes = sizes or [samples // count + (index < samples % count) for index in range(count)]
    for pieces in zip(*(tensor.split(sizes) for tensor in batch), strict=True):
        optimizer.zero_grad()
        evaluate(*pieces)
        with optimizer.micro_batch(weight=len(pieces[0]) / samples):
            evaluate(*pieces)
    return optimizer.step()


def make(params, base, count, how="closure", backend=None, **kwargs):
    optimizer = MicroBatchSAM(params, base, num_micro_batches=count, backend=backend, **kwargs)
    if how == "hooked":  # somebody watches the base optimizer's own step: it runs unfused
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def gradient_of_step(how, backend, count, loss, *batch, rho=RHO, **kwargs):
    w = parameter([0.0, 0.0])
    optimizer = make([w], SGD, count, how, backend, lr=1.0, rho=rho, **kwargs)
    take(optimizer, how, lambda *micro_batch: loss(w, *micro_batch), *batch)
    return (-w.detach()).tolist()


def close(values):
    return pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("how", HOW)
def test_closed_forms(backend, how):
    rows = torch.arange(2)
    assert gradient_of_step(how, backend, 2, quadratic, rows) == close([1.65, 3.15])
    assert gradient_of_step(how, backend, 1, quadratic, rows) == close([2.1431196943, 3.1431196943])
    assert gradient_of_step(how, backend, 2, quadratic, rows, rho=0.0) == close([1.5, 2.5])


# Each takes the gradients of the micro-batches' losses as functions of w, and gives what it would step along.
def _perturbed(w, gradient, length=None):
    length = gradient.norm() if length is None else length
    return w + RHO * gradient / length


def _sum(w, gradients, full):
    return sum(g(_perturbed(w, g(w))) for g in gradients)


def _second_gradient_on_the_full_batch(w, gradients, full):
    return sum(full(_perturbed(w, g(w))) for g in gradients) / len(gradients)


def _norm_of_the_mini_batch(w, gradients, full):
    return sum(g(_perturbed(w, g(w), full(w).norm())) for g in gradients) / len(gradients)


def _no_restore(w, gradients, full):
    total = torch.zeros_like(w)
    for g in gradients:
        w = _perturbed(w, g(w))
        total += g(w) / len(gradients)
    return total


def _clip_each(w, gradients, full):
    found = [g(_perturbed(w, g(w))) for g in gradients]
    return sum(g * min(1, 1 / g.norm()) for g in found) / len(gradients)


def _right(w, gradients, full):
    return _sum(w, gradients, full) / len(gradients)


@pytest.mark.parametrize(
    ("wrong", "numbers"),
    [
        (_sum, [3.3, 6.3]),
        (_second_gradient_on_the_full_batch, [1.875, 3.175]),
        (_norm_of_the_mini_batch, [1.7572478777, 3.2717436331]),
        (_no_restore, None),
        (_clip_each, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("how", HOW)
def test_wrong_implementations_are_told_apart(backend, how, wrong, numbers):
    """The formulas of the wrong ones are checked against their known numbers, so that they are the ones that are meant."""
    gradients = [lambda w, k=k: CURVATURES[k] * (w - CENTRES[k]) for k in range(2)]
    w = torch.zeros(2, dtype=torch.float64)
    their_own = wrong(w, gradients, lambda at: sum(g(at) for g in gradients) / 2)
    if numbers is not None:
        assert their_own.tolist() == close(numbers)
    clip = {"max_grad_norm": 1.0} if wrong is _clip_each else {}
    ours = torch.tensor(gradient_of_step(how, backend, 2, quadratic, torch.arange(2), **clip), dtype=torch.float64)
    right = _right(w, gradients, None)
    if clip:
        right = right / (right.norm() + 1e-6)
    assert ours.tolist() == close(right.tolist())
    assert float((ours - their_own).norm()) > 0.01


@pytest.mark.parametrize("how", HOW)
def test_uneven_micro_batches_are_weighted_by_their_samples(backend, how):
    samples = torch.tensor([[-3.0, -2.0], [0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    ours = gradient_of_step(how, backend, 2, distances, samples)
    assert ours == close([1.7357022604, 1.2357022604])
    assert ours != close([1.6767766953, 0.9267766953])  # unweighted


def test_the_order_of_micro_batches_and_their_cut_by_hand(backend):
    samples = torch.tensor([[-1.0, 0.0], [-3.0, -2.0], [0.0, -1.0]], dtype=torch.float64)
    w = parameter([0.0, 0.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=1.0, rho=RHO)
    take(optimizer, "by_hand", lambda x: distances(w, x), samples, sizes=[1, 2])
    assert (-w.detach()).tolist() == close([1.7357022604, 1.2357022604])


@pytest.mark.parametrize("how", HOW)
def test_identical_micro_batches_are_sam(backend, how):
    case, other = Regression(), Regression()
    x, y = case.x[:4].repeat(4, 1), case.y[:4].repeat(4, 1)
    ours = make(case.params, SGD, 4, how, backend, lr=0.1, rho=0.1)
    sam = SAM(other.params, SGD, lr=0.1, rho=0.1, backend=backend)
    for _ in range(5):
        take(ours, how, lambda a, b: torch.nn.functional.mse_loss(case.model(a), b), x, y)
        other.x, other.y = x, y
        sam.step(other.evaluate)
    torch.testing.assert_close(case.params, other.params, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("how", HOW)
def test_one_micro_batch_per_sample(backend, how):
    """One perturbation per example, averaged."""
    samples = torch.randn(7, 2, dtype=torch.float64)
    wanted = torch.stack([x + RHO * x / x.norm() for x in samples]).mean(0)
    assert gradient_of_step(how, backend, 7, lambda w, x: distances(w, -x), samples) == close(wanted.tolist())


BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_one_micro_batch_is_sam_bit_for_bit(backend, name, dtype):
    base, kwargs = BASES[name]
    case, other = Regression(dtype), Regression(dtype)
    ours = make(case.params, base, 1, backend=backend, rho=0.1, **kwargs)
    sam = SAM(other.params, base, rho=0.1, backend=backend, **kwargs)
    for _ in range(3):
        loss = take(ours, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
        assert_same_bits([loss], [sam.step(other.evaluate).detach()])
        assert_same_bits(case.params, other.params)
        assert_same_bits([*ours.losses], [*sam.losses])
    assert_same_state(snapshot_state(ours), snapshot_state(sam))


def test_one_micro_batch_through_the_other_forms_is_sam(backend, form):
    from tests.optim.helpers import take_step

    case, other = Regression(), Regression()
    ours = make(case.params, SGD, 1, backend=backend, rho=0.1, lr=0.1, momentum=0.9)
    sam = SAM(other.params, SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        if form == "closure":
            ours.step(lambda x: case.evaluate(), case.x)
        else:
            take_step(ours, form, case.evaluate)
        take_step(sam, form, other.evaluate)
    assert_same_bits(case.params, other.params)


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("first_pass_done", [False, True])
def test_one_micro_batch_takes_what_sam_takes(backend, first_pass_done, with_batch):
    """Frameworks call ``step(closure)``, and loops that log the first loss ``first_pass_done``: both go on working."""
    case, other = Regression(), Regression()
    ours = make(case.params, SGD, 1, backend=backend, rho=0.1, lr=0.1, momentum=0.9)
    sam = SAM(other.params, SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        batch = (case.x,) if with_batch else ()
        found = []
        for optimizer, each, given in ((ours, case, batch), (sam, other, ())):
            if first_pass_done:
                optimizer.zero_grad()
                each.evaluate()
            closure = lambda *_, each=each: each.evaluate()  # noqa: E731
            found.append(optimizer.step(closure, *given, first_pass_done=first_pass_done).detach())
        assert_same_bits(found[:1], found[1:])
        assert_same_bits(case.params, other.params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_the_fused_form_and_by_hand_have_the_same_bits(backend, name, dtype):
    """The last micro-batch in the last pass, or added up like the others and then the base step: five steps of three."""
    base, kwargs = BASES[name]
    found = []
    for how in ("closure", "by_hand"):
        case = Regression(dtype)
        optimizer = make(case.params, base, 3, how, backend, rho=0.1, **kwargs)
        for _ in range(5):
            take(optimizer, how, lambda x, y, case=case: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
        found.append((snapshot(case.params), snapshot_state(optimizer)))
    assert_same_bits(found[0][0], found[1][0])
    assert_same_state(found[0][1], found[1][1])


def test_an_unfused_base_takes_the_same_step(backend):
    for name, rtol in (("SGD", 1e-12), ("Adam", 1e-9)):
        base, kwargs = BASES[name]
        found = []
        for how in ("closure", "hooked"):
            case = Regression()
            optimizer = make(case.params, base, 3, how, backend, rho=0.1, **kwargs)
            for _ in range(3):
                take(optimizer, how, lambda x, y, case=case: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
            found.append(case.params)
        torch.testing.assert_close(found[0], found[1], rtol=rtol, atol=1e-13)


def test_halves_are_added_up_in_fp32(backend):
    """512 times 1/512: in bf16 the sum stops at 1/2, where 1/512 is half a unit."""
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = make([w], SGD, 512, backend=backend, lr=1.0, rho=0.0)
    take(optimizer, "closure", lambda x: (w * x.mean(0)).sum(), torch.full((512, 4), 1.0, dtype=torch.bfloat16))
    assert w.tolist() == [-1.0] * 4


def dropping(case, pattern):
    """A loss over a net of which each pass uses other parts: ``pattern`` has those left out, pass by pass."""
    calls = itertools.count()

    def loss(x, y):
        left_out = pattern[next(calls) % len(pattern)]
        total = 0.0
        for index, param in enumerate(case.params):
            if index not in left_out:
                total = total + ((param - 0.1 * index) ** 2).sum() * x.mean()
        return total

    return loss


PATTERNS = {
    # Left out in: first and second pass of micro-batch 1, then of 2, then of 3.
    "never": ((),) * 6,
    "first micro-batch": ((0,), (0,), (), (), (), ()),
    "last micro-batch": ((), (), (), (), (1, 2), (1, 2)),
    "middle": ((), (), (0, 3), (0, 3), (), ()),
    "first passes": ((0,), (), (1,), (), (2,), ()),
    "second passes": ((), (0,), (), (1,), (), (2,)),
    "always": ((2,),) * 6,
    "turn by turn": ((0,), (0,), (1,), (1,), (2,), (2,)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
@pytest.mark.parametrize("how", ["closure", "by_hand"])
def test_parameters_without_a_gradient(backend, pattern, name, how):
    """Against a plain loop: who has no gradient in a first pass is not perturbed then, who has none in a second adds nothing,
    who has none in any is not stepped at all."""
    base, kwargs = BASES[name]
    case, other = Regression(), Regression()
    optimizer = make(case.params, base, 3, how, backend, rho=0.1, **kwargs)
    plain = base(other.params, **kwargs)
    ours, theirs = dropping(case, PATTERNS[pattern]), dropping(other, PATTERNS[pattern])
    for _ in range(3):
        take(optimizer, how, ours, case.x, case.y)
        naive_step(plain, theirs, [(x, y) for x, y in zip(other.x.tensor_split(3), other.y.tensor_split(3), strict=True)])
        torch.testing.assert_close(case.params, other.params, rtol=1e-9, atol=1e-12)
    held = [set(optimizer.state.get(p, {})) for p in case.params]
    assert held == [set(plain.state.get(p, {})) for p in other.params]


def naive_step(base, loss, pieces, rho=0.1):
    params = [p for group in base.param_groups for p in group["params"]]
    samples = sum(len(x) for x, _ in pieces)
    total = [None] * len(params)
    for x, y in pieces:
        base.zero_grad()
        loss(x, y).backward()
        clean = [p.detach().clone() for p in params]
        grads = [p.grad for p in params]
        length = math.sqrt(sum(float((g**2).sum()) for g in grads if g is not None))
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                if g is not None:
                    p.add_(g, alpha=rho / (length + 1e-12))
        base.zero_grad()
        loss(x, y).backward()
        with torch.no_grad():
            for index, (p, before) in enumerate(zip(params, clean, strict=True)):
                p.copy_(before)
                if p.grad is not None:
                    share = p.grad * (len(x) / samples)
                    total[index] = share if total[index] is None else total[index] + share
    for p, g in zip(params, total, strict=True):
        p.grad = g
    base.step()


def test_groups(backend):
    """rho, perturb and adaptive per group; the norm is one over the perturbed ones; weight decay and momentum per group."""
    cases = [Regression(), Regression()]
    found = []
    for case, count in zip(cases, (1, 4), strict=True):
        groups = [
            {"params": case.params[:2], "rho": 0.3},
            {"params": case.params[2:4], "perturb": False, "momentum": 0.5},
            {"params": case.params[4:], "adaptive": True, "weight_decay": 0.1, "lr": 0.2},
        ]
        optimizer = make(groups, SGD, count, backend=backend, rho=0.1, lr=0.1)
        x, y = case.x[:4].repeat(count, 1), case.y[:4].repeat(count, 1)
        for _ in range(3):
            take(optimizer, "closure", lambda a, b, case=case: torch.nn.functional.mse_loss(case.model(a), b), x, y)
        found.append(case.params)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
def test_switched_off_it_is_the_base_optimizer_over_the_micro_batches(backend, how):
    case, other = Regression(), Regression()
    optimizer = make(case.params, SGD, 4, how, backend, lr=0.1, momentum=0.9, rho=0.5)
    optimizer.enabled = False
    plain = SGD(other.params, lr=0.1, momentum=0.9)
    for _ in range(3):
        case.calls = 0
        take(optimizer, how, lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
        plain.zero_grad()
        other.evaluate()
        plain.step()
        torch.testing.assert_close(case.params, other.params, rtol=1e-11, atol=1e-13)
    assert optimizer.losses.perturbed is None and optimizer.losses.rise is None


def test_switched_off_a_closure_is_called_once_per_micro_batch(backend):
    w = parameter([1.0, 2.0])
    optimizer = make([w], SGD, 4, backend=backend, lr=0.1)
    calls = []

    def closure(x):
        calls.append(len(x))
        loss = (w * x.mean(0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure, torch.ones(6, 2, dtype=torch.float64))
    assert calls == [2, 2, 2, 2, 1, 1, 1, 1]
    optimizer.enabled = False
    optimizer.step(closure, torch.ones(6, 2, dtype=torch.float64))
    assert calls[8:] == [2, 2, 1, 1]


def test_the_loss_is_the_batch_s_clean_one(backend):
    case = Regression()
    optimizer = make(case.params, SGD, 5, backend=backend, lr=0.1, rho=0.1)
    with torch.no_grad():
        clean = torch.nn.functional.mse_loss(case.model(case.x), case.y)
    loss = take(optimizer, "closure", lambda x, y: torch.nn.functional.mse_loss(case.model(x), y), case.x, case.y)
    assert loss.shape == () and not loss.requires_grad and float(loss) == pytest.approx(float(clean), rel=1e-12)
    assert float(optimizer.losses.clean) == float(loss) and float(optimizer.losses.rise) > 0
    # Numbers instead of tensors, for those who return loss.item().
    floats = make(case.params, SGD, 2, backend=backend, lr=0.0)

    def closure(x, y):
        loss = torch.nn.functional.mse_loss(case.model(x), y)
        loss.backward()
        return loss.item()

    assert isinstance(floats.step(closure, case.x, case.y), float)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_loss_of_halves_is_no_sum_of_halves(dtype, count):
    """Eight losses of 12,768 are more than fp16 holds; and a mean is the same number, of whatever shape the closure's is."""
    w = parameter([1.0], dtype=torch.float32)
    optimizer = make([w], SGD, count, lr=0.0)

    def closure(x):
        (w * x.mean()).sum().backward()
        return torch.full((1,), 12768.0, dtype=dtype)

    loss = optimizer.step(closure, torch.ones(8))
    assert loss.shape == () and loss.dtype == dtype and float(loss) == float(torch.tensor(12768.0, dtype=dtype))
    assert float(optimizer.losses.perturbed) == float(loss)


def test_micro_batches_see_clean_weights_first_and_w_plus_e_second(backend):
    w = parameter([3.0, 4.0])
    optimizer = make([w], SGD, 2, backend=backend, lr=0.1, rho=0.5)
    seen = []

    def closure(x):
        seen.append(w.tolist())
        loss = (w * x.mean(0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure, torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64))
    assert seen[0] == seen[2] == [3.0, 4.0]
    assert seen[1] == pytest.approx([3.3, 4.4]) and seen[3] == pytest.approx([3.0, 4.5])
