"""Lines, planes, filter normalisation and the way between two checkpoints."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from sam_fused.sharpness import LossSurface, along, between, filter_normalized, plane, random_direction
from tests.sharpness.problems import Net, batch_norm_case, cut, quadratic, surface_of, twin

pytestmark = pytest.mark.cpu_only


def test_a_line_through_a_quadratic():
    line = along(quadratic([4.0, 1.0], [0.5, 0.0]), torch.tensor([2.0, 0.0]), radius=0.5, points=5)
    assert line.positions == (-0.5, -0.25, 0.0, 0.25, 0.5)
    assert line.losses == pytest.approx([2 * (0.5 + 2 * t) ** 2 for t in line.positions], rel=1e-14)


def test_an_overflow_far_away_is_part_of_the_picture():
    """0.5 (1e200 t)^2 is inf at the ends, and no error."""
    line = along(quadratic([1.0], [0.0]), torch.tensor([1e200], dtype=torch.float64), points=3)
    assert line.losses == (math.inf, 0.0, math.inf)


def test_a_plane_has_the_first_direction_in_its_rows():
    grid = plane(quadratic([4.0, 1.0]), (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), points=3, filter_normalize=False)
    assert grid.first == grid.second == (-1.0, 0.0, 1.0)
    assert grid.losses == ((2.5, 2.0, 2.5), (0.5, 0.0, 0.5), (2.5, 2.0, 2.5))


def test_a_plane_of_eigenvectors():
    grid = plane(quadratic([1.0, 6.0, 3.0]), "eigenvectors", points=3, radius=0.1, filter_normalize=False)
    assert grid.losses[2][1] == pytest.approx(0.03, rel=1e-9) and grid.losses[1][2] == pytest.approx(0.015, rel=1e-9)


def test_planes_of_random_directions_by_seed():
    surface = Net().surface()
    grids = [plane(surface, points=3, radius=0.5, seed=seed) for seed in (1, 1, 2)]
    assert grids[0] == grids[1] != grids[2]
    assert grids[0].losses[1][1] == surface.loss() == grids[2].losses[1][1]
    assert grids[0] != plane(surface, points=3, radius=0.5, seed=1, vectors="scale")


# ---- filter normalisation --------------------------------------------------------------------------------------------


def filters_case():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].weight[2] *= 100
        model[1].weight.fill_(2.0)
    return LossSurface(model, mse_loss, [(torch.ones(2, 2, 3, 3, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64))])


def test_each_filter_has_the_norm_of_the_weights_filter():
    surface = filters_case()
    direction = random_direction(surface)
    untouched = direction.clone()
    scaled = filter_normalized(surface, direction)
    assert torch.equal(direction, untouched)
    for part, raw, weight in zip(surface.pieces(scaled), surface.pieces(direction), surface.parameters, strict=True):
        if weight.dim() == 1:
            assert not part.any()
            continue
        for mine, given, filter in zip(part, raw, weight.detach(), strict=True):
            assert mine.norm().item() == pytest.approx(filter.norm().item(), rel=1e-13)
            assert filter.norm() == 0 or torch.cosine_similarity(mine.flatten(), given.flatten(), dim=0) > 1 - 1e-12


def test_vectors_may_be_scaled_too_and_zeros_stay_zero():
    surface = filters_case()
    scaled = filter_normalized(surface, random_direction(surface), vectors="scale")
    for part, weight in zip(surface.pieces(scaled), surface.parameters, strict=True):
        if weight.dim() == 1:
            assert part.norm().item() == pytest.approx(weight.norm().item(), rel=1e-13)
    assert not filter_normalized(surface, torch.zeros(surface.dimension), vectors="scale").any()


def test_a_rescaled_net_has_the_same_landscape():
    """What it is for: 10 times the first layer and a tenth of the second are the same function of a ReLU net."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double()
    rescaled = twin(model)
    with torch.no_grad():
        rescaled[0].weight *= 10
        rescaled[2].weight /= 10
    data = [(torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64))]
    losses = {}
    for name, net in (("model", model), ("rescaled", rescaled)):
        surface = LossSurface(net, mse_loss, data)
        direction = random_direction(surface, seed=3)
        losses[name] = along(surface, filter_normalized(surface, direction), points=7).losses
        losses[name + " raw"] = along(surface, direction, points=7).losses
    assert losses["rescaled"] == pytest.approx(losses["model"], rel=1e-12)
    assert losses["rescaled raw"] != pytest.approx(losses["model raw"], rel=0.1)


