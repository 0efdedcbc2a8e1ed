"""Every optimizer in torch.optim as a base: constructed or refused, nothing of it shadowed, run by the right hands."""

import inspect
import warnings

import pytest
import torch
from torch.optim import SGD, Adadelta, Adam, AdamW, RMSprop

from sam_fused import SAM
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    backward_of,
    parameter,
    take_step,
)

OPTIMIZERS = [
    value
    for _, value in sorted(vars(torch.optim).items())
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
]
# What cannot be a base, with a word of the reason.
REFUSED = {"LBFGS": "closure", "SparseAdam": "sparse"}
BASES = [value for value in OPTIMIZERS if value.__name__ not in REFUSED]
OWN = {
    "rho": 0.05,
    "adaptive": False,
    "perturb": True,
    "perturb_eps": 1e-12,
    "eta": 0.0,
    "weight_decay_in_ascent": False,
}


def weights():
    # Muon takes matrices only.
    return [torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).double()), parameter([[0.3, -0.7], [0.1, 0.2]])]


def evaluate_of(params):
    return backward_of(lambda: sum(((p - 0.05) ** 4).sum() + (p**2).sum() for p in params))


def test_all_of_torch_optim_is_looked_at():
    assert len(OPTIMIZERS) >= 15 and {"SGD", "Adadelta", "RMSprop", "LBFGS"} <= {o.__name__ for o in OPTIMIZERS}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_base_is_refused_in_one_sentence(fast_backend, name):
    base_class = getattr(torch.optim, name)
    with pytest.raises(TypeError) as raised:
        SAM(weights(), base_class, backend=fast_backend)
    assert_one_sentence(raised.value, name, REFUSED[name])
    with pytest.raises(TypeError) as raised:
        SAM(base_class(weights()), backend=fast_backend)
    assert_one_sentence(raised.value, name, REFUSED[name])


def construct(base_class, how, params, backend):
    if how == "class":
        return SAM(params, base_class, backend=backend)
    return SAM(base_class(params), backend=backend)


@pytest.mark.parametrize("how", ["class", "instance"])
@pytest.mark.parametrize("base_class", BASES, ids=lambda c: c.__name__)
def test_defaults_of_the_base_arrive_unchanged(fast_backend, base_class, how):
    plain = base_class(weights())
    optimizer = construct(base_class, how, weights(), fast_backend)
    assert type(optimizer.base_optimizer) is base_class
    ours = {}
    for key, value in OWN.items():
        name = key if key not in plain.defaults else f"sam_{key}"
        assert optimizer.param_groups[0][name] == value
        ours[name] = value
    for key, value in plain.param_groups[0].items():
        if key != "params":
            assert optimizer.param_groups[0][key] == value, key
            assert key not in ours
    assert optimizer.param_groups[0].keys() - plain.param_groups[0].keys() == ours.keys()
    # Not one keyword of its constructor is taken by SAM's.
    keywords = set(inspect.signature(base_class.__init__).parameters) - {"self", "params"}
    assert not keywords & ours.keys()


@pytest.mark.parametrize("how", ["class", "instance"])
@pytest.mark.parametrize("base_class", BASES, ids=lambda c: c.__name__)
def test_every_base_takes_sam_steps(backend, base_class, how):
    params, plain_params = weights(), weights()
    optimizer = construct(base_class, how, params, backend)
    for group in optimizer.param_groups:
        group[optimizer._names["rho"]] = 0.0
    plain = base_class(plain_params)
    for _ in range(3):
        optimizer.step(evaluate_of(params))
        plain.zero_grad()
        evaluate_of(plain_params)()
        plain.step()
    torch.testing.assert_close(params, plain_params, rtol=1e-12, atol=1e-12)
    # And with a radius it does something else. One step of Adam's kind moves by the gradient's sign alone, so take a few.
    optimizer.param_groups[0][optimizer._names["rho"]] = 0.5
    for _ in range(3):
        optimizer.step(evaluate_of(params))
        plain.zero_grad()
        evaluate_of(plain_params)()
        plain.step()
    if base_class.__name__ != "Rprop":  # signs only, and they agree here
        assert any(not torch.equal(a, b) for a, b in zip(params, plain_params, strict=True))


