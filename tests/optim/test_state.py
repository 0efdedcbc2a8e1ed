"""Checkpoints, copies, groups added later, schedulers: SAM's state is its base optimizer's, and stays in step with it."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

from sam_fused import SAM
from sam_fused.ops.backends import available_backends
from tests.devices import default
from tests.optim.helpers import (
    Regression,
    assert_same_bits,
    assert_same_state,
    backward_of,
    parameter,
    snapshot,
    snapshot_state,
    take_step,
)

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD-dampening": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "Adam": (Adam, {"lr": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def make(case, base, backend, **options):
    base_class, base_options = base
    return SAM(case.params, base_class, rho=0.2, backend=backend, **base_options, **options)


def trained(base, backend, steps, **options):
    case = Regression(torch.float32)
    optimizer = make(case, base, backend, **options)
    for _ in range(steps):
        optimizer.step(case.evaluate)
    return case, optimizer


def assert_same_dict(actual, expected):
    """State dicts, nested, bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same_dict(actual[key], expected[key])
    elif isinstance(actual, list):
        assert len(actual) == len(expected)
        for first, second in zip(actual, expected, strict=True):
            assert_same_dict(first, second)
    elif isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert_same_bits([actual], [expected])
    else:
        assert actual == expected


# ---- state dicts -----------------------------------------------------------------------------------------------------


