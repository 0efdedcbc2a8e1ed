"""Which parameters are a normalisation layer's."""

import pytest
import torch
from torch import nn

from sam_fused import norm_parameters
from tests.optim.helpers import assert_one_sentence

pytestmark = pytest.mark.cpu_only


class LlamaRMSNorm(nn.Module):
    """A norm layer of a library's own."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class PreNormBlock(nn.Module):
    """Not a norm layer: it holds one."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm(3)
        self.projection = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(1))


class NormedLinear(nn.Linear):
    """Not a norm layer: it normalises what goes through a matrix of its own."""


class AbnormalityHead(nn.Module):
    """Not one either."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


def names_of(model):
    named = {id(param): name for name, param in model.named_parameters()}
    return [[named[id(param)] for param in group["params"]] for group in norm_parameters(model)]


def test_every_kind_of_norm_layer_is_found_and_nothing_else():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm1d(4, affine=False),
        PreNormBlock(),
        NormedLinear(3, 3),
        AbnormalityHead(),
        nn.LayerNorm([3, 3]),  # torch's own, whatever its shape
    )
    norms, others = names_of(model)
    assert norms == [f"{i}.{name}" for i in range(1, 7) for name in ("weight", "bias") if (i, name) != (5, "bias")] + [
        "8.norm.weight",
        "11.weight",
        "11.bias",
    ]
    assert others[:5] == ["0.weight", "0.bias", "8.gain", "8.projection.weight", "8.projection.bias"]
    assert others[5:] == ["9.weight", "9.bias", "10.weight"]


def test_the_groups_say_what_is_perturbed_and_take_further_keys():
    groups = norm_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), weight_decay=0.0)
    assert [group["perturb"] for group in groups] == [True, False]
    assert groups[0]["weight_decay"] == 0.0 and "weight_decay" not in groups[1]


def test_shared_parameters_are_there_once_and_a_model_of_norms_alone_is_one_group():
    model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    assert names_of(model) == [["0.weight", "0.bias", "1.bias"], ["2.weight"]]
    assert len(norm_parameters(nn.LayerNorm(2))) == 1


def test_bad_input():
    with pytest.raises(ValueError) as error:
        norm_parameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
    assert_one_sentence(error.value, "normalisation layer", "Sequential")
    with pytest.raises(TypeError) as error:
        norm_parameters([nn.LayerNorm(2)])
    assert_one_sentence(error.value, "torch.nn.Module", "list")
