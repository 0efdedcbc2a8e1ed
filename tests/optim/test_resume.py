"""Interrupted runs go on from their checkpoint as if nothing had been, and foreign checkpoints do what they can."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from sam_fused import SAM, MicroBatchSAM
from tests.optim.helpers import assert_one_sentence, assert_same_bits, snapshot, snapshot_state
from tests.optim.runs import ALL, MICRO_BATCHES, SIZES, Run, assert_same_runs

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "Adam": (Adam, {"lr": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5)}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


@pytest.fixture(params=[form for form in ALL if form != "first_second"])
def in_form(request):
    return request.param


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run, base, backend, **options):
    """A fresh run that has been given nothing but what a file of the old one holds; it begins with other weights."""
    fresh = Run(run.form, base, backend, **options)
    with torch.no_grad():
        for param in fresh.params:
            param.fill_(0.5)
    fresh.step()  # with state and buffers of its own, which have to go
    saved = through_a_file({"model": run.case.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    fresh.case.model.load_state_dict(saved["model"])
    fresh.optimizer.load_state_dict(saved["optimizer"])
    return fresh


# ---- our own checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "dtype"), [(0, torch.float32), (3, torch.float32), (3, torch.bfloat16)], ids=str)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(backend, base, in_form, steps, dtype):
    run = Run(in_form, base, backend, dtype=dtype)
    for _ in range(steps):
        run.step()
    other = resumed(run, base, backend, dtype=dtype)
    for _ in range(3):
        run.step()
        other.step()
        assert_same_runs(other, run)


def test_with_a_schedule(backend, base, in_form):
    """Of the learning rate and of momentum, or of Adam's first beta."""

    def scheduler(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    run = Run(in_form, base, backend)
    schedule = scheduler(run.optimizer)
    for _ in range(3):
        run.step()
        schedule.step()
    other = Run(in_form, base, backend)
    other_schedule = scheduler(other.optimizer)
    saved = through_a_file(
        {"model": run.case.model.state_dict(), "optimizer": run.optimizer.state_dict(), "schedule": schedule.state_dict()}
    )
    other.case.model.load_state_dict(saved["model"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other_schedule.load_state_dict(saved["schedule"])
    rates = set()
    for _ in range(5):
        for each, its_schedule in ((run, schedule), (other, other_schedule)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                each.step()
                its_schedule.step()
        assert_same_runs(other, run)
        rates.add(run.optimizer.param_groups[0]["lr"])
    assert len(rates) > 1


@pytest.mark.parametrize("form", ["perturbed", "micro_batch"])
def test_with_a_scaler(backend, base, form):
    """Saved after an overflow: the scale is the scaler's, and its growth goes on where it was."""
    options = {"scale": 2.0**10, "growth_interval": 2, "perturb_eps": 0.0}
    run = Run(form, base, backend, **options)
    run.step()
    run.step(overflowing=[(0, 2)])
    other = resumed(run, base, backend, **options)
    other.amp.load_state_dict(through_a_file(run.amp.state_dict()))
    for _ in range(3):
        run.step()
        other.step()
        assert_same_runs(other, run)
    assert other.amp.state_dict() == run.amp.state_dict() and run.amp.get_scale() == 2.0**10


@pytest.mark.parametrize("form", MICRO_BATCHES)
def test_a_run_goes_on_with_other_micro_batches(backend, base, form):
    """How a batch is cut is no part of a checkpoint: SAM's loads into micro-batches and the other way round."""
    whole = Run("perturbed", base, backend)
    whole.step()
    cut = resumed(whole, base, backend)
    assert_same_runs(cut, whole)
    micro = Run(form, base, backend)
    micro.case.model.load_state_dict(whole.case.model.state_dict())
    micro.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    assert_same_runs(micro, whole)
    micro.step()
    back = Run("perturbed", base, backend)
    back.case.model.load_state_dict(micro.case.model.state_dict())
    back.optimizer.load_state_dict(through_a_file(micro.optimizer.state_dict()))
    again = resumed(micro, base, backend)
    assert_same_runs(again, micro)
    assert_same_runs(back, micro)
    assert micro.optimizer.num_micro_batches == len(SIZES)


# ---- in the middle of a step -----------------------------------------------------------------------------------------


def halfway(backend, base):
    """A run with one of three micro-batches added up, and the rest of its step."""
    run = Run("micro_batch", base, backend)
    run.step()
    batch = zip(run.case.x.split(SIZES), run.case.y.split(SIZES), strict=True)

    def advance():
        for x, y in batch:
            run.optimizer.zero_grad()
            run.backward(x, y)
            with run.optimizer.micro_batch(weight=len(x) / sum(SIZES)):
                run.backward(x, y)
            yield

    moves = advance()
    next(moves)
    return run, moves


SAVES = {
    "state_dict()": lambda optimizer: optimizer.state_dict(),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_saving_between_micro_batches_is_refused_and_the_step_goes_on(backend, base, save):
    """A checkpoint without the sums would lose a part of the batch, silently."""
    run, moves = halfway(backend, base)
    plain = Run("micro_batch", base, backend)
    before = run.state()
    with pytest.raises(RuntimeError) as raised:
        save(run.optimizer)
    assert_one_sentence(raised.value, "state_dict()", "micro-batches", "restore()")
    assert_same_runs(run, before)
    for _ in moves:
        pass
    run.optimizer.step()
    for _ in range(2):
        plain.step()
    assert_same_runs(run, plain)


def test_saving_between_micro_batches_after_giving_the_step_up(backend, base):
    run, _ = halfway(backend, base)
    plain = Run("micro_batch", base, backend)
    plain.step()
    with pytest.raises(RuntimeError):
        run.optimizer.state_dict()
    run.optimizer.restore()
    assert_same_runs(run, plain)
    other = resumed(run, base, backend)
    for each in (run, other, plain):
        each.step()
    assert_same_runs(run, plain)
    assert_same_runs(other, plain)


def test_loading_between_micro_batches_is_refused(backend, base):
    run, moves = halfway(backend, base)
    before, saved = run.state(), Run("micro_batch", base, backend).optimizer.state_dict()
    with pytest.raises(RuntimeError) as raised:
        run.optimizer.load_state_dict(saved)
    assert_one_sentence(raised.value, "load_state_dict()", "micro-batches", "restore()")
    assert_same_runs(run, before)
    for _ in moves:
        pass
    run.optimizer.step()


def test_saving_after_the_block_and_before_its_step(backend, base):
    """The weights are clean: what is saved is the run before this step."""
    run, plain = Run("perturbed", base, backend), Run("perturbed", base, backend)
    for each in (run, plain):
        each.step()
    run.passes()
    other = resumed(run, base, backend)
    assert_same_runs(other, plain)
    run.finish()
    for each in (other, plain):
        each.step()
    assert_same_runs(run, plain)
    assert_same_runs(other, plain)


# ---- the popular class -----------------------------------------------------------------------------------------------


def popular_checkpoint(run, key="old_p"):
    """What the popular SAM class's ``state_dict()`` gives: the backups of its last perturbation as state, and nothing of its
    base optimizer's, which is an attribute; one set of groups for both."""
    theirs = run.optimizer.base_optimizer.state_dict()["param_groups"]
    groups = [{k: v for k, v in group.items() if k not in ("perturb", "perturb_eps")} for group in copy.deepcopy(theirs)]
    for group in groups:
        group.update(rho=0.3, adaptive=True, lr=group["lr"] / 2)
    state = {index: {key: param.detach() * 1.01} for index, param in enumerate(run.params)}
    return through_a_file({"state": state, "param_groups": groups})


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_checkpoint_of_the_popular_class(backend, base, in_form, trained):
    """Its groups are loaded, and the base optimizer starts afresh, as one that never took a step: Adam too."""
    run = Run(in_form, base, backend)
    run.optimizer.param_groups[0]["perturb_eps"] = 1e-9
    if trained:
        run.step()
    checkpoint = popular_checkpoint(run)
    with pytest.warns(UserWarning) as warned:
        run.optimizer.load_state_dict(checkpoint)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert_one_sentence(warned[0].message, "load_state_dict()", "base optimizer", "afresh")
    assert not run.optimizer.state
    group = run.optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.3, True, base[1]["lr"] / 2)
    assert (group["perturb"], group["perturb_eps"]) == (True, 1e-9)
    other = Run(in_form, base, backend, rho=0.3, adaptive=True, perturb_eps=1e-9, lr=base[1]["lr"] / 2)
    other.case.model.load_state_dict(run.case.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            run.step()
            other.step()
            assert_same_runs(run, other)
        # From here on it is a checkpoint like any other.
        run.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert_same_runs(run, other)


def test_a_checkpoint_of_the_popular_class_that_keeps_the_perturbation(fast_backend):
    """Its older form."""
    run = Run("perturbed", BASES["Adam"], fast_backend)
    with pytest.warns(UserWarning):
        run.optimizer.load_state_dict(popular_checkpoint(run, "e_w"))
    assert not run.optimizer.state
    run.step()


def test_a_checkpoint_of_the_popular_class_is_not_written_into(fast_backend):
    run = Run("perturbed", BASES["SGD"], fast_backend)
    checkpoint = popular_checkpoint(run)
    before = copy.deepcopy(checkpoint)
    with pytest.warns(UserWarning):
        run.optimizer.load_state_dict(checkpoint)
    assert checkpoint.keys() == before.keys() and checkpoint["param_groups"] == before["param_groups"]
    assert [list(entry) for entry in checkpoint["state"].values()] == [["old_p"]] * len(run.params)


def test_what_a_checkpoint_holds_beside_the_backups_is_kept(fast_backend):
    """A fork of the popular class that saves its base optimizer's state as well."""
    run = Run("perturbed", BASES["SGD"], fast_backend)
    run.step()
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    before = run.state()
    for entry in checkpoint["state"].values():
        entry["old_p"] = torch.zeros(3)
    with pytest.warns(UserWarning):
        run.optimizer.load_state_dict(checkpoint)
    assert_same_runs(run, before)


# ---- plain checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_of_ours", [0, 2])
def test_a_plain_checkpoint_switches_sam_on_in_the_middle_of_a_run(backend, base, in_form, steps_of_ours):
    """Equal to putting SAM around the optimizer that wrote it, whatever state the one that loads it had."""
    base_class, options = base
    plain = Run("perturbed", base, backend)
    trained = base_class(plain.params, **options)
    for _ in range(3):
        trained.zero_grad()
        plain.backward(plain.case.x, plain.case.y)
        trained.step()
    saved = through_a_file({"model": plain.case.model.state_dict(), "optimizer": trained.state_dict()})

    loaded = Run(in_form, base, backend, rho=0.1, adaptive=True, lr=1.0)
    loaded.optimizer.param_groups[0]["rho"] = 0.3  # the present value is kept, not the constructor's
    for _ in range(steps_of_ours):
        loaded.step()
    loaded.case.model.load_state_dict(saved["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.optimizer.load_state_dict(saved["optimizer"])
    group = loaded.optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.3, True, options["lr"])

    switched = Run(in_form, base, backend)
    switched.case = plain.case
    wrapper, more = (MicroBatchSAM, {"num_micro_batches": len(SIZES)}) if in_form in MICRO_BATCHES else (SAM, {})
    switched.optimizer = wrapper(trained, rho=0.3, adaptive=True, backend=backend, **more)
    assert switched.optimizer.base_optimizer is trained
    for _ in range(3):
        loaded.step()
        switched.step()
    assert_same_bits(loaded.params, switched.params)
    ours, theirs = snapshot_state(loaded.optimizer), snapshot_state(switched.optimizer)
    assert ours[1] == theirs[1]
    for first, second in zip(ours[0], theirs[0], strict=True):
        assert first.keys() == second.keys() and len(first) > 0
        assert_same_bits([first[key] for key in first], [second[key] for key in first])


def test_a_checkpoint_of_ours_switches_sam_off(backend, base, in_form):
    """Into the plain base optimizer, keys that it does not know and all."""
    base_class, options = base
    run = Run(in_form, base, backend)
    for _ in range(2):
        run.step()
    plain = Run("perturbed", base, backend)
    reference = base_class(plain.params, **options)
    saved = through_a_file({"model": run.case.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    plain.case.model.load_state_dict(saved["model"])
    reference.load_state_dict(saved["optimizer"])
    assert_same_bits(
        [value for entry in snapshot_state(reference)[0] for value in entry.values()],
        [value for entry in snapshot_state(run.optimizer)[0] for value in entry.values()],
    )
    run.optimizer.enabled = False
    for _ in range(2):
        for each, optimizer in ((run, run.optimizer), (plain, reference)):
            optimizer.zero_grad()
            each.backward(each.case.x, each.case.y)
            optimizer.step()
    torch.testing.assert_close(run.params, plain.params, rtol=1e-5, atol=1e-6)


# ---- copies ----------------------------------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("form", ["closure", "micro_closure"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_keep_the_settings_and_go_on_alike(backend, base, form, duplicate):
    settings = {"max_grad_norm": 0.3, "same_dropout": True, "capturable": True, "track_perturbation": True}
    run = Run(form, base, backend, **settings)
    run.step()
    model, optimizer = duplicate((run.case.model, run.optimizer))
    other = Run(form, base, backend)
    other.case.model, other.optimizer = model, optimizer
    assert type(optimizer) is type(run.optimizer) and optimizer.max_grad_norm == 0.3
    assert optimizer._control.settings() == run.optimizer._control.settings()
    if form == "micro_closure":
        assert optimizer.num_micro_batches == len(SIZES)
        optimizer.num_micro_batches = 2
        assert run.optimizer.num_micro_batches == len(SIZES)  # the original's is its own
        optimizer.num_micro_batches = len(SIZES)
    assert optimizer.buffer_bytes == 0
    for _ in range(2):
        run.step()
        other.step()
    assert_same_runs(other, run)
    assert_same_bits([optimizer.grad_norm], [run.optimizer.grad_norm])


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_copied_models_statistics(backend, duplicate):
    """The model that ``model=`` names is copied with the optimizer, and it is the copy's statistics that are kept."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    optimizer = MicroBatchSAM(model.parameters(), SGD, num_micro_batches=2, lr=0.1, model=model, backend=backend)
    twin, twin_optimizer = duplicate((model, optimizer))
    x, y = torch.randn(8, 6), torch.randn(8, 3)

    def closure_of(model):
        def closure(x, y):
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return closure

    untouched = snapshot(buffer for buffer in model.buffers() if buffer.is_floating_point())
    twin_optimizer.step(closure_of(twin), x, y)
    assert int(twin[1].num_batches_tracked) == 2  # once for each micro-batch's first pass
    assert_same_bits([buffer for buffer in model.buffers() if buffer.is_floating_point()], untouched)
    optimizer.step(closure_of(model), x, y)
    assert_same_bits(twin.parameters(), model.parameters())
    assert_same_bits([twin[1].running_mean, twin[1].running_var], [model[1].running_mean, model[1].running_var])


def test_a_copy_counts_its_own_overflows(fast_backend):
    run = Run("perturbed", BASES["SGD"], fast_backend, scale=4.0)
    run.step(overflowing=[(0, 1)])
    twin = copy.deepcopy(run.optimizer)
    run.step(overflowing=[(0, 1)])
    assert int(run.optimizer.ascent_overflows) == 2 and int(twin.ascent_overflows) == 0
