"""The variants that need no kernel of their own: two steps of each worked out by hand, and what each becomes at the edges.

The hand-worked problems are L = 1/2 sum_i a_i w_i^2, whose gradient is a w, with SGD: after one step w - lr a (w + e).
"""

import math

import pytest
import torch
from torch.optim import SGD, Adadelta, AdamW

from sam_fused import SAM, MicroBatchSAM, bisam_ascent_loss, norm_parameters
from sam_fused import perturb as perturb_tensors
from tests.devices import default
from tests.optim.helpers import (
    DTYPES,
    Regression,
    assert_one_sentence,
    assert_same_bits,
    backups_of,
    backward_of,
    parameter,
    snapshot,
    take_step,
)

ABS = 1e-11

# Each with what it is called in ``test_against_the_definition``.
VARIANTS = {
    "all": {"adaptive": "all"},
    "all, eta": {"adaptive": "all", "eta": 0.3},
    "weights": {"adaptive": "weights"},
    "weights, eta": {"adaptive": "weights", "eta": 0.3},
    "layerwise": {"adaptive": "layerwise"},
    "inf": {"p": math.inf},
    "inf, weights": {"p": math.inf, "adaptive": "weights", "eta": 0.3},
    "inf, layerwise": {"p": math.inf, "adaptive": "layerwise"},
    "unnormalised": {"normalize": False},
    "unnormalised, all": {"normalize": False, "adaptive": "all"},
    "unnormalised, layerwise": {"normalize": False, "adaptive": "layerwise"},
    "decay": {"weight_decay_in_ascent": True, "weight_decay": 0.4},
    "decay, weights": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "adaptive": "weights", "eta": 0.3},
    "decay, unnormalised": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "normalize": False},
    "decay, inf": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "p": math.inf},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def two_steps(named, curvatures, backend, form, **options):
    """The weights after one and after two steps of lr 0.1 and rho 0.5 (unless said) on 1/2 sum a w^2."""
    params = [param for _, param in named]
    optimizer = SAM(named, SGD, **{"lr": 0.1, "rho": 0.5, **options}, backend=backend)
    curvatures = [torch.as_tensor(a, dtype=torch.float64) for a in curvatures]

    def loss():
        return sum(0.5 * (a * w * w).sum() for a, w in zip(curvatures, params, strict=True))

    seen = []
    for _ in range(2):
        take_step(optimizer, form, backward_of(loss))
        seen.append([value for param in params for value in param.flatten().tolist()])
    return seen


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


def test_two_steps_of_sam_on_by_hand(backend, form):
    """Only the second tensor is perturbed, by rho along its own gradient: e = (0, .5)."""
    on, off = parameter([1.0]), parameter([3.0])
    optimizer = SAM([{"params": [off], "perturb": False}, {"params": [on]}], SGD, lr=0.1, rho=0.5, backend=backend)
    for expected in ((2.7, 0.55), (2.43, 0.235)):  # w_1 (1 - .1), w_2 - .1 3 (w_2 + .5)
        take_step(optimizer, form, backward_of(lambda: 0.5 * (off * off + 3 * on * on).sum()))
        assert [off.item(), on.item()] == pytest.approx(expected, abs=ABS)


def test_two_steps_of_two_losses_by_hand(backend):
    """Perturbed along the gradient of w_1 + 2 w_2: e = .5 (1, 2) / sqrt(5); stepped along that of |w|^2 / 2, which is w + e."""
    w = parameter([3.0, 4.0])
    slopes = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, backend=backend)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for _ in range(2):
        loss = optimizer.step(backward_of(lambda: 0.5 * (w * w).sum()), ascent_closure=backward_of(lambda: (slopes * w).sum()))
        moved = expected + 0.5 * slopes / math.sqrt(5)
        assert loss.item() == pytest.approx(0.5 * (moved**2).sum().item(), abs=ABS)
        expected = expected - 0.1 * moved
        assert w.tolist() == pytest.approx(expected.tolist(), abs=ABS)


