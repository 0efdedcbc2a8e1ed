"""The variants that need no kernel of their own: two steps of each worked out by hand, and each held to its definition.

The hand-worked problems are L = 1/2 sum_i a_i w_i^2, whose gradient is a w, with SGD: after one step w - lr a (w + e).
"""

import copy
import math
import pickle

import pytest
import torch
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM
from sam_fused.optim.state import State
from tests.optim.helpers import (
    DTYPES,
    Regression,
    assert_same_bits,
    backward_of,
    parameter,
    snapshot,
)
from tests.optim.interrupts import interrupted_everywhere
from tests.optim.variants import ABS, defined, two_steps, variants


@pytest.mark.parametrize(
    ("options", "start", "curvatures", "first", "second"),
    [
        # T = |w| on the weight, 1 on the bias: T g = (3, 4), e = .5 (4 1.5, 4) / 5 = (.6, .4), gradients (1.95, 5.6).
        ({"adaptive": "weights"}, (2, 1), (0.75, 4), (1.805, 0.44), (1.6147013739, 0.1471099040)),
        # T = (2 + .5, 1): T g = (3, 4), e = .5 (2.5 3, 4) / 5 = (.75, .4).
        ({"adaptive": "weights", "eta": 0.5}, (2, 1), (0.6, 4), (1.835, 0.44), (1.6670977867, 0.1510191629)),
        # e = .5 sign(g) whatever its size.
        ({"p": math.inf}, (3, 4 / 3), (1, 3), (2.65, 4 / 3 - 0.55), (2.335, 4 / 3 - 0.935)),
        # e = .5 T sign(g) with T = (2, 1): (1, .5).
        ({"p": math.inf, "adaptive": "weights"}, (2, -1), (1, 1), (1.7, -0.85), (1.445, -0.715)),
        # w (1 - lr a (1 + rho a)) at every step: factors .89 and .61.
        ({"normalize": False, "rho": 0.1}, (3, 4 / 3), (1, 3), (2.67, 4 / 3 * 0.61), (3 * 0.89**2, 4 / 3 * 0.61**2)),
        # d = (2, 3) + (1, 1), e = (.3, .4), step along (2.6, 4.2) + (1, 1); then d = (1.92, 1.92).
        (
            {"weight_decay_in_ascent": True, "weight_decay": 1.0},
            (1, 1),
            (2, 3),
            (0.64, 0.48),
            (0.64 - 0.1 * (1.28 + math.sqrt(0.5) + 0.64), 0.48 - 0.1 * (1.44 + 1.5 * math.sqrt(0.5) + 0.48)),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_two_steps_by_hand(backend, form, options, start, curvatures, first, second):
    named = [("layer.weight", parameter([float(start[0])])), ("layer.bias", parameter([float(start[1])]))]
    one, two = two_steps(named, curvatures, backend, form, **options)
    assert one == pytest.approx(first, abs=ABS)
    assert two == pytest.approx(second, abs=1e-10)


def test_two_layerwise_steps_by_hand(backend, form):
    """||w|| = (2, .5) and ||g|| = (1.5, 8): ||T g|| = ||(3, 4)|| = 5, e_1 = .5 4 g_1 / 5 = .4 g_1, e_2 = .5 .25 8 / 5 = .2."""
    named = [("a", parameter([1.2, 1.6])), ("b", parameter([0.5]))]
    one, two = two_steps(named, [0.75, 16], backend, form, adaptive="layerwise", lr=0.01)
    assert one == pytest.approx([1.2 - 0.0075 * (1.2 + 0.36), 1.6 - 0.0075 * (1.6 + 0.48), 0.5 - 0.16 * 0.7], abs=ABS)
    lengths = math.hypot(*one[:2]), one[2]
    norm = math.hypot(lengths[0] * 0.75 * lengths[0], lengths[1] * 16 * lengths[1])
    factor = [0.5 * length**2 / norm for length in lengths]
    expected = [w * (1 - 0.0075 * (1 + 0.75 * factor[0])) for w in one[:2]] + [one[2] * (1 - 0.16 * (1 + 16 * factor[1]))]
    assert two == pytest.approx(expected, abs=ABS)


@pytest.mark.parametrize(("eta", "expected"), [(0.0, (0.4743416490, 0.3162277660)), (0.01, (0.4793218247, 0.3163918740))])
def test_asam_with_and_without_eta(backend, eta, expected):
    w = parameter([1.0, -2.0])
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, adaptive="all", eta=eta, backend=backend)
    w.grad = torch.tensor([3.0, 0.5], dtype=torch.float64)
    with optimizer.perturbed():
        moved = (w.detach() - torch.tensor([1.0, -2.0], dtype=torch.float64)).tolist()
    assert moved == pytest.approx(expected, abs=1e-10)


# ---- against the definitions, in every dtype ----------------------------------------------------------------------

ULPS = {torch.float64: 2.0**-48, torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_definition(backend, dtype, options):
    task = Regression(dtype)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.7, perturb_eps=0.0, backend=backend, **options)
    names = [name for name, _ in task.model.named_parameters()]
    task.evaluate()
    weights = [p.detach().double().clone() for p in task.params]
    expected = defined(names, weights, [p.grad.double() for p in task.params], 0.7, options)
    before = snapshot(task.params)
    with optimizer.perturbed():
        for param, w, e in zip(task.params, weights, expected, strict=True):
            assert e.abs().max() > 1e-3
            bound = ULPS[dtype] * (w.abs() + 2 * e.abs())
            assert ((param.detach().double() - (w + e)).abs() <= bound).all()
    assert_same_bits(snapshot(task.params), before)


def moved_by(optimizer):
    """e of a first pass whose gradients are there, group by group."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    clean = [param.detach().double().clone() for param in params]
    with optimizer.perturbed():
        return [param.detach().double() - w for param, w in zip(params, clean, strict=True)]


def test_groups_have_values_of_their_own(backend):
    """eta, decay and definition by group; one norm over all of them: that of (T_1 d_1, T_2 d_2, T_3 g_3)."""
    starts = [1.0, 2.0], [3.0, 4.0], [2.0, -1.0]
    slopes = [0.5, -1.0], [2.0, 1.0], [0.5, 3.0]
    own = {"eta": 0.1, "weight_decay": 0.3}, {"eta": 0.7, "weight_decay": 0.9}, {"weight_decay_in_ascent": False, "rho": 0.25}
    params = [parameter(start) for start in starts]
    groups = [{"params": [param], **values} for param, values in zip(params, own, strict=True)]
    optimizer = SAM(groups, SGD, lr=0.1, rho=0.5, adaptive="all", weight_decay_in_ascent=True, perturb_eps=0.0, backend=backend)
    for param, slope in zip(params, slopes, strict=True):
        param.grad = torch.tensor(slope, dtype=torch.float64)
    directions = [
        param.grad + values.get("weight_decay", 0.0) * param.detach() for param, values in zip(params, own, strict=True)
    ]
    scales = [param.detach().abs() + values.get("eta", 0.0) for param, values in zip(params, own, strict=True)]
    norm = torch.cat([t * d for t, d in zip(scales, directions, strict=True)]).norm()
    for e, t, d, rho in zip(moved_by(optimizer), scales, directions, (0.5, 0.5, 0.25), strict=True):
        torch.testing.assert_close(e, rho * t * t * d / norm, rtol=1e-12, atol=1e-14)


def mixed_groups(backend, base=SGD, **options):
    """Half of the weights perturbed as the kernels do it, and half along a direction that is written out."""
    plain, written = parameter([3.0, 4 / 3]), parameter([1.0, 1.0, -0.5])
    groups = [{"params": [plain]}, {"params": [written], "adaptive": "all", "eta": 0.5}]
    optimizer = SAM(groups, base, **{"lr": 0.1, "rho": 0.05, **options}, backend=backend)
    return optimizer, [plain, written], backward_of(lambda: (plain**2).sum() + (written**4).sum())


def test_what_the_kernels_form_is_not_written_out_beside_what_they_do_not(backend):
    """Memory: the backups of all, and direction and scale of the small group alone. And one norm: ||(e_1, T^-1 e_2)|| = rho."""
    large, small = parameter(torch.randn(4096)), parameter(torch.randn(16))
    optimizer = SAM([{"params": [large]}, {"params": [small], "adaptive": "all", "eta": 0.1}], SGD, lr=0.1, backend=backend)
    scale = small.detach().abs() + 0.1
    large.grad, small.grad = torch.randn(4096).double(), torch.randn(16).double()
    e = moved_by(optimizer)
    assert torch.hypot(e[0].norm(), (e[1] / scale).norm()).item() == pytest.approx(0.05, rel=1e-10)
    assert 8 * (4112 + 32) <= optimizer.buffer_bytes <= 8 * (4112 + 32) + 6 * 128
    optimizer.release_buffers()
    assert optimizer.buffer_bytes == 0


@pytest.mark.parametrize("base", ["SGD", "RMSprop"])
def test_interrupted_anywhere_weights_of_two_kinds_of_groups_are_clean_or_stepped(backend, base):
    """Two parts of one device: the base step restores both in its pass, and an interrupt after it must not undo that."""
    options = {"momentum": 0.9} if base == "SGD" else {}
    cls = getattr(torch.optim, base)

    def begin():
        optimizer, params, evaluate = mixed_groups(backend, cls, **options)
        optimizer.step(evaluate)
        optimizer.zero_grad()
        return optimizer, params, evaluate

    optimizer, params, evaluate = begin()
    optimizer.step(evaluate)
    stepped = snapshot(params)

    def prepare():
        optimizer, params, evaluate = begin()
        before = snapshot(params)

        def check():
            now = snapshot(params)
            if optimizer._control.state is not State.CLEAN:
                return f"state {optimizer._control.state}"
            if any(all(map(torch.equal, now, expected)) for expected in (before, stepped)):
                return None
            return "weights neither clean nor stepped"

        return lambda: optimizer.step(evaluate), check

    interrupted_everywhere(prepare)


def test_layerwise_lengths_are_as_exact_as_their_tensor(backend):
    """An fp64 tensor behind an fp32 one, where nothing is divided by a norm that both share."""
    narrow, wide = parameter([0.1, 0.2], torch.float32), parameter([0.1, 0.3])
    optimizer = SAM([narrow, wide], SGD, lr=0.1, rho=0.5, p=math.inf, adaptive="layerwise", backend=backend)
    narrow.grad, wide.grad = torch.ones(2), torch.tensor([1.0, -1.0], dtype=torch.float64)
    e = 0.5 * math.hypot(0.1, 0.3)
    assert moved_by(optimizer)[1].tolist() == pytest.approx([e, -e], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [1e-25, 0.5, 1e25])
def test_layerwise_lengths_of_any_size_and_range(backend, dtype, value):
    """Large tensors and small ones take their norms in different ways, and squares of 1e25 are no fp32."""
    params = [torch.nn.Parameter(torch.full((size,), value, dtype=dtype)) for size in (40_000, 9, 2**15, 2**15 - 1)]
    optimizer = SAM(params, SGD, lr=0.1, rho=0.5, p=math.inf, adaptive="layerwise", backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    held = params[0].detach()[0].double().item()
    for param, e in zip(params, moved_by(optimizer), strict=True):
        expected = held + 0.5 * held * math.sqrt(param.numel())
        torch.testing.assert_close(e + held, torch.full_like(e, expected), rtol=max(2e-6, ULPS[dtype]), atol=0)


@variants
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))], ids=["deepcopy", "pickle"])
def test_copies_perturb_alike(options, copied):
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.2, momentum=0.9, **options)
    optimizer.step(task.evaluate)
    task.model.zero_grad()
    other_model, other = copied((task.model, optimizer))
    mirror = Regression(torch.float32)
    mirror.model = other_model
    optimizer.step(task.evaluate)
    other.step(mirror.evaluate)
    assert_same_bits(snapshot(mirror.params), snapshot(task.params))


@variants
def test_micro_batches_perturb_each_along_its_own(backend, options):
    """Two steps over two micro-batches, against the definition applied to each."""
    task, mirror = Regression(), Regression()
    optimizer = MicroBatchSAM(
        task.model.named_parameters(), SGD, num_micro_batches=2, lr=0.1, rho=0.3, backend=backend, **options
    )
    names = [name for name, _ in mirror.model.named_parameters()]
    decay = options.get("weight_decay", 0.0)

    def closure(x, y):
        loss = torch.nn.functional.mse_loss(task.model(x), y)
        loss.backward()
        return loss

    def gradients(rows):
        loss = torch.nn.functional.mse_loss(mirror.model(mirror.x[rows]), mirror.y[rows])
        return torch.autograd.grad(loss, mirror.params)

    for _ in range(2):
        optimizer.step(closure, task.x, task.y)
        clean = [p.detach().clone() for p in mirror.params]
        total = [torch.zeros_like(p) for p in clean]
        for rows in (slice(0, 8), slice(8, 16)):
            moves = defined(names, clean, gradients(rows), 0.3, options)
            with torch.no_grad():
                for p, w, e in zip(mirror.params, clean, moves, strict=True):
                    p.copy_(w + e)
            total = [t + 0.5 * g for t, g in zip(total, gradients(rows), strict=True)]
            with torch.no_grad():
                for p, w in zip(mirror.params, clean, strict=True):
                    p.copy_(w)
        with torch.no_grad():
            for p, g in zip(mirror.params, total, strict=True):
                p.sub_(0.1 * (g + decay * p))
        for ours, theirs in zip(task.params, mirror.params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
