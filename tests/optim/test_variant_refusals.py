"""The variants' arguments: where names come from, which values are refused, and that nothing was written then."""

import math

import pytest
import torch
from torch.optim import SGD, Adadelta

from sam_fused import SAM
from sam_fused import perturb as perturb_tensors
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    parameter,
    snapshot,
)
from tests.optim.variants import trained


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
    with pytest.raises(ValueError):
        SAM([{"params": task.params[:1]}, {"params": task.params[1:], "adaptive": "weights"}], SGD, lr=0.1)
    task.evaluate()
    before = snapshot(task.params)
    names = optimizer.param_groups[0].pop("param_names")
    with pytest.raises(ValueError):
        optimizer.first_step()
    optimizer.param_groups[0]["param_names"] = names
    optimizer.param_groups[0]["params"].append(task.model[3].weight)
    with pytest.raises(ValueError) as error:
        optimizer.first_step()
    assert_one_sentence(error.value, "2 names", "group of 3", "add_param_group()")
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
        ({"adaptive": "layerwise", "eta": 0.1}, ("eta", "expected 0", "layerwise")),
        ({"rho": True}, ("rho", "True")),
    ],
    ids=str,
)
def test_bad_input(options, words):
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM(task.params, SGD, lr=0.1, **options)
    assert_one_sentence(error.value, *words)
    if options.keys() & {"p", "normalize"}:
        return  # these are no group's
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("p", math.inf), ("normalize", False), ("max_grad_norm", 1.0), ("same_dropout", True), ("num_micro_batches", 2)],
)
def test_settings_of_all_groups_are_refused_in_one(key, value):
    """There they would be read by nobody: plain SAM, silently."""
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM([{"params": task.params, key: value}], SGD, lr=0.1)
    assert_one_sentence(error.value, f"{key} of parameter group 0", f"{key}= to the constructor")
    optimizer = SAM(task.params[:2], SGD, lr=0.1)
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": task.params[2:], key: value})
    assert_one_sentence(error.value, f"{key} of parameter group 1")
    assert len(optimizer.param_groups) == 1


def test_a_prefix_that_is_not_needed_is_refused_and_keys_of_the_base_are_its_own():
    task = Regression()
    with pytest.raises(ValueError) as error:
        SAM([{"params": task.params, "sam_rho": 0.3}], SGD, lr=0.1)
    assert_one_sentence(error.value, "sam_rho", "call it rho")
    optimizer = SAM([{"params": task.params, "sam_rho": 0.3}], Adadelta, lr=0.1)
    assert optimizer.param_groups[0]["sam_rho"] == 0.3

    class WithALimit(SGD):
        def __init__(self, params, max_grad_norm=1.0, **kwargs):
            super().__init__(params, **kwargs)
            self.defaults["max_grad_norm"] = max_grad_norm
            for group in self.param_groups:
                group.setdefault("max_grad_norm", max_grad_norm)

    SAM([{"params": task.params, "max_grad_norm": 3.0}], WithALimit, lr=0.1)


def test_what_is_no_group_s_is_shown():
    """A run that is resumed without it can be told from the other one."""
    task = Regression()
    assert repr(SAM(task.params, SGD, lr=0.1)).startswith("SAM around SGD (")
    optimizer = SAM(task.params, SGD, lr=0.1, p=math.inf, model=task.model, max_grad_norm=1.0)
    assert repr(optimizer).startswith("SAM(p=inf, max_grad_norm=1.0, model='Sequential') around SGD (")


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