def test_format_is_the_base_optimizers(backend, base):
    _, optimizer = trained(base, backend, 2)
    base_class, options = base
    plain = Regression(torch.float32)
    reference = base_class(plain.params, **options)
    plain.evaluate()
    reference.step()
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() == {"state", "param_groups"}
    assert ours["state"].keys() == theirs["state"].keys()
    for key, entry in theirs["state"].items():
        assert ours["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            assert type(ours["state"][key][name]) is type(value)
            if isinstance(value, torch.Tensor):
                assert ours["state"][key][name].dtype == value.dtype and ours["state"][key][name].shape == value.shape
    own = {"rho", "adaptive", "perturb", "perturb_eps", "eta", "weight_decay_in_ascent"}
    assert ours["param_groups"][0].keys() - own == theirs["param_groups"][0].keys()
    assert_same_dict(ours, optimizer.base_optimizer.state_dict())


def test_state_dict_holds_nothing_of_the_perturbation(backend, base):
    """The same, however the last perturbation went, and no larger than the base optimizer's."""
    case, optimizer = trained(base, backend, 2)
    before = copy.deepcopy(optimizer.state_dict())
    case.evaluate()
    with optimizer.perturbed():
        pass
    assert_same_dict(optimizer.state_dict(), before)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_dict(torch.load(file, weights_only=True), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_round_trip_is_bit_exact(backend, base, steps):
    case, optimizer = trained(base, backend, steps)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(case.model.state_dict())
    other = Regression(torch.float32, seed=5)
    other.x, other.y = case.x, case.y
    resumed = make(other, base, backend)
    other.model.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    assert_same_dict(resumed.state_dict(), optimizer.state_dict())
    for _ in range(3):
        optimizer.step(case.evaluate)
        resumed.step(other.evaluate)
    assert_same_bits(other.params, case.params)
    assert_same_dict(resumed.state_dict(), optimizer.state_dict())


def test_hyper_parameters_of_sam_come_back_too(fast_backend):
    case = Regression()
    optimizer = SAM(
        [{"params": case.params[:2], "rho": 0.7}, {"params": case.params[2:], "adaptive": True, "perturb": False}],
        SGD,
        lr=0.1,
        perturb_eps=1e-9,
        backend=fast_backend,
    )
    other = Regression()
    loaded = SAM([{"params": other.params[:2]}, {"params": other.params[2:]}], SGD, lr=0.3, backend=fast_backend)
    loaded.load_state_dict(optimizer.state_dict())
    wanted = [(0.7, False, True, 1e-9, 0.1), (0.05, True, False, 1e-9, 0.1)]
    keys = ("rho", "adaptive", "perturb", "perturb_eps", "lr")
    assert [tuple(group[key] for key in keys) for group in loaded.param_groups] == wanted


_RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from sam_fused import SAM
from tests.optim.helpers import Regression
from tests.optim.test_state import BASES, make
torch.set_num_threads(1)
torch.set_default_device(sys.argv[3])
for name, backend in [item.split(":") for item in sys.argv[4:]]:
    saved = torch.load(f"{sys.argv[2]}/{name}-{backend}.pt", weights_only=True)
    case = Regression(torch.float32, seed=9)
    case.model.load_state_dict(saved["model"])
    case.x, case.y = saved["x"], saved["y"]
    optimizer = make(case, BASES[name], backend)
    optimizer.load_state_dict(saved["optimizer"])
    for _ in range(3):
        optimizer.step(case.evaluate)
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, f"{sys.argv[2]}/{name}-{backend}.out")
"""


def test_resumes_in_a_fresh_process(tmp_path):
    usable = [name for name, reason in available_backends(default()).items() if reason is None]
    runs = {}
    for backend in usable:
        for name, base in BASES.items():
            case, optimizer = trained(base, backend, 3)
            saved = {"model": case.model.state_dict(), "optimizer": optimizer.state_dict(), "x": case.x, "y": case.y}
            torch.save(saved, tmp_path / f"{name}-{backend}.pt")
            runs[f"{name}-{backend}"] = case, optimizer
    root = Path(__file__).parents[2]
    items = [f"{name}:{backend}" for name in BASES for backend in usable]
    command = [sys.executable, "-c", _RESUME, str(root), str(tmp_path), str(default()), *items]
    subprocess.run(command, check=True, timeout=120, cwd=root)
    for run, (case, optimizer) in runs.items():
        for _ in range(3):
            optimizer.step(case.evaluate)
        resumed = torch.load(tmp_path / f"{run}.out", weights_only=True)
        assert_same_dict(resumed["model"], case.model.state_dict())
        assert_same_dict(resumed["optimizer"], optimizer.state_dict())


def test_a_plain_base_checkpoint_loads(backend, base):
    base_class, options = base
    plain, ours = Regression(torch.float32), Regression(torch.float32)
    reference = base_class(plain.params, **options)
    for _ in range(2):
        reference.zero_grad()
        plain.evaluate()
        reference.step()
    optimizer = SAM(ours.params, base_class, rho=0.0, adaptive=True, backend=backend, **{**options, "lr": 1.0})
    ours.model.load_state_dict(plain.model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["perturb"], group["lr"]) == (0.0, True, True, options["lr"])
    optimizer.step(ours.evaluate)
    reference.zero_grad()
    plain.evaluate()
    reference.step()
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_sam_loads_into_the_plain_base(backend, base):
    base_class, options = base
    case, optimizer = trained(base, backend, 2)
    plain = Regression(torch.float32)
    plain.model.load_state_dict(case.model.state_dict())
    reference = base_class(plain.params, **options)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.step(case.evaluate)
    plain.evaluate()
    reference.step()
    torch.testing.assert_close(case.params, plain.params, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_that_does_not_fit_changes_nothing(fast_backend):
    case, optimizer = trained(BASES["SGD"], fast_backend, 2)
    before = snapshot_state(optimizer)
    wrong = SGD([parameter([1.0])], lr=0.5).state_dict()
    with pytest.raises(ValueError):
        optimizer.load_state_dict(wrong)
    assert_same_state(snapshot_state(optimizer), before)
    optimizer.step(case.evaluate)


def test_state_dict_hooks_of_both_are_called_once(fast_backend):
    _, optimizer = trained(BASES["SGD"], fast_backend, 1)
    called = []
    for name, target in (("SAM", optimizer), ("base", optimizer.base_optimizer)):
        target.register_state_dict_pre_hook(lambda opt, name=name: called.append(f"{name} save pre"))
        target.register_state_dict_post_hook(lambda opt, state, name=name: called.append(f"{name} save post"))
        target.register_load_state_dict_pre_hook(lambda opt, state, name=name: called.append(f"{name} load pre"))
        target.register_load_state_dict_post_hook(lambda opt, name=name: called.append(f"{name} load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [f"{name} {what} {when}" for name in ("SAM", "base") for what in ("save", "load") for when in ("pre", "post")]
    assert sorted(called) == sorted(expected)


def test_distributed_checkpointing_can_materialise_the_state(backend, base):
    """It sets every learning rate and gradient to zero, and steps without a closure."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    case = Regression(torch.float32)
    optimizer = make(case, base, backend)
    before = snapshot(case.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_optimizer_state_dict(case.model, optimizer)
    assert_same_bits(case.params, before)
    assert len(saved["state"]) == len(case.params)
    assert optimizer.param_groups[0]["lr"] == base[1]["lr"]


# ---- loading into an optimizer that has been running ------------------------------------------------------------------


def test_loading_mid_training_leaves_no_stale_buffers(backend, base, form):
    """The addresses that were looked up belong to the state of before: nothing may be written there any more."""
    case, optimizer = trained(base, backend, 2)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(case.model.state_dict())
    for _ in range(3):
        take_step(optimizer, form, case.evaluate)
    stale = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    frozen = snapshot(stale)
    case.model.load_state_dict(saved[1])
    optimizer.load_state_dict(copy.deepcopy(saved[0]))
    again, other = trained(base, backend, 2)
    for _ in range(2):
        take_step(optimizer, form, case.evaluate)
        take_step(other, form, again.evaluate)
    assert_same_bits(stale, frozen)
    assert_same_bits(case.params, again.params)
    assert_same_dict(optimizer.state_dict(), other.state_dict())


def test_a_replaced_momentum_buffer_is_used(backend, form):
    w = parameter([3.0, 4.0])
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    evaluate = backward_of(lambda: 0.5 * (w**2).sum())
    take_step(optimizer, form, evaluate)
    stale = optimizer.state[w]["momentum_buffer"]
    frozen = stale.clone()
    optimizer.state[w]["momentum_buffer"] = mine = torch.tensor([10.0, 20.0], dtype=torch.float64)
    start = w.tolist()
    length = (start[0] ** 2 + start[1] ** 2) ** 0.5
    take_step(optimizer, form, evaluate)
    buffer = [9 + start[0] * (1 + 0.5 / length), 18 + start[1] * (1 + 0.5 / length)]
    assert mine.tolist() == pytest.approx(buffer, abs=1e-10)
    assert w.tolist() == pytest.approx([s - 0.1 * b for s, b in zip(start, buffer, strict=True)], abs=1e-10)
    assert optimizer.state[w]["momentum_buffer"] is mine
    assert_same_bits([stale], [frozen])


@pytest.mark.parametrize("how", ["clear", "new dict", "delete key"])
def test_state_that_is_thrown_away_starts_anew(backend, base, how):
    case, optimizer = trained(base, backend, 2)
    if how == "clear":
        optimizer.state.clear()
    elif how == "new dict":
        optimizer.state = defaultdict(dict)
        assert optimizer.base_optimizer.state is optimizer.state
    else:
        for param in case.params:
            del optimizer.state[param]
    fresh = Regression(torch.float32)
    fresh.model.load_state_dict(case.model.state_dict())
    other = make(fresh, base, backend)
    for _ in range(2):
        optimizer.step(case.evaluate)
        other.step(fresh.evaluate)
    assert_same_bits(case.params, fresh.params)


def test_loading_into_the_base_alone(backend):
    """``base_optimizer`` is public: a plain checkpoint loaded there must not lose SAM's keys."""
    case, optimizer = trained(BASES["SGD"], backend, 1)
    plain = Regression(torch.float32)
    optimizer.base_optimizer.load_state_dict(SGD(plain.params, lr=0.05, momentum=0.9, weight_decay=0.01).state_dict())
    optimizer.step(case.evaluate)
    assert optimizer.param_groups[0]["rho"] == 0.2


def test_a_group_added_to_the_base_alone(backend):
    case, optimizer = trained(BASES["SGD"], backend, 1)
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.base_optimizer.add_param_group({"params": [extra]})
    optimizer.zero_grad()
    optimizer.step(backward_of(lambda: case.loss() + (extra**2).sum()))
    assert optimizer.param_groups[1]["rho"] == 0.2
    assert not torch.equal(extra.detach(), torch.ones(3))


# ---- groups added later ----------------------------------------------------------------------------------------------


def test_a_group_added_mid_training(backend, base, form):
    def run(late):
        case = Regression()
        first, second = case.params[:4], case.params[4:]
        base_class, options = base
        groups = [{"params": first}] if late else [{"params": first}, {"params": second, "rho": 0.7, "lr": 0.002}]
        optimizer = SAM(groups, base_class, rho=0.2, backend=backend, **options)
        for param in second:
            param.requires_grad_(not late)
        for number in range(4):
            if number < 2:
                for param in second:
                    param.requires_grad_(False)
            elif number == 2:
                for param in second:
                    param.requires_grad_(True)
                if late:
                    optimizer.add_param_group({"params": second, "rho": 0.7, "lr": 0.002})
            optimizer.zero_grad()
            take_step(optimizer, form, case.evaluate)
        return case.params, optimizer

    late, optimizer = run(True)
    together, _ = run(False)
    assert_same_bits(late, together)
    assert optimizer.param_groups[1]["adaptive"] is False and optimizer.param_groups[1]["perturb_eps"] == 1e-12


def test_an_added_group_takes_the_constructors_values(fast_backend):
    optimizer = SAM([parameter([1.0])], SGD, rho=0.3, adaptive=True, perturb_eps=1e-6, lr=0.1, backend=fast_backend)
    optimizer.param_groups[0]["rho"] = 0.9
    optimizer.add_param_group({"params": [parameter([2.0])]})
    group = optimizer.param_groups[1]
    assert (group["rho"], group["adaptive"], group["perturb"], group["perturb_eps"]) == (0.3, True, True, 1e-6)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})
    assert len(optimizer.param_groups) == 2


