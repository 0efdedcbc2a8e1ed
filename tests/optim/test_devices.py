"""What the optimizer layer decides by device, asked of tensors on `meta`: nothing here computes anything."""

import pytest
import torch
from torch.optim import SGD, Adam

from sam_fused.ops import backends, captures
from sam_fused.ops.hyper import HyperTable
from sam_fused.optim import bases, descent
from sam_fused.optim.bases import FusedState, fused_base

META = torch.device("meta")


@pytest.fixture
def params():
    return [torch.nn.Parameter(torch.empty(3, device=META)) for _ in range(2)]


def state_of(base, params):
    return FusedState(fused_base(base), base, params, [base.param_groups[0]] * len(params))


def test_step_counts_are_created_on_the_parameters_device(params):
    base = Adam(params)
    state = state_of(base, params)
    state.commit()
    for param, step in zip(params, state.steps, strict=True):
        assert step.device == META and step.dtype == torch.float32 and step.dim() == 0
        assert base.state[param]["step"] is step


def test_step_counts_of_a_checkpoint_move_to_the_parameters_device(params):
    base = Adam(params)
    loaded = [torch.tensor(3.0), torch.zeros((), device=META)]
    for param, step in zip(params, loaded, strict=True):
        base.state[param] = {"step": step, "exp_avg": torch.empty_like(param), "exp_avg_sq": torch.empty_like(param)}
    state = state_of(base, params)
    assert [step.device for step in state.steps] == [META, META] and state.steps[1] is loaded[1]
    assert base.state[params[0]]["step"] is loaded[0]  # not before the step is taken
    state.commit()
    assert base.state[params[0]]["step"] is state.steps[0]
    state.withdraw()
    assert base.state[params[0]]["step"] is loaded[0] and len(base.state[params[0]]) == 3
    state.commit()
    state.settle()
    assert state.is_current()


@pytest.mark.parametrize("base_class", [SGD, Adam])
def test_a_graph_may_not_capture_the_creation_of_state(base_class, params, monkeypatch):
    """Each replay would create it again: a momentum of zeros, a step count of 1."""
    options = {"momentum": 0.9} if base_class is SGD else {}
    base = base_class(params, lr=0.1, **options)
    state = state_of(base, params)
    monkeypatch.setattr(captures, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        state_of(base, params)
    assert not base.state
    state.commit()
    assert state_of(base, params).columns[0][0] is base.state[params[0]][bases._FAMILIES[base_class].all_state_keys[0]]


def test_a_group_without_use_for_a_state_does_not_need_one_on_its_device(params):
    base = SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "momentum": 0.0}], lr=0.1)
    state = FusedState(fused_base(base), base, params, base.param_groups)
    assert [tuple(t.size()) for t in state.columns[0]] == [(3,), (0,)]
    assert all(t.device == META for t in state.columns[0])


def test_a_scalar_goes_to_the_device_that_reads_it():
    scalar = torch.tensor(0.5)
    assert descent._on(scalar.device, scalar) is scalar and descent._on(META, None) is None
    assert descent._on(META, scalar).device == META


@pytest.mark.parametrize("capturable", [False, True])
def test_capturable_bases_run_fused_wherever_their_parameters_are(capturable, params):
    for held in ([torch.nn.Parameter(torch.ones(2))], params):
        assert fused_base(Adam(held, capturable=capturable)) is not None


def test_capturable_is_our_setting_or_the_base_optimizers():
    params = [torch.nn.Parameter(torch.ones(2))]
    assert not descent.is_capturable(descent.Control(), SGD(params, lr=0.1))
    assert descent.is_capturable(descent.Control(capturable=True), SGD(params, lr=0.1))
    base = Adam([{"params": params}, {"params": [torch.nn.Parameter(torch.ones(2))]}])
    assert not descent.is_capturable(descent.Control(), base)
    base.param_groups[1]["capturable"] = True
    assert descent.is_capturable(descent.Control(), base)


@pytest.mark.parametrize("key", ["lr", "dampening", "weight_decay"])
def test_hyper_parameters_on_a_device_are_read_from_a_table_there(key):
    """The host would have to wait for them."""
    base = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    base.param_groups[0][key] = there = torch.empty((), device=META)
    family = fused_base(base)
    values = family.hyper(base.param_groups[0])
    place = ("lr", "momentum", "dampening", "weight_decay").index(key)
    assert values[place] is there and all(isinstance(value, float) for value in values[:place] + values[place + 1 :])
    assert HyperTable().update([values]).on(META).device == META


def test_a_momentum_on_a_device_is_left_to_torch():
    """Whether there is a momentum buffer at all depends on it."""
    base = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    base.param_groups[0]["momentum"] = torch.empty((), device=META)
    assert fused_base(base) is None


def test_a_scalar_that_goes_to_the_cpu_is_waited_for(monkeypatch):
    """A copy that is not would be read before it has arrived."""
    asked = []
    scalar = torch.empty((), device=META)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: asked.append((device.type, non_blocking)))
    descent._on(torch.device("cpu"), scalar)
    descent._on(torch.device("cuda", 1), scalar)
    assert asked == [("cpu", False), ("cuda", True)]


@pytest.mark.parametrize(("backend", "fused"), [("native", True), ("triton", True), ("foreach", False), ("reference", False)])
def test_off_the_cpu_only_compiled_backends_run_the_last_pass_fused(backend, fused, params, monkeypatch):
    """The others restore, and let the base optimizer run its own step."""
    monkeypatch.setattr(backends, "choose", lambda device, forced=None: backend)
    asked = descent.Descent(descent.Control(backend=backend))
    ascent = type("Ascent", (), {"perturbed_parts": lambda self: []})()
    final = descent.Final([torch.empty_like(p) for p in params])
    base = SGD(params, lr=0.1)
    prepared = []
    monkeypatch.setattr(descent.Descent, "_build", lambda self, *rest: prepared.append(rest) or [])
    for _ in range(2):  # the second time from memory
        assert asked._prepare(fused_base(base), base, ascent, params, final) is fused
    assert len(prepared) == int(fused)
    assert asked.is_fused(base, params) is fused
