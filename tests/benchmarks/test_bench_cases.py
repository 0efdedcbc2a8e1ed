"""The parameter sets have the shapes of the models that they are named after."""

from collections import Counter
from math import prod

import pytest
import torch

from benchmarks.cases import DEFAULT_SETS, FULL_SETS, SETS, ParameterSet, make_gradients, make_parameters

PUBLISHED = {
    "resnet50": (161, 25_557_032),
    "vit_s": (152, 22_050_664),
    "gpt2": (148, 124_439_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    shapes = SETS[name].shapes()
    assert (len(shapes), sum(map(prod, shapes))) == PUBLISHED[name]


def test_counts_of_our_own_sets() -> None:
    lora, tiny = SETS["lora"].shapes(), SETS["tiny"].shapes()
    assert len(lora) == 512 and round(sum(map(prod, lora)) / 1e6, 1) == 6.3
    assert len(tiny) == 120 and round(sum(map(prod, tiny)) / 1e6, 2) == 0.17
    for a, b in zip(lora[::2], lora[1::2], strict=True):
        assert a == b[::-1] and a[0] in (8, 16)


def test_resnet50_has_the_convolutions_and_norms_of_table_1() -> None:
    shapes = SETS["resnet50"].shapes()
    convolutions = [shape for shape in shapes if len(shape) == 4]
    kernels = Counter(shape[2] for shape in convolutions)
    assert kernels == {7: 1, 3: 16, 1: 36}
    assert sum(len(shape) == 1 for shape in shapes) == 2 * 53 + 1
    assert convolutions[1] == (64, 64, 1, 1) and shapes[-2:] == [(1000, 2048), (1000,)]


def test_gpt2_embedding_is_there_once() -> None:
    assert sum(shape == (50257, 768) for shape in SETS["gpt2"].shapes()) == 1


def test_a_generator_that_misses_its_counts_is_refused() -> None:
    wrong = ParameterSet("wrong", "wrong", 2, 6, lambda: iter([(2, 2), (3,)]))
    with pytest.raises(ValueError, match="must hold 2 tensors and 6 parameters, its generator made 2 and 7"):
        wrong.shapes()


def test_default_sets_are_those_with_required_ratios() -> None:
    from benchmarks.report import REQUIRED

    assert set(DEFAULT_SETS) == set(REQUIRED)
    assert set(DEFAULT_SETS) < set(FULL_SETS) and "smoke" not in FULL_SETS


def test_parameters_follow_the_seed_and_gradients_own_their_storage() -> None:
    shapes = SETS["smoke"].shapes()
    first, again, other = (make_parameters(shapes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    grads = make_gradients(shapes, 1)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(shapes)