# ---- copies ----------------------------------------------------------------------------------------------------------


def _saved_whole(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": _saved_whole}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_carry_the_base_and_go_on_alike(backend, base, duplicate):
    case, optimizer = trained(base, backend, 2, track_perturbation=True)
    optimizer.enabled = True
    before = snapshot(case.params)
    other, twin = duplicate((case, optimizer))
    assert type(twin) is SAM and type(twin.base_optimizer) is base[0]
    assert twin.base_optimizer is not optimizer.base_optimizer
    assert twin.param_groups is twin.base_optimizer.param_groups and twin.state is twin.base_optimizer.state
    assert_same_dict(twin.state_dict(), optimizer.state_dict())
    assert twin.defaults == optimizer.defaults
    other.model.zero_grad()
    for _ in range(2):
        twin.step(other.evaluate)
    assert_same_bits(case.params, before)  # the original has not been touched
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.step(case.evaluate)
    assert_same_bits(other.params, case.params)
    assert twin.perturbation is not None
    twin.add_param_group({"params": [parameter([1.0])]})
    assert twin.param_groups[-1]["rho"] == 0.2


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_do_not_carry_the_buffers(fast_backend, duplicate):
    """The backup is as large as the parameters; it is no part of a checkpoint."""
    _, optimizer = trained(BASES["SGD"], fast_backend, 2)
    assert optimizer.buffer_bytes > 0
    twin = duplicate(optimizer)
    assert twin.buffer_bytes == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_copies_carry_whether_it_is_enabled(fast_backend, enabled):
    _, optimizer = trained(BASES["SGD"], fast_backend, 1)
    optimizer.enabled = enabled
    assert copy.deepcopy(optimizer).enabled is enabled


# ---- learning rates and other values that change -----------------------------------------------------------------------


def test_learning_rate_as_a_tensor(backend, form):
    for base_class in (SGD, AdamW):
        ours, plain = Regression(), Regression()
        rate = torch.tensor(0.05, dtype=torch.float64)
        optimizer = SAM(ours.params, base_class, rho=0.2, lr=rate, backend=backend)
        other = SAM(plain.params, base_class, rho=0.2, lr=0.05, backend=backend)
        for number in range(4):
            if number == 2:
                rate.fill_(0.01)
                other.param_groups[0]["lr"] = 0.01
            take_step(optimizer, form, ours.evaluate)
            take_step(other, form, plain.evaluate)
        assert_same_bits(ours.params, plain.params)


CHANGES = {
    "lr": (SGD, {"lr": 0.1}, {"lr": 0.02}),
    "rho": (SGD, {"lr": 0.1}, {"rho": 0.8}),
    "rho to zero": (SGD, {"lr": 0.1}, {"rho": 0.0}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.5}, {"momentum": 0.9}),
    "momentum from zero": (SGD, {"lr": 0.1}, {"momentum": 0.9, "dampening": 0.5}),
    "momentum to zero": (SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.0}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9}, {"nesterov": True}),
    "weight_decay": (SGD, {"lr": 0.1}, {"weight_decay": 0.3}),
    "maximize": (SGD, {"lr": 0.01}, {"maximize": True}),
    "adaptive": (SGD, {"lr": 0.1}, {"adaptive": True}),
    "perturb": (SGD, {"lr": 0.1}, {"perturb": False}),
    "perturb_eps": (SGD, {"lr": 0.1}, {"perturb_eps": 1.0}),
    "betas": (AdamW, {"lr": 0.01}, {"betas": (0.5, 0.9)}),
    "eps": (Adam, {"lr": 0.01}, {"eps": 1e-2}),
    # beta2 is small so that the second moment falls and its maximum does not
    "amsgrad": (AdamW, {"lr": 0.05, "betas": (0.5, 0.1)}, {"amsgrad": True}),
}