def test_adadelta_keeps_its_rho(backend):
    params = weights()
    optimizer = SAM(params, Adadelta, sam_rho=0.2, backend=backend)
    assert optimizer.param_groups[0]["rho"] == 0.9 and optimizer.param_groups[0]["sam_rho"] == 0.2
    clean = [p.detach().clone() for p in params]
    evaluate_of(params)()
    with optimizer.perturbed():
        moved = torch.cat([(p.detach() - c).flatten() for p, c in zip(params, clean, strict=True)])
    assert moved.norm().item() == pytest.approx(0.2, rel=1e-10)
    with pytest.raises(TypeError) as raised:
        SAM(weights(), Adadelta, rho=0.2)
    assert_one_sentence(raised.value, "sam_rho", "Adadelta")
    # An instance has its own rho already, so the keyword can only be SAM's.
    for keyword in ("rho", "sam_rho"):
        wrapped = SAM(Adadelta(weights(), rho=0.8), backend=backend, **{keyword: 0.3})
        assert wrapped.param_groups[0]["rho"] == 0.8 and wrapped.param_groups[0]["sam_rho"] == 0.3
    groups = [{"params": weights()[:1], "rho": 0.7, "sam_rho": 0.1}]
    grouped = SAM(groups, Adadelta, backend=backend)
    assert grouped.param_groups[0]["rho"] == 0.7 and grouped.param_groups[0]["sam_rho"] == 0.1


def test_adam_keeps_its_eps(backend):
    optimizer = SAM(weights(), Adam, eps=1e-3, perturb_eps=1e-6, backend=backend)
    assert optimizer.param_groups[0]["eps"] == 1e-3 and optimizer.param_groups[0]["perturb_eps"] == 1e-6
    assert optimizer.base_optimizer.defaults["eps"] == 1e-3


def test_a_base_with_an_option_of_ours(backend):
    """Somebody's optimizer has an ``adaptive`` and a ``rho`` of its own."""

    class Odd(SGD):
        def __init__(self, params, lr=0.1, *, adaptive=7.0, rho=3.0):
            super().__init__(params, lr=lr)
            self.defaults.update(adaptive=adaptive, rho=rho)
            for group in self.param_groups:
                group.update(adaptive=adaptive, rho=rho)

    for optimizer in (SAM(weights(), Odd, backend=backend, sam_rho=0.3), SAM(Odd(weights()), backend=backend, sam_rho=0.3)):
        group = optimizer.param_groups[0]
        assert (group["adaptive"], group["rho"], group["sam_adaptive"], group["sam_rho"]) == (7.0, 3.0, False, 0.3)
        optimizer.step(evaluate_of(group["params"]))


WRONG_BASES = {
    "none": (lambda: SAM(weights()), "base_optimizer"),
    "a name": (lambda: SAM(weights(), "SGD"), "base_optimizer"),
    "a class that is no optimizer": (lambda: SAM(weights(), torch.nn.Linear), "base_optimizer"),
    "instance beside parameters": (lambda: SAM(weights(), SGD(weights(), lr=0.1)), "base_optimizer"),
    "class beside an instance": (lambda: SAM(SGD(weights(), lr=0.1), SGD), "base_optimizer"),
    "lr beside an instance": (lambda: SAM(SGD(weights(), lr=0.1), lr=0.2), "lr"),
    "SAM of SAM": (lambda: SAM(SAM(SGD(weights(), lr=0.1))), "SAM"),
    "SAM as a class": (lambda: SAM(weights(), SAM), "SAM"),
}


@pytest.mark.parametrize(("make", "word"), WRONG_BASES.values(), ids=WRONG_BASES)
def test_wrong_bases_are_refused_in_one_sentence(make, word):
    with pytest.raises(TypeError) as raised:
        make()
    assert_one_sentence(raised.value, word)


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"rho": "0.1"}, "rho"),
        ({"perturb_eps": -1e-12}, "perturb_eps"),
        ({"adaptive": "yes"}, "adaptive"),
        ({"perturb": 1}, "perturb"),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range_are_refused_in_one_sentence(keywords, name):
    with pytest.raises(ValueError) as raised:
        SAM(weights(), SGD, lr=0.1, **keywords)
    assert_one_sentence(raised.value, name)
    with pytest.raises(ValueError) as raised:
        SAM([{"params": weights(), **keywords}], SGD, lr=0.1)
    assert_one_sentence(raised.value, name)
    optimizer = SAM(weights(), SGD, lr=0.1)
    with pytest.raises(ValueError) as raised:
        optimizer.add_param_group({"params": [parameter([1.0])], **keywords})
    assert_one_sentence(raised.value, name)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_parameters_are_refused_in_one_sentence(dtype):
    bad = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError) as raised:
        SAM([bad], SGD, lr=0.1)
    assert_one_sentence(raised.value, str(dtype))
    optimizer = SAM(weights(), SGD, lr=0.1)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_a_backend_that_is_none_is_refused():
    w = parameter([1.0])
    optimizer = None
    with pytest.raises(ValueError) as raised:
        optimizer = SAM([w], SGD, lr=0.1, backend="fast")
        optimizer.step(evaluate_of([w]))
    assert_one_sentence(raised.value, "native", "fast")
    assert w.item() == 1.0


