"""A pass is a function of the weights alone, and leaves nothing behind: what modules, loaders and torch itself would change."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sam_fused import sharpness
from sam_fused.sharpness import (
    LossSurface,
    ascent_sharpness,
    average_sharpness,
    batch_loss,
    hessian_trace,
    measure,
    top_eigenvalues,
)
from sam_fused.sharpness.untouched import Untouched
from tests.optim.helpers import assert_one_sentence
from tests.optim.interrupts import Interrupt
from tests.sharpness.problems import Net, batch_norm_case, cut, everything

pytestmark = pytest.mark.cpu_only

PACKAGE = (str(Path(sharpness.__file__).parent),)


# ---- torch's own memory ----------------------------------------------------------------------------------------------


def test_inside_autocast_the_weights_are_those_of_the_pass():
    """Autocast keeps low-precision copies of the weights: with the copies of the pass before every rise would be 0."""
    case = Net(torch.float32)
    case.loss = lambda outputs, targets: cross_entropy(outputs.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = case.model(case.x)
        surface = case.surface()
        point = surface.gradient()
        inside = ascent_sharpness(surface, 0.5, point=point)
        average = average_sharpness(surface, 0.5, directions=3, point=point)
        case.model(case.x)  # whose copies of the weights are there when the pass begins
        far = [surface.loss(torch.ones(surface.dimension)) for _ in range(2)]
        after = case.model(case.x)
    assert far[0] == far[1] > surface.loss() + 0.05
    assert inside == pytest.approx(ascent_sharpness(Net(torch.float32).surface(), 0.5), rel=0.1)
    assert average.mean != 0 and torch.equal(before, after)


def test_inside_autocast_a_gradient_may_follow_a_loss():
    """A copy that was made under no_grad has no graph."""
    case = Net(torch.float32)
    case.loss = lambda outputs, targets: cross_entropy(outputs.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surface = case.surface()
        surface.loss()
        assert surface.gradient().gradient.norm() > 0.01


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)
        self.out = nn.Linear(8, 3)

    def forward(self, inputs):
        x, padding = inputs
        return self.out(self.encoder(x, src_key_padding_mask=padding).mean(1))


def test_attention_is_the_same_function_with_and_without_a_graph():
    """The fast path, which is for eval mode without a graph, makes padding zero."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    padding = torch.zeros(8, 5, dtype=torch.bool)
    padding[:4, 3:] = True
    batch = ((torch.randn(8, 5, 8, generator=generator), padding), torch.randint(3, (8,), generator=generator))
    surface = LossSurface(Encoder(), cross_entropy, [batch])
    assert surface.loss() == pytest.approx(surface.gradient().loss, rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


# ---- loaders ---------------------------------------------------------------------------------------------------------


def persistent_loader(**kwargs):
    model, x, y = batch_norm_case()
    kwargs = {"batch_size": 5, "shuffle": True, "num_workers": 1, "persistent_workers": True, **kwargs}
    return model, DataLoader(TensorDataset(x, y), **kwargs)


def test_persistent_workers_get_the_same_batches_in_the_first_pass():
    model, loader = persistent_loader(drop_last=True)
    before = everything(model)
    surface = LossSurface(model, mse_loss, loader, batch_norm="train")
    first = surface.loss()
    assert everything(model) == before
    assert [surface.loss(), surface.gradient().loss] == [first] * 2


def test_persistent_workers_cannot_serve_two_loops():
    model, loader = persistent_loader(prefetch_factor=1, batch_size=2)
    surface = LossSurface(model, mse_loss, loader)
    seen = 0
    for _ in loader:
        seen += 1
        if seen == 1:
            with pytest.raises(ValueError) as raised:
                surface.loss()
            assert_one_sentence(raised.value, "persistent_workers", "epoch")
    assert seen == 7
    assert surface.loss() == surface.loss()


def test_persistent_workers_after_a_pass_that_broke_off():
    model, loader = persistent_loader(prefetch_factor=1, batch_size=2)
    with pytest.raises(ValueError, match="finite"):
        LossSurface(model, lambda a, b: mse_loss(a, b) * float("nan"), loader).loss()
    surface = LossSurface(model, mse_loss, loader)
    assert surface.loss() == surface.loss()


def test_a_loaders_own_generator_is_seeded():
    """The same seed gives the same batches, however much was drawn from it before."""
    model, x, y = batch_norm_case()
    loader = DataLoader(TensorDataset(x, y), 5, shuffle=True, generator=torch.Generator().manual_seed(1))
    first = LossSurface(model, mse_loss, loader, batch_norm="train").loss()
    list(loader)
    state = loader.generator.get_state()
    assert LossSurface(model, mse_loss, loader, batch_norm="train").loss() == first
    assert LossSurface(model, mse_loss, loader, batch_norm="train", seed=1).loss() != first
    assert torch.equal(loader.generator.get_state(), state)


class Noisy(Dataset):
    """Draws from a generator that nobody knows of."""

    def __init__(self):
        self.model, self.x, self.y = batch_norm_case()
        self.hidden = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return self.x[number] + torch.randn(4, generator=self.hidden, dtype=torch.float64), self.y[number]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda made: top_eigenvalues(made, 1),
        lambda made: measure(made.model, mse_loss, made._batches),
    ],
)
def test_data_with_hidden_random_numbers_are_no_function(attempt):
    data = Noisy()
    with pytest.raises(ValueError) as raised:
        attempt(LossSurface(data.model, mse_loss, DataLoader(data, 5)))
    assert_one_sentence(raised.value, "same loss at the same weights", "pass 2", "list(batches)")