@pytest.mark.parametrize(("eta", "expected"), [(0.0, (0.4743416490, 0.3162277660)), (0.01, (0.4793218247, 0.3163918740))])
def test_asam_with_and_without_eta(backend, eta, expected):
    w = parameter([1.0, -2.0])
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, adaptive="all", eta=eta, backend=backend)
    w.grad = torch.tensor([3.0, 0.5], dtype=torch.float64)
    with optimizer.perturbed():
        moved = (w.detach() - torch.tensor([1.0, -2.0], dtype=torch.float64)).tolist()
    assert moved == pytest.approx(expected, abs=1e-10)


# ---- against the definitions, in every dtype --------------------------------------------------------------------------


def defined(names, weights, grads, rho, options):
    """e as the papers write it, in fp64: one line for each thing that may be asked for."""
    adaptive, eta = options.get("adaptive"), options.get("eta", 0.0)
    grads = [g + options.get("weight_decay", 0.0) * w for g, w in zip(grads, weights, strict=True)]
    scales = []
    for name, w in zip(names, weights, strict=True):
        scaled = adaptive == "all" or (adaptive == "weights" and name.endswith("weight"))
        scales.append(w.norm() if adaptive == "layerwise" else w.abs() + eta if scaled else torch.ones_like(w))
    if options.get("p") == math.inf:
        return [rho * t * g.sign() for t, g in zip(scales, grads, strict=True)]
    norm = torch.stack([(t * g).norm() for t, g in zip(scales, grads, strict=True)]).norm()
    return [rho * t * t * g / (norm if options.get("normalize", True) else 1) for t, g in zip(scales, grads, strict=True)]


# Of what moves: the storage's rounding of w + e, and the arithmetic's.
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


# ---- what each becomes at the edges -----------------------------------------------------------------------------------


def trained(backend, form="closure", steps=3, dtype=torch.float32, cls=SAM, base=SGD, prepare=None, **options):
    """The bits of the weights after some steps."""
    task = Regression(dtype)
    if prepare is not None:
        prepare(task)
    params = options.pop("params", None)
    optimizer = cls(
        params(task) if params else task.model.named_parameters(), base, backend=backend, **{"lr": 0.1, "rho": 0.2, **options}
    )
    for _ in range(steps):
        take_step(optimizer, form, task.evaluate)
    return snapshot(task.params)


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


# ---- what surrounds a step --------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_gradient_that_is_zero_or_not_finite_moves_nothing(backend, options, value):
    options = {key: entry for key, entry in options.items() if "decay" not in key}
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.5, backend=backend, **options)
    for param in task.params:
        param.grad = torch.zeros_like(param)
    task.params[0].grad[0, 0] = value
    before = snapshot(task.params)
    with optimizer.perturbed():
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
    """Also those that change what the kernels can do by themselves: eta from 0, a decay, p."""
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


# ---- SAM-ON -----------------------------------------------------------------------------------------------------------