@pytest.mark.parametrize(("base_class", "options", "change"), CHANGES.values(), ids=CHANGES)
def test_changes_of_a_group_take_effect(backend, base_class, options, change):
    """Against an optimizer that is built with the changed values and takes the state over."""
    ours, plain = Regression(), Regression()
    optimizer = SAM(ours.params, base_class, rho=0.2, backend=backend, **options)
    for _ in range(2):
        optimizer.step(ours.evaluate)
    plain.model.load_state_dict(ours.model.state_dict())
    other = SAM(plain.params, base_class, **{"rho": 0.2, **options, **change}, backend=backend)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict({"state": state["state"], "param_groups": other.state_dict()["param_groups"]})
    optimizer.param_groups[0].update(change)
    unchanged = copy.deepcopy((ours, optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(ours.evaluate)
        other.step(plain.evaluate)
    assert_same_bits(ours.params, plain.params)
    third, _ = unchanged
    still = SAM(third.params, base_class, rho=0.2, backend=backend, **options)
    still.load_state_dict({"state": unchanged[1]["state"], "param_groups": still.state_dict()["param_groups"]})
    third.model.zero_grad()
    for _ in range(2):
        still.step(third.evaluate)
    assert any(not torch.equal(a, b) for a, b in zip(third.params, ours.params, strict=True))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=10.0),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("base_class", [SGD, RMSprop], ids=lambda c: c.__name__)
@pytest.mark.parametrize("target", ["sam", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_warn_of_nothing_and_take_effect(fast_backend, form, name, target, base_class):
    options = {"momentum": 0.9} if base_class is SGD else {}
    ours, plain = Regression(), Regression()
    optimizer = SAM(ours.params, base_class, rho=0.0, lr=0.05, backend=fast_backend, **options)
    reference = base_class(plain.params, lr=0.05, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own, about a keyword of SequentialLR's parts
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        scheduler = SCHEDULERS[name](optimizer if target == "sam" else optimizer.base_optimizer)
        theirs = SCHEDULERS[name](reference)
        rates = set()
        for _ in range(6):
            take_step(optimizer, form, ours.evaluate)
            reference.zero_grad()
            plain.evaluate()
            reference.step()
            for one in (scheduler, theirs):
                one.step(1.0) if name == "ReduceLROnPlateau" else one.step()
            assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("target", ["sam", "base"])
def test_a_scheduler_stepped_too_early_is_still_warned_of(fast_backend, target):
    optimizer = SAM([parameter([1.0])], SGD, lr=0.1, backend=fast_backend)
    scheduler = lr_scheduler.StepLR(optimizer if target == "sam" else optimizer.base_optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\).*before.*optimizer.step\(\)"):
        scheduler.step()
