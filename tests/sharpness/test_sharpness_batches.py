"""How many samples a batch has, and how it gets to the model's device."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence

from sam_fused.sharpness import LossSurface, batch_loss
from sam_fused.sharpness.batches import first_dimension, moved_to
from tests.optim.helpers import assert_one_sentence

pytestmark = pytest.mark.cpu_only

META = torch.device("meta")

pair = namedtuple("pair", "x y")


def ragged(*lengths):
    return [torch.ones(length, 6) for length in lengths]


X, Y = torch.ones(8, 6), torch.ones(8)


# ---- the number of samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (X, 8),
        ((X, Y), 8),
        ([X, [Y, Y]], 8),
        ((X, None), 8),
        ((X, torch.tensor(0.5)), 8),  # a number for the whole batch
        ({"x": {"ids": X, "names": ["a", "b"]}, "y": Y}, 8),
        (pair(X, Y), 8),
        (((X, X > 0), Y), 8),
        # one tensor per sample: the labels decide
        ((ragged(2, 2, 2), torch.ones(3)), 3),
        ((ragged(2, 5, 3), torch.ones(3)), 3),
        ((tuple(ragged(4, 5)), ({"boxes": torch.ones(7, 4)}, {"boxes": torch.ones(1, 4)})), 2),
        ((pack_sequence(ragged(3, 2)), torch.ones(2)), 2),
        (UserDict(x=X, y=Y), 8),
    ],
)
def test_the_samples_of_a_batch(batch, count):
    assert first_dimension(batch) == count


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(5, 8, 6), Y),  # time first
        {"weight": torch.ones(6), "x": X, "y": Y},
        (ragged(2, 5), torch.ones(3)),
        {"x": ragged(3, 3)},  # two samples, or three
        (torch.tensor(1.0), None),
        ("a", "b"),
        object(),
    ],
)
def test_where_tensors_do_not_agree_nothing_is_guessed(batch):
    with pytest.raises(ValueError) as raised:
        first_dimension(batch)
    assert_one_sentence(raised.value, "count", "first dimension", "by count=")


def test_a_wrong_weight_would_be_a_wrong_mean():
    """Sequences of different lengths, time first: their lengths are no weights."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return self.out(x.mean(0))

    batches = [(torch.randn(t, n, 6), torch.randint(3, (n,))) for t, n in ((5, 8), (50, 2))]
    model = Mean()
    with pytest.raises(ValueError, match="count="):
        LossSurface(model, cross_entropy, batches).loss()
    found = LossSurface(model, cross_entropy, batches, count=lambda batch: len(batch[1])).loss()
    parts = [cross_entropy(model(x), y).item() for x, y in batches]
    assert found == pytest.approx((8 * parts[0] + 2 * parts[1]) / 10, rel=1e-6)


# ---- the device ------------------------------------------------------------------------------------------------------


def test_tensors_in_batches_go_to_the_models_device():
    batch = {"a": [torch.ones(2), "text"], "b": pair(torch.ones(1), (torch.ones(3), 5))}
    moved = moved_to(batch, META)
    assert moved["a"][0].is_meta and moved["b"].x.is_meta and moved["b"].y[0].is_meta
    assert moved["a"][1] == "text" and moved["b"].y[1] == 5 and not batch["a"][0].is_meta
    assert moved_to(batch, torch.device("cpu")) is batch and moved_to(batch, None) is batch
    ordered = moved_to(OrderedDict(x=torch.ones(1)), META)
    assert type(ordered) is OrderedDict and ordered["x"].is_meta


class Encoding(UserDict):
    """As tokenizers give: a mapping with attributes, that moves itself in place."""

    def __getattr__(self, name):
        return self.__dict__["data"][name]

    def to(self, device):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class Graph:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graph(self.x.to(device))


def test_what_can_move_itself_does():
    encoding, graph, packed = Encoding(ids=torch.ones(2)), Graph(torch.ones(2)), pack_sequence(ragged(3, 2))
    moved = moved_to([encoding, graph, packed], META)
    assert type(moved[0]) is Encoding and moved[0].ids.is_meta and not encoding.ids.is_meta
    assert moved[1].x.is_meta and type(moved[2]) is type(packed) and moved[2].data.is_meta
    assert moved_to(graph, META).x.is_meta


def test_a_pass_moves_its_batches_to_the_parameters():
    """A buffer elsewhere does not matter. On meta nothing has a value: the loss is the last thing that is looked at."""
    seen = []
    model = nn.Linear(6, 1, device="meta")
    model.register_buffer("stray", torch.ones(2))

    @batch_loss
    def loss(model, batch):
        seen.append(batch[0].device)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        LossSurface(model, loss, [(X, Y)]).loss()
    assert seen == [META]