# ---- between checkpoints ---------------------------------------------------------------------------------------------


def other_checkpoint(model):
    """Every floating-point entry is another one, the frozen bias and the running statistics included."""
    generator = torch.Generator().manual_seed(8)
    state = twin(model).state_dict()
    for name, value in state.items():
        if name != "mask" and value.is_floating_point():
            value += 0.1 * torch.rand(value.shape, generator=generator, dtype=value.dtype)
    state["third.weight"] = state["second.weight"]  # tied
    return state


def test_the_way_between_two_checkpoints():
    model, x, y = batch_norm_case()
    first, second = twin(model).state_dict(), other_checkpoint(model)
    surface = LossSurface(model, mse_loss, cut(x, y, 5))
    with torch.no_grad():
        model.first.weight.zero_()  # the model's own weights play no part
    line = between(surface, first, second, positions=[0.0, 0.25, 1.0, 1.5])
    assert not model.first.weight.any()
    for t, loss in zip(line.positions, line.losses, strict=True):
        reference = twin(model).eval()
        for name, live in reference.state_dict(keep_vars=True).items():
            if name != "mask" and live.is_floating_point():
                live.data.copy_((1 - t) * first[name] + t * second[name])
        assert loss == pytest.approx(mse_loss(reference(x), y).item(), rel=1e-12)


def test_a_checkpoint_may_be_the_models_own_live_state():
    """Its tensors change while the loss is computed: the values have to be taken before."""
    case = Net()
    surface = case.surface()
    zero = {name: torch.zeros_like(value) for name, value in case.model.state_dict().items()}
    line = between(surface, case.model.state_dict(), zero, positions=3)
    assert line.losses[0] == surface.loss() and line.losses[2] == pytest.approx(math.log(5), rel=1e-14)
    assert line.losses[1] == pytest.approx(surface.loss(-0.5 * case.flat), rel=1e-14)


def test_checkpoints_may_be_lists_of_parameters():
    model, x, y = batch_norm_case()
    surface = LossSurface(model, mse_loss, cut(x, y, 5))
    target = other_checkpoint(model)
    values = [target[name] for name, _ in model.named_parameters()]
    line = between(surface, model.parameters(), values, positions=2)
    moved = twin(model).eval()
    for parameter, value in zip(moved.parameters(), values, strict=True):
        parameter.data.copy_(value)
    assert line.losses == pytest.approx([surface.loss(), mse_loss(moved(x), y).item()], rel=1e-13)


def test_counters_are_those_of_the_nearer_checkpoint():
    seen = []
    surface = surface_of(lambda w: w.sum(), [1.0])
    surface.model.register_buffer("counter", torch.tensor(0))
    surface.model.function = lambda w: seen.append(surface.model.counter.item()) or w.sum()
    state = surface.model.state_dict()
    between(surface, state, {**state, "counter": torch.tensor(9)}, positions=[0, 0.4, 0.6, 1])
    assert seen[::2] == [0, 0, 9, 9]


def test_positions_may_be_an_array():
    case = Net()
    ends = case.model.state_dict(), {name: 2 * value for name, value in case.model.state_dict().items()}
    expected = between(case.surface(), *ends, positions=3)
    for positions in (numpy.linspace(0, 1, 3), torch.linspace(0, 1, 3), range(2), numpy.int64(3)):
        line = between(case.surface(), *ends, positions=positions)
        assert line == expected or line.positions == (0.0, 1.0)
        assert all(type(t) is float for t in line.positions)


def test_infinite_weights_at_one_end_do_not_spoil_the_other():
    surface = quadratic([1.0], [1.0])
    assert between(surface, [torch.tensor([1.0])], [torch.tensor([math.inf])], positions=2).losses == (0.5, math.inf)