# ---- what is shared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["class", "instance"])
def test_groups_and_state_are_the_base_optimizers(backend, how):
    params = weights()
    optimizer = SAM(params, SGD, lr=0.1, momentum=0.9, backend=backend)
    if how == "instance":
        base = SGD(params, lr=0.1, momentum=0.9)
        optimizer = SAM(base, backend=backend)
        assert optimizer.base_optimizer is base
    for _ in range(2):
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state
        optimizer.step(evaluate_of(params))
        optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.state) == set(params)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "SGD" in repr(optimizer) and "rho: 0.05" in repr(optimizer)


def test_an_instance_with_state_goes_on_from_there(backend):
    ours, plain = Regression(), Regression()
    base, other = (SGD(case.params, lr=0.05, momentum=0.9) for case in (ours, plain))
    for optimizer, case in ((base, ours), (other, plain)):
        for _ in range(2):
            optimizer.zero_grad()
            case.evaluate()
            optimizer.step()
    base.zero_grad()
    optimizer = SAM(base, rho=0.0, backend=backend)
    optimizer.step(ours.evaluate)
    other.zero_grad()
    plain.evaluate()
    other.step()
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-14, atol=1e-14)


def test_perturbation_is_nowhere_in_the_base_optimizers_state(backend):
    """Adam takes a parameter for new if its state is empty."""
    params = weights()
    optimizer = SAM(params, RMSprop, backend=backend)
    evaluate_of(params)()
    optimizer.first_step(zero_grad=True)
    assert not any(optimizer.state.values())
    evaluate_of(params)()
    optimizer.second_step()
    plain = RMSprop(weights())
    evaluate_of(plain.param_groups[0]["params"])()
    plain.step()
    assert optimizer.state[params[0]].keys() == plain.state[plain.param_groups[0]["params"][0]].keys()


# ---- whose step runs -------------------------------------------------------------------------------------------------


def count_class_steps(monkeypatch, base_class):
    """Counts calls of the class's own update, below the wrapper that torch puts around ``step``."""
    name = {SGD: "sgd", Adam: "adam", AdamW: "adam", RMSprop: "rmsprop"}[base_class]
    module = inspect.getmodule(SGD if base_class is SGD else RMSprop if base_class is RMSprop else Adam)
    calls, original = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("base_class", [SGD, Adam, AdamW], ids=lambda c: c.__name__)
def test_exactly_sgd_adam_and_adamw_run_fused(monkeypatch, backend, form, base_class):
    calls = count_class_steps(monkeypatch, base_class)
    case = Regression()
    optimizer = SAM(case.params, base_class, lr=0.01, backend=backend)
    for _ in range(3):
        take_step(optimizer, form, case.evaluate)
    assert not calls


def test_other_bases_run_their_own_step(monkeypatch, backend, form):
    calls = count_class_steps(monkeypatch, RMSprop)
    case = Regression()
    optimizer = SAM(case.params, RMSprop, lr=0.01, backend=backend)
    for _ in range(3):
        take_step(optimizer, form, case.evaluate)
    assert len(calls) == 3


class Sized(SGD):
    """A subclass with an update of its own."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(1.0)


def test_a_subclass_runs_its_own_step(backend, form):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], Sized, lr=0.1, rho=0.5, backend=backend)
    take_step(optimizer, form, backward_of(lambda: (w**2).sum()))
    assert w.tolist() == [2.0, 3.0]


def _patched(base):
    original = base.step
    base.step = lambda *args, **kwargs: original(*args, **kwargs)


WATCHED = {
    "pre-hook": lambda base: base.register_step_pre_hook(lambda *args: None),
    "post-hook": lambda base: base.register_step_post_hook(lambda *args: None),
    "patched step": _patched,
    "differentiable": lambda base: base.param_groups[0].update(differentiable=True),
}


@pytest.mark.parametrize("base_class", [SGD, AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_a_watched_base_runs_its_own_step(monkeypatch, backend, base_class, watch):
    calls = count_class_steps(monkeypatch, base_class)
    case, plain = Regression(), Regression()
    optimizer = SAM(case.params, base_class, lr=0.01, backend=backend)
    optimizer.step(case.evaluate)
    assert not calls
    watch(optimizer.base_optimizer)  # from one step to the next
    optimizer.step(case.evaluate)
    assert len(calls) == 1
    other = SAM(plain.params, base_class, lr=0.01, backend=backend)
    for _ in range(2):
        other.step(plain.evaluate)
    # torch's differentiable Adam computes its bias corrections in the step count's float32.
    tolerance = 1e-5 if optimizer.param_groups[0]["differentiable"] and base_class is AdamW else 1e-13
    torch.testing.assert_close(case.params, plain.params, rtol=tolerance, atol=tolerance)


def test_a_capturable_adam_runs_fused(monkeypatch, backend, form):
    """Everywhere: on the CPU torch's own step would refuse. It is the step of one that is not capturable."""
    calls = count_class_steps(monkeypatch, Adam)
    case, plain = Regression(torch.float32), Regression(torch.float32)
    optimizer = SAM(case.params, Adam, lr=0.01, capturable=True, backend=backend)
    other = SAM(plain.params, Adam, lr=0.01, backend=backend)
    assert optimizer.param_groups[0]["capturable"] is True
    for _ in range(3):
        take_step(optimizer, form, case.evaluate)
        take_step(other, form, plain.evaluate)
    assert not calls
    assert_same_bits(case.params, plain.params)