def test_between_measurements_the_weights_may_change():
    case = Net()
    surface = case.surface()
    hessian_trace(surface, samples=2)
    with torch.no_grad():
        case.model[0].weight.mul_(2)
    assert hessian_trace(surface, samples=2).mean != 0


# ---- losses that are of something else -------------------------------------------------------------------------------


def test_a_loss_of_another_model_is_refused():
    """All of its sharpness would be 0."""
    case, other = Net(), Net()
    surface = LossSurface(case.model, batch_loss(lambda model, batch: case.loss(other.model(batch[0]), batch[1])), case.batches)
    for attempt in (surface.gradient, lambda: hessian_trace(surface, samples=2), lambda: top_eigenvalues(surface)):
        with pytest.raises(ValueError) as raised:
            attempt()
        assert_one_sentence(raised.value, "depends on the model's parameters", "no gradient")


def test_parameters_that_the_model_has_no_longer_are_refused():
    case = Net()
    surface = case.surface()
    surface.loss()
    case.model.load_state_dict({name: value.clone() for name, value in case.model.state_dict().items()}, assign=True)
    for attempt in (surface.loss, surface.gradient, lambda: average_sharpness(surface, 0.1)):
        with pytest.raises(ValueError) as raised:
            attempt()
        assert_one_sentence(raised.value, "'0.weight'", "assign=True", "LossSurface")


def test_parameters_that_were_frozen_since_are_refused():
    case = Net()
    surface = case.surface()
    case.model[2].requires_grad_(False)
    with pytest.raises(ValueError) as raised:
        surface.gradient()
    assert_one_sentence(raised.value, "'2.weight'", "frozen", "LossSurface")


# ---- what a forward writes -------------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Rewrites weights, frozen ones too, fills a buffer, registers others, and moves one to other memory."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4, max_norm=0.5)
        self.out = nn.Linear(4, 3)
        self.average = nn.Linear(4, 3).requires_grad_(False)
        self.register_buffer("empty", None)
        self.register_buffer("grown", torch.zeros(1, 3))
        self.register_buffer("order", torch.zeros(2))

    def forward(self, x):
        if self.empty is None:
            self.empty = torch.ones(3)
        if "late" not in self._buffers:
            self.register_buffer("late", torch.zeros(2), persistent=False)
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.out.parameters(), strict=True):
                mean.mul_(0.9).add_(weight, alpha=0.1)
        hidden = self.embedding(x)
        self.grown.data = torch.cat([self.grown, self.average(hidden).detach()])
        return self.out(hidden) * self.empty


