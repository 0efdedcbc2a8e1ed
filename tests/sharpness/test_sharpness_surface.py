"""What a pass computes and what it leaves behind: weighting, modes, and everything bitwise as it was."""

import random

import numpy
import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from sam_fused.sharpness import (
    LossSurface,
    along,
    ascent_sharpness,
    average_sharpness,
    batch_loss,
    between,
    hessian_trace,
    measure,
    plane,
    top_eigenvalues,
    worst_sharpness,
)
from tests.sharpness.problems import Net, batch_norm_case, cut, everything, quadratic, twin

pytestmark = pytest.mark.cpu_only


def all_measurements(surface, first, second):
    point = surface.gradient()
    ascent_sharpness(surface, 0.1, point=point)
    average_sharpness(surface, 0.1, directions=2, point=point)
    worst_sharpness(surface, 0.1, starts=["gradient", "random"], steps=2, point=point)
    hessian_trace(surface, samples=2)
    along(surface, point.gradient, points=2)
    between(surface, first, second, positions=2)
    plane(surface, points=2)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_changed(mode, dtype):
    model, x, y = batch_norm_case(dtype)
    with torch.no_grad():
        model.first.bias[0] = -0.0
    first, second = twin(model).state_dict(), twin(model).state_dict()
    before = everything(model)
    surface = LossSurface(model, mse_loss, cut(x, y, 5), batch_norm=mode)
    all_measurements(surface, first, second)
    if dtype == torch.float64:
        top_eigenvalues(surface, 2)
    assert everything(model) == before


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_nothing_is_changed_by_an_exception_wherever_it_comes(mode, error):
    model, x, y = batch_norm_case()
    first, second = twin(model).state_dict(), twin(model).state_dict()
    calls, fatal = 0, -1

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        torch.rand(())
        random.random()
        numpy.random.rand()
        if calls == fatal:
            raise error
        return mse_loss(outputs, targets)

    before = everything(model)
    batches = cut(x, y, 7)
    all_measurements(LossSurface(model, loss, batches, batch_norm=mode), first, second)
    assert everything(model) == before
    total = calls
    assert total > 30
    for fatal in range(1, total + 1):  # read by the loss
        calls = 0
        with pytest.raises(error):
            all_measurements(LossSurface(model, loss, batches, batch_norm=mode), first, second)
        assert calls == fatal and everything(model) == before


def test_a_weight_that_is_nan_stays_the_nan_that_it_was():
    model, x, y = batch_norm_case(torch.float32)
    strange = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)
    model.first.weight.data[0, 0] = strange
    before = everything(model)
    surface = LossSurface(model, mse_loss, cut(x, y, 5))
    with pytest.raises(ValueError, match="finite"):
        surface.loss(torch.zeros(surface.dimension))
    assert everything(model) == before


def test_a_graph_from_before_can_still_be_used():
    """The weights are moved and put back between a forward and its backward."""
    case = Net()
    loss = case.loss(case.model(case.x), case.y)
    average_sharpness(case.surface(), 0.1, directions=2)
    loss.backward()
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in case.model.parameters()]), torch.func.grad(case.flat_loss)(case.flat)
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_of_contexts_without_gradients(context):
    surface = Net().surface()
    expected = surface.gradient(), hessian_trace(surface, samples=2)
    with context():
        found = surface.gradient(), hessian_trace(surface, samples=2)
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode) and not torch.is_grad_enabled()
        assert torch.equal(found[0].gradient, expected[0].gradient) and found[1] == expected[1]


# ---- what is computed ------------------------------------------------------------------------------------------------


def test_batches_are_weighted_by_their_samples():
    """Means of 2/3 over three samples and 2 over one."""
    surface = quadratic([4.0, 1.0], [0.5, 1.0])
    assert surface.loss() == pytest.approx(1.0, rel=1e-15)
    point = surface.gradient()
    assert point.loss == surface.loss() and point.gradient.tolist() == pytest.approx([2.0, 1.0], rel=1e-15)
    assert surface.hessian_product(torch.eye(2)).tolist() == [[4.0, 0.0], [0.0, 1.0]]
    assert surface.samples == 4 and surface.passes == 4


def test_a_count_of_ones_own():
    surface = quadratic([2.0], [1.0])
    counted = LossSurface(surface.model, surface._loss, surface._batches, count=lambda batch: 3 if len(batch) == 1 else 1)
    assert counted.loss() == pytest.approx((2 / 3 + 3 * 2) / 4, rel=1e-14)


def test_in_eval_mode_the_cut_into_batches_does_not_matter():
    model, x, y = batch_norm_case()
    values = [LossSurface(model, mse_loss, cut(x, y, size)).gradient() for size in (13, 5, 1)]
    for other in values[1:]:
        assert other.loss == pytest.approx(values[0].loss, rel=1e-13)
        torch.testing.assert_close(other.gradient, values[0].gradient, rtol=1e-12, atol=1e-14)
    reference = twin(model).eval()
    assert values[0].loss == pytest.approx(mse_loss(reference(x), y).item(), rel=1e-13)