def test_sam_on_backs_up_what_it_perturbs_and_nothing_else(backend):
    """Of 2,140 parameters the 40 of the norm layer: their bytes rounded up to cache lines, twice over and no more."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 62))
    for adaptive, copies in ((False, 1), ("layerwise", 2)):  # the direction of a layerwise T is written out
        optimizer = SAM(norm_parameters(model), SGD, lr=0.1, adaptive=adaptive, backend=backend)
        x = torch.randn(8, 40, device=default())
        model.to(default())
        model(x).square().mean().backward()
        clean = snapshot(model.parameters())
        with optimizer.perturbed():
            moved = [not torch.equal(a, b) for a, b in zip(snapshot(model.parameters()), clean, strict=True)]
            model(x).square().mean().backward()
        assert moved == [False, False, True, True, False, False]
        assert 2 * 20 * 4 * copies <= optimizer.buffer_bytes <= copies * (2 * 128 + 64)
        assert len(backups_of(optimizer)) == 2
        optimizer.step()


def test_the_norm_is_over_the_norm_layers_alone(backend):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).to(default(), torch.float64)
    optimizer = SAM(norm_parameters(model), SGD, lr=0.1, rho=0.5, backend=backend)
    for param in model.parameters():
        param.grad = torch.full_like(param, 100.0)
    model[1].weight.grad.fill_(0.0)[0] = 3.0
    model[1].bias.grad.fill_(0.0)[1] = 4.0
    before = [p.detach().clone() for p in model[1].parameters()]
    with optimizer.perturbed():
        moves = [(p.detach() - w).tolist() for p, w in zip(model[1].parameters(), before, strict=True)]
    assert moves[0] == pytest.approx([0.3, 0, 0], abs=ABS) and moves[1] == pytest.approx([0, 0.4, 0], abs=ABS)


# ---- two losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SAM, MicroBatchSAM])
def test_the_same_loss_twice_is_sam(backend, cls):
    kwargs = {"num_micro_batches": 1} if cls is MicroBatchSAM else {}
    task = Regression(torch.float32)
    optimizer = cls(task.params, SGD, lr=0.1, rho=0.2, backend=backend, **kwargs)
    for _ in range(3):
        optimizer.step(task.evaluate, ascent_closure=task.evaluate)
    assert_same_bits(snapshot(task.params), trained(backend))


def test_each_pass_has_its_batch_and_its_loss(backend):
    """The first pass sees the other half of the data; against both passes by hand."""
    task, by_hand = Regression(torch.float32), Regression(torch.float32)
    optimizer = SAM(task.params, SGD, lr=0.1, rho=0.2, momentum=0.9, backend=backend)
    reference = SAM(by_hand.params, SGD, lr=0.1, rho=0.2, momentum=0.9, backend=backend)

    def on(task, rows, criterion):
        return backward_of(lambda: criterion(task.model(task.x[rows]), task.y[rows]))

    first, second = slice(0, 8), slice(8, 16)
    l1, mse = torch.nn.functional.l1_loss, torch.nn.functional.mse_loss
    for _ in range(3):
        loss = optimizer.step(on(task, second, mse), ascent_closure=on(task, first, l1))
        reference.zero_grad()
        on(by_hand, first, l1)()
        with reference.perturbed():
            expected = on(by_hand, second, mse)()
        reference.step()
        assert torch.equal(loss, expected.detach()) and torch.equal(optimizer.losses.perturbed, loss)
        assert optimizer.losses.rise is None
    assert_same_bits(snapshot(task.params), snapshot(by_hand.params))


def test_two_losses_over_micro_batches(backend):
    task, by_hand = Regression(torch.float32), Regression(torch.float32)
    optimizer = MicroBatchSAM(task.params, SGD, num_micro_batches=2, lr=0.1, rho=0.2, backend=backend)
    reference = MicroBatchSAM(by_hand.params, SGD, num_micro_batches=2, lr=0.1, rho=0.2, backend=backend)

    def over(task, criterion):
        def closure(x, y):
            loss = criterion(task.model(x), y)
            loss.backward()
            return loss

        return closure

    l1, mse = torch.nn.functional.l1_loss, torch.nn.functional.mse_loss
    for _ in range(2):
        loss = optimizer.step(over(task, mse), task.x, task.y, ascent_closure=over(task, l1))
        losses = []
        for rows in (slice(0, 8), slice(8, 16)):
            reference.zero_grad()
            over(by_hand, l1)(by_hand.x[rows], by_hand.y[rows])
            with reference.micro_batch(weight=0.5):
                losses.append(over(by_hand, mse)(by_hand.x[rows], by_hand.y[rows]).item())
        reference.step()
        assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert_same_bits(snapshot(task.params), snapshot(by_hand.params))


@pytest.mark.parametrize("count", [None, 1, 2])
def test_switched_off_the_ascent_closure_is_never_called(count):
    task = Regression()
    kwargs = {} if count is None else {"num_micro_batches": count}
    optimizer = (SAM if count is None else MicroBatchSAM)(task.params, SGD, lr=0.1, **kwargs)
    optimizer.enabled = False
    batch = () if count is None else (task.x, task.y)

    def closure(*rows):
        return task.evaluate()

    def never(*rows):
        raise AssertionError("called")

    loss = optimizer.step(closure, *batch, ascent_closure=never)
    assert task.calls == (count or 1) and loss is not None


def test_an_ascent_closure_without_a_first_pass_is_refused(backend):
    task = Regression()
    optimizer = SAM(task.params, SGD, lr=0.1, backend=backend)
    before = snapshot(task.params)
    for arguments in (
        {"closure": None, "ascent_closure": task.evaluate},
        {"closure": task.evaluate, "ascent_closure": task.evaluate, "first_pass_done": True},
    ):
        with pytest.raises(RuntimeError) as error:
            optimizer.step(**arguments)
        assert_one_sentence(error.value, "ascent_closure")
    assert_same_bits(snapshot(task.params), before)
    task.evaluate()
    with optimizer.perturbed():
        task.evaluate()
    with pytest.raises(RuntimeError) as error:
        optimizer.step(task.evaluate, ascent_closure=task.evaluate)
    assert_one_sentence(error.value, "ascent_closure")
    optimizer.step()
    assert task.calls == 2


def test_the_ascent_loss_of_bisam():
    """Two classes behind by 10 and ahead by 10: tanh(1) and -tanh(1), and phi(0) = 0 of the class itself."""
    logits = torch.tensor([[0.0, 10.0, -10.0]], dtype=torch.float64)
    target = torch.tensor([0])
    t = math.tanh(1.0)
    assert bisam_ascent_loss(logits, target).item() == pytest.approx(math.log(1 + math.exp(t) + math.exp(-t)))
    expected = math.log(1 + math.exp(10 * t) + math.exp(-10 * t)) / 10
    assert bisam_ascent_loss(logits, target, mu=10).item() == pytest.approx(expected)
    gamma = math.log(math.e - 1)
    phi = [1 - math.log(1 + math.exp(gamma - x)) for x in (0.0, 10.0, -10.0)]
    assert phi[0] == pytest.approx(0)
    assert bisam_ascent_loss(logits, target, phi="log").item() == pytest.approx(math.log(sum(map(math.exp, phi))))
    two = bisam_ascent_loss(logits.repeat(2, 1), torch.tensor([0, 1]))
    ahead = [math.tanh(-1), 0, math.tanh(-2)]
    assert two.item() == pytest.approx((math.log(1 + math.exp(t) + math.exp(-t)) + math.log(sum(map(math.exp, ahead)))) / 2)


def test_bisam_descends_the_cross_entropy(backend):
    """The two passes of a step, with the gradients written out."""
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3).double()
    mirror = torch.nn.Linear(4, 3).double()
    mirror.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    optimizer = SAM(model.parameters(), SGD, lr=0.1, rho=0.5, backend=backend)
    cross_entropy = torch.nn.functional.cross_entropy
    for _ in range(2):
        optimizer.step(
            backward_of(lambda: cross_entropy(model(x), y)), ascent_closure=backward_of(lambda: bisam_ascent_loss(model(x), y))
        )
        params = list(mirror.parameters())
        ascent = torch.autograd.grad(bisam_ascent_loss(mirror(x), y), params)
        norm = torch.cat([g.flatten() for g in ascent]).norm()
        moved = [(p + 0.5 * g / norm).detach().requires_grad_() for p, g in zip(params, ascent, strict=True)]
        descent = torch.autograd.grad(cross_entropy(torch.nn.functional.linear(x, *moved), y), moved)
        with torch.no_grad():
            for p, g in zip(params, descent, strict=True):
                p.sub_(0.1 * g)
    for ours, theirs in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# ---- loss scale -------------------------------------------------------------------------------------------------------

NEEDS_SCALE = {key: options for key, options in VARIANTS.items() if key.startswith(("unnormalised", "decay"))}


def scaled_steps(task, optimizer, scaler, told, by="perturbed"):
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(task.loss()).backward()
        scale = {"grad_scale": scaler.get_scale()} if told else {}
        if by == "perturbed":
            with optimizer.perturbed(**scale):
                scaler.scale(task.loss()).backward()
        elif by == "micro_batch":
            with optimizer.micro_batch(1.0, **scale):
                scaler.scale(task.loss()).backward()
        else:
            optimizer.first_step(zero_grad=True, **scale)
            scaler.scale(task.loss()).backward()
        scaler.step(optimizer)
        scaler.update()


@variants
@pytest.mark.parametrize("by", ["perturbed", "first_step", "micro_batch"])
def test_a_loss_scale_that_is_told_changes_nothing(backend, options, by):
    """To the bit where nothing is added to the gradient: the scale is a power of two."""
    expected = trained(backend, steps=2, perturb_eps=0.0, **options)
    task = Regression(torch.float32)
    cls, kwargs = (MicroBatchSAM, {"num_micro_batches": 1}) if by == "micro_batch" else (SAM, {})
    named = task.model.named_parameters()
    optimizer = cls(named, SGD, lr=0.1, rho=0.2, perturb_eps=0.0, backend=backend, **options, **kwargs)
    scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=1024.0), True, by)
    assert_same_bits(snapshot(task.params), expected)


@pytest.mark.parametrize("options", NEEDS_SCALE.values(), ids=NEEDS_SCALE.keys())
def test_a_loss_scale_that_is_not_told_is_refused_where_it_matters(backend, options):
    task = Regression(torch.float32)
    optimizer = SAM(task.model.named_parameters(), SGD, lr=0.1, rho=0.2, backend=backend, **options)
    before = snapshot(task.params)
    with pytest.raises(RuntimeError) as error:
        scaled_steps(task, optimizer, torch.amp.GradScaler(default().type, init_scale=1024.0), False)
    assert_one_sentence(error.value, "grad_scale=scaler.get_scale()")
    assert_same_bits(snapshot(task.params), before)
    optimizer.restore()
    optimizer.zero_grad()
    optimizer.step(task.evaluate)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "1", True])
def test_a_scale_that_is_none_is_refused(scale):
    task = Regression()
    optimizer = SAM(task.params, SGD, lr=0.1, normalize=False)
    task.evaluate()
    before = snapshot(task.params)
    with pytest.raises(ValueError) as error, optimizer.perturbed(grad_scale=scale):
        pass
    assert_one_sentence(error.value, "grad_scale", repr(scale))
    assert_same_bits(snapshot(task.params), before)


# ---- names and bad input ----------------------------------------------------------------------------------------------


class Parametrised(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_which_tensors_are_weights():
    """The authors' rule, by a tensor's own name: of any layer, of LSTMs and attention, parametrised ones too."""
    model = torch.nn.ModuleDict(
        {
            "weighted": torch.nn.Linear(2, 2),
            "norm": torch.nn.BatchNorm1d(2),
            "lstm": torch.nn.LSTM(2, 2),
            "attention": torch.nn.MultiheadAttention(2, 1),
            "other": torch.nn.Linear(2, 2),
        }
    )
    torch.nn.utils.parametrize.register_parametrization(model["other"], "weight", Parametrised())
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(2)))
    optimizer = SAM(model.parameters(), SGD, lr=0.1, adaptive="weights", model=model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    (part,) = optimizer._ascent.parts
    names = [name for name, _ in model.named_parameters()]
    scaled = {name for name, flag in zip(names, part.tensors.scaling, strict=True) if flag}
    optimizer.restore()
    assert scaled == {
        "weighted.weight",
        "norm.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "other.parametrizations.weight.original",
    }


@pytest.mark.parametrize("how", ["named", "model", "groups", "instance"])
def test_names_come_from_named_parameters_or_the_model(how):
    task = Regression()
    named = list(task.model.named_parameters())
    if how == "named":
        optimizer = SAM(named, SGD, lr=0.1, adaptive="weights")
    elif how == "model":
        optimizer = SAM(task.params, SGD, lr=0.1, adaptive="weights", model=task.model)
    elif how == "groups":
        optimizer = SAM([{"params": named[:3]}, {"params": named[3:]}], SGD, lr=0.1, adaptive="weights")
    else:
        optimizer = SAM(SGD(named, lr=0.1), adaptive="weights")
    expected = trained(None, dtype=torch.float64, steps=1, adaptive="weights")
    optimizer.param_groups[0]["rho"] = optimizer.param_groups[-1]["rho"] = 0.2
    optimizer.step(task.evaluate)
    assert_same_bits(snapshot(task.params), expected)


def test_weights_without_names_are_refused():
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM(task.params, SGD, lr=0.1, adaptive="weights")
    assert_one_sentence(error.value, "model.named_parameters()", "nobody has told")
    with pytest.raises(ValueError) as error:
        SAM(task.params, SGD, lr=0.1, adaptive="weights", model=torch.nn.Linear(2, 2))
    assert_one_sentence(error.value, "no such parameter")
    optimizer = SAM(list(task.model[0].named_parameters()), SGD, lr=0.1, adaptive="weights")
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": task.model[3].weight, "adaptive": "weights"})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["param_names"] = None
    del optimizer.param_groups[0]["param_names"]
    task.evaluate()
    before = snapshot(task.params)
    with pytest.raises(ValueError):
        optimizer.first_step()
    assert_same_bits(snapshot(task.params), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": -0.1}, ("rho", ">= 0", "-0.1")),
        ({"eta": -0.1}, ("eta", ">= 0", "-0.1")),
        ({"eta": math.nan}, ("eta", ">= 0", "nan")),
        ({"eta": torch.tensor(0.1)}, ("eta",)),
        ({"adaptive": "filterwise"}, ("adaptive", "all, weights, layerwise", "'filterwise'")),
        ({"adaptive": 1}, ("adaptive", "all, weights, layerwise", "1")),
        ({"weight_decay_in_ascent": 0.1}, ("weight_decay_in_ascent", "True or False", "0.1")),
        ({"p": 1}, ("p:", "math.inf", "1")),
        ({"p": math.nan}, ("p:", "nan")),
        ({"p": "inf"}, ("p:", "'inf'")),
        ({"normalize": 0}, ("normalize", "True or False", "0")),
        ({"normalize": False, "p": math.inf}, ("normalize", "p=inf")),
    ],
    ids=str,
)
def test_bad_input(options, words):
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM(task.params, SGD, lr=0.1, **options)
    assert_one_sentence(error.value, *words)
    if options.keys() & {"p", "normalize"}:
        return
    with pytest.raises(ValueError) as error:
        SAM([{"params": task.params, **options}], SGD, lr=0.1)
    assert_one_sentence(error.value, *words)
    optimizer = SAM(task.params[:2], SGD, lr=0.1)
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": task.params[2:], **options})
    assert len(optimizer.param_groups) == 1
    task.evaluate()
    optimizer.param_groups[0].update(options)
    before = snapshot(task.params)
    with pytest.raises(ValueError) as error:
        optimizer.first_step()
    assert_one_sentence(error.value, *words)
    assert_same_bits(snapshot(task.params), before)


class WithoutDecay(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        raise NotImplementedError


def test_a_decay_that_the_base_has_not_is_refused():
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM(task.params, WithoutDecay, weight_decay_in_ascent=True)
    assert_one_sentence(error.value, "weight_decay_in_ascent", "without")
    optimizer = SAM(task.params[:2], Adadelta, lr=0.1, weight_decay=0.1, weight_decay_in_ascent=True)
    optimizer.add_param_group({"params": task.params[2:]})  # takes the base's decay from its defaults
    optimizer.step(task.evaluate)


def test_tensors_without_an_optimizer_have_two_definitions():
    w = parameter([1.0])
    w.grad = torch.ones_like(w)
    with pytest.raises(TypeError) as error:
        perturb_tensors([w], adaptive="layerwise")
    assert_one_sentence(error.value, "adaptive", "layerwise", "SAM")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"phi": "sigmoid"}, ("phi", "tanh, log", "sigmoid")),
        ({"mu": 0.0}, ("mu", "0.0")),
        ({"alpha": math.inf}, ("alpha", "inf")),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ("logits", "[samples, classes]")),
    ],
)
def test_bad_input_of_the_bisam_loss(arguments, words):
    with pytest.raises(ValueError) as error:
        bisam_ascent_loss(**{"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.int64), **arguments})
    assert_one_sentence(error.value, *words)