def writing_case():
    torch.manual_seed(0)
    return Writing(), [(torch.randint(10, (6,)), torch.randint(3, (6,))) for _ in range(2)]


def held(model):
    """All but what autograd goes by: the forward writes weights itself."""
    names = list(model._buffers), list(model.state_dict()), model._non_persistent_buffers_set.copy()
    return {**everything(model), "versions": None, "names": names}


def test_what_a_forward_writes_is_put_back():
    model, batches = writing_case()
    before = held(model)
    surface = LossSurface(model, cross_entropy, batches)
    assert surface.loss() == surface.loss() == surface.gradient().loss
    assert held(model) == before


def test_buffers_of_inference_mode_are_put_back():
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        model.register_buffer("cached", torch.ones(3))
    before = everything(model)
    LossSurface(model, mse_loss, [(torch.ones(2, 4), torch.ones(2, 3))]).loss(torch.ones(15))
    assert everything(model) == before and model.cached.is_inference()


class Centred(nn.Module):
    """A loss with a buffer that each call moves, and dropout."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(5, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, outputs, targets):
        with torch.no_grad():
            self.centre.mul_(0.9).add_(outputs.mean(0))
        return cross_entropy(self.dropout(outputs - self.centre), targets)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: batch_loss(WithModel(loss))])
def test_a_loss_that_is_a_module_is_put_back_too(wrap):
    case, loss = Net(), Centred()
    surface = LossSurface(case.model, wrap(loss), case.batches)
    before = everything(loss)
    assert surface.loss() == surface.loss() == surface.gradient().loss
    assert everything(loss) == before and loss.dropout.training
    assert surface.loss() == LossSurface(case.model, wrap(loss), case.batches, seed=1).loss()  # no dropout


class WithModel(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, model, batch):
        return self.loss(model(batch[0]), batch[1])


# ---- interrupts ------------------------------------------------------------------------------------------------------


def test_an_interrupt_between_any_two_lines_leaves_everything_as_it_was():
    """Also between the lines that put it back."""
    model, batches = writing_case()
    surface = LossSurface(model, cross_entropy, batches, progress=False)
    offset = torch.full((surface.dimension,), 0.1)
    surface.loss(offset)
    before = held(model)
    number, problems = 0, set()
    while True:
        number += 1
        interrupt = Interrupt(number, PACKAGE)
        if not interrupt.during(lambda: surface.loss(offset)):
            break
        if held(model) != before:
            problems.add(interrupt.where)
    assert number > 200 and not problems


def test_putting_back_goes_on_after_interrupts_and_errors():
    model, x, y = batch_norm_case()
    before = everything(model)
    snapshot = Untouched([model], [], cut(x, y, 5), "eval", 0)
    snapshot.begin()
    for parameter in model.parameters():
        parameter.data.zero_()
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) < 3:
            raise KeyboardInterrupt

    def broken():
        raise ArithmeticError

    snapshot._undo.insert(3, interrupted)
    snapshot._undo.insert(2, broken)
    with pytest.raises(KeyboardInterrupt):
        snapshot.put_back()
    assert len(calls) == 3 and everything(model) == before
    random.random()
    after = random.getstate()
    snapshot.put_back()  # nothing is left to do
    assert random.getstate() == after


@pytest.mark.parametrize("had", [False, True])
def test_gradients_are_out_of_reach_of_a_loss_that_calls_backward(had):
    model, x, y = batch_norm_case()
    if not had:
        model.zero_grad()
    held = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

    def loss(outputs, targets):
        value = mse_loss(outputs, targets)
        value.backward(retain_graph=True)
        return value

    made = LossSurface(model, loss, cut(x, y, 5))
    for attempt in (made.gradient, lambda: made.hessian_product(torch.ones(made.dimension))):
        with pytest.raises(TypeError, match="backward"):
            attempt()
        for parameter, (grad, value) in zip(model.parameters(), held, strict=True):
            assert parameter.grad is grad and (grad is None or torch.equal(grad, value))