@pytest.mark.parametrize("base_class", [SGD, RMSprop], ids=lambda c: c.__name__)
def test_step_hooks_of_both_fire_in_every_form(backend, form, base_class):
    case = Regression()
    optimizer = SAM(case.params, base_class, lr=0.01, backend=backend)
    fired = []

    def note(name):
        return lambda *args: fired.append(name)

    optimizer.register_step_pre_hook(note("SAM pre"))
    optimizer.register_step_post_hook(note("SAM post"))
    optimizer.base_optimizer.register_step_pre_hook(note("base pre"))
    optimizer.base_optimizer.register_step_post_hook(note("base post"))
    take_step(optimizer, form, case.evaluate)
    assert fired == ["SAM pre", "base pre", "base post", "SAM post"]


def test_hooks_of_the_base_see_clean_weights_and_the_second_gradient(backend, form):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, backend=backend)
    seen = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *args: seen.append((w.tolist(), w.grad.tolist())))
    take_step(optimizer, form, backward_of(lambda: 0.5 * (w**2).sum()))
    assert seen[0][0] == [3.0, 4.0] and seen[0][1] == pytest.approx([3.3, 4.4], abs=1e-11)


def test_a_hook_of_the_base_that_clips_takes_effect(backend, form):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, backend=backend)

    def clip(*args):
        torch.nn.utils.clip_grad_norm_([w], 1.0)

    optimizer.base_optimizer.register_step_pre_hook(clip)
    take_step(optimizer, form, backward_of(lambda: 0.5 * (w**2).sum()))
    assert w.tolist() == pytest.approx([3 - 0.06, 4 - 0.08], abs=1e-6)


def test_clipping_by_hand_acts_on_the_final_gradient_only(backend):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, backend=backend)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    evaluate()
    with optimizer.perturbed():
        evaluate()
    assert torch.nn.utils.clip_grad_norm_([w], 1.0).item() == pytest.approx(5.5, abs=1e-9)
    optimizer.step()
    assert w.tolist() == pytest.approx([3 - 0.06, 4 - 0.08], abs=1e-6)


def test_wrapping_by_a_scheduler_keeps_the_base_fused(monkeypatch, backend):
    calls = count_class_steps(monkeypatch, SGD)
    case = Regression()
    optimizer = SAM(case.params, SGD, lr=0.01, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(case.evaluate)
        scheduler.step()
    assert not calls


# ---- maximize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("base_class", "options"),
    [(SGD, {"momentum": 0.9, "weight_decay": 0.1}), (Adam, {"weight_decay": 0.1}), (AdamW, {"amsgrad": True}), (RMSprop, {})],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_maximizing_is_minimizing_the_negative(backend, form, base_class, options, adaptive):
    up, down = Regression(torch.float32), Regression(torch.float32)
    maximizing = SAM(up.params, base_class, rho=0.3, lr=1e-3, maximize=True, adaptive=adaptive, backend=backend, **options)
    minimizing = SAM(down.params, base_class, rho=0.3, lr=1e-3, adaptive=adaptive, backend=backend, **options)

    def negative():
        loss = -down.loss()
        loss.backward()
        return loss

    for _ in range(10):
        gained = take_step(maximizing, form, up.evaluate)
        lost = take_step(minimizing, form, negative)
        assert gained.item() == -lost.item()
    assert_same_bits(up.params, down.params)


def test_maximizing_perturbs_downhill(backend):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, maximize=True, backend=backend)
    (0.5 * (w**2).sum()).backward()
    with optimizer.perturbed():
        assert w.tolist() == pytest.approx([2.7, 3.6], abs=1e-11)