def test_in_train_mode_each_batch_has_its_own_statistics_and_dropout_is_off():
    """Also in a BatchNorm that somebody had frozen; a whole model in training mode would drop half of the units."""
    model, x, y = batch_norm_case()
    reference = twin(model).eval()
    reference.norm.train()
    batches = cut(x, y, 5)
    expected = sum(len(a) * mse_loss(reference(a), b).item() for a, b in batches) / 13
    surface = LossSurface(model, mse_loss, batches, batch_norm="train")
    assert surface.loss() == pytest.approx(expected, rel=1e-13)
    assert surface.loss() == surface.gradient().loss
    assert abs(LossSurface(model, mse_loss, batches).loss() / expected - 1) > 1e-3


class Whitening(torch.nn.Module):
    """A normalisation of ones own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.register_buffer("running_scale", torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        scale = x.std(0) if self.training else self.running_scale
        return self.weight * x / scale


def test_any_module_with_running_statistics_counts_as_batch_norm():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = torch.nn.Sequential(Whitening(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4, track_running_stats=False))
    losses = {}
    for mode in ("eval", "train"):
        seen = []
        hook = model.register_forward_pre_hook(lambda model, _, seen=seen: seen.append([m.training for m in model.modules()]))
        losses[mode] = LossSurface(model.double(), mse_loss, [(x, x)], batch_norm=mode).loss()
        hook.remove()
        assert seen == [[False, mode == "train", False, mode == "train"]]


def test_values_are_computed_without_a_graph():
    modes = []
    case = Net()
    loss = case.loss
    case.loss = lambda outputs, targets: modes.append(torch.is_grad_enabled()) or loss(outputs, targets)
    surface = case.surface()
    surface.loss()
    average_sharpness(surface, 0.1, directions=2)
    assert not any(modes)
    surface.gradient()
    assert modes[-4:] == [True] * 4


@pytest.mark.parametrize("seed", [2**70, 2**64 - 1, numpy.int64(3)])
def test_any_whole_number_is_a_seed(seed):
    case = Net()
    assert case.surface(seed=seed).loss() == case.surface().loss()


def test_parameters_that_do_not_require_gradients_are_left_out():
    model, x, y = batch_norm_case()
    surface = LossSurface(model, mse_loss, cut(x, y, 5))
    names = [name for name, p in model.named_parameters() if any(p is q for q in surface.parameters)]
    assert "third.bias" not in names and "second.weight" in names
    # The tied weight is one.
    assert surface.dimension == 24 + 6 + 6 + 6 + 36 + 6 == surface.gradient().gradient.numel()


def test_the_surface_is_around_the_weights_as_they_are():
    surface = quadratic([4.0, 1.0], [1.0, 0.0])
    assert surface.loss() == 2.0
    with torch.no_grad():
        surface.model.w.zero_()
    assert surface.loss() == 0.0 and surface.loss(torch.tensor([0.0, 2.0])) == 2.0


def test_a_shuffling_and_augmenting_loader_is_one_fixed_function():
    """Batch statistics depend on the cut, and the noise on four generators; none of them is left another than it was."""
    model, x, y = batch_norm_case()
    own = torch.Generator().manual_seed(4)

    def collate(samples):
        inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
        return inputs + torch.randn(()) + random.random() + float(numpy.random.rand()), targets

    def found(generator, seed=0):
        loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, collate_fn=collate, generator=generator)
        surface = LossSurface(model, mse_loss, loader, batch_norm="train", seed=seed)
        before = everything(model, own)
        values = [surface.loss(), surface.loss(), surface.gradient().loss]
        assert values == [values[0]] * 3
        assert everything(model, own) == before
        return values[0]

    assert found(own) == found(own) != found(None)
    first = found(None)
    torch.rand(3), random.random(), numpy.random.rand()
    assert found(None) == first != found(None, seed=1)


def test_batches_may_be_dicts_for_a_loss_of_ones_own():
    case = Net()
    batches = [{"features": {"x": x}, "y": y, "name": "any"} for x, y in case.batches]

    @batch_loss
    def loss(model, batch):
        return case.loss(model(batch["features"]["x"]), batch["y"])

    assert LossSurface(case.model, loss, batches).loss() == case.surface().loss()


def test_offsets_are_added_in_double_precision():
    """Half a unit in the last place and a bit more is rounded up; in float32 the bit would be lost, and half goes to even."""
    surface = quadratic([2.0], [1.0])
    surface.model.w.data = torch.tensor([1.0], dtype=torch.float32)
    surface.model.function = lambda w: w[0]
    offset = torch.tensor([2**-24 + 2**-50], dtype=torch.float64)
    assert surface.loss(offset) == pytest.approx(1 + 2**-23, abs=1e-12)


def test_sums_over_batches_are_in_double_precision():
    """In float32, 1 + 2^-25 is 1 however often it is added."""
    model = torch.nn.Linear(1, 1, bias=False)
    batches = [(torch.ones(1, 1), None)] + [(torch.full((1, 1), 2.0**-25), None)] * 64
    surface = LossSurface(model, lambda outputs, _: outputs.sum(), batches)
    assert surface.gradient().gradient.item() * 65 == pytest.approx(1 + 64 * 2**-25, rel=1e-14)


def test_a_whole_report_leaves_everything_alone():
    model, x, y = batch_norm_case()
    before = everything(model)
    report = measure(model, mse_loss, cut(x, y, 5), points=3, worst_steps=2, average_directions=2, trace_samples=2)
    assert everything(model) == before
    assert report.parameters == 84 and report.samples == 13
