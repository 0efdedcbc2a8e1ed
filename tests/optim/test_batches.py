"""Cutting a batch into micro-batches: how large, in which order, of which types, and what cannot be cut."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import pytest
import torch

from sam_fused import MicroBatchSAM
from sam_fused.optim.batches import micro_batches
from tests.optim.helpers import assert_one_sentence, parameter

Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):
    """What tokenizers return: a mapping with attributes."""

    def __init__(self, data, source="text"):
        super().__init__(data)
        self.source = source


class Wrapped(MutableMapping):
    """A mapping around a dict of its own, which a shallow copy shares."""

    def __init__(self, data):
        self.inner = data

    def __getitem__(self, key):
        return self.inner[key]

    def __setitem__(self, key, value):
        self.inner[key] = value

    def __delitem__(self, key):
        del self.inner[key]

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


def rows(count):
    """Row i of it holds i."""
    return torch.arange(count, dtype=torch.float32)[:, None].expand(count, 3).contiguous()


# ---- sizes and order -------------------------------------------------------------------------------------------------

SIZES = {
    (12, 4): [3, 3, 3, 3],
    (10, 4): [3, 3, 2, 2],
    (11, 4): [3, 3, 3, 2],
    (5, 4): [2, 1, 1, 1],
    (4, 4): [1, 1, 1, 1],
    (7, 1): [7],
    (1, 1): [1],
}


@pytest.mark.parametrize(("samples", "count"), SIZES)
def test_sizes_differ_by_one_at_most_and_the_larger_ones_come_first(samples, count):
    x = rows(samples)
    pieces = micro_batches((x, torch.arange(samples)), count)
    assert [size for _, size in pieces] == SIZES[samples, count]
    assert all(len(a) == len(b) == size for (a, b), size in pieces)
    # In order, each sample once, inputs beside their targets.
    assert torch.equal(torch.cat([a for (a, _), _ in pieces]), x)
    assert torch.cat([b for (_, b), _ in pieces]).tolist() == list(range(samples))


def test_pieces_are_views():
    """Another copy of the batch would cost memory for every micro-batch, and hide what the closure writes into its inputs."""
    x = rows(7)
    for (piece,), _ in micro_batches((x,), 3):
        assert piece._is_view() and piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    (second,), _ = micro_batches((x,), 3)[1]
    second.fill_(-1.0)
    assert x[:, 0].tolist() == [0, 1, 2, -1, -1, 5, 6]


def test_gradients_flow_into_what_was_cut():
    x = rows(4).requires_grad_()
    for number, ((piece,), _) in enumerate(micro_batches((x,), 2)):
        (piece.sum() * (number + 1)).backward()
    assert x.grad[:, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x[:, :0], lambda x: x.bool(), lambda x: x.half()])
def test_layouts_and_dtypes_are_kept(make):
    x = make(rows(6))
    for number, ((piece,), size) in enumerate(micro_batches((x,), 2)):
        assert piece.dtype == x.dtype and piece.stride() == x.stride() and size == 3
        assert torch.equal(piece, x[3 * number : 3 * number + 3])


# ---- types -----------------------------------------------------------------------------------------------------------


def test_nested_lists_tuples_and_mappings_are_cut():
    x = rows(5)
    batch = (
        {"a": x, "b": [x + 10, (x + 20, {"c": x + 30})]},
        Pair(x + 40, OrderedDict(d=x + 50)),
        Encoding({"ids": x + 60}, source="here"),
    )
    pieces = micro_batches(batch, 2)
    assert [size for _, size in pieces] == [3, 2]
    begin = 0
    for (first, second, third), size in pieces:
        part = x[begin : begin + size]
        assert type(first) is dict and type(first["b"]) is list and type(first["b"][1]) is tuple
        assert torch.equal(first["a"], part) and torch.equal(first["b"][0], part + 10)
        assert torch.equal(first["b"][1][0], part + 20) and torch.equal(first["b"][1][1]["c"], part + 30)
        assert type(second) is Pair and type(second.y) is OrderedDict
        assert torch.equal(second.x, part + 40) and torch.equal(second.y["d"], part + 50)
        assert type(third) is Encoding and third.source == "here" and torch.equal(third["ids"], part + 60)
        begin += size


CONTAINERS = {
    "list": lambda x: [x, x + 1],
    "dict": lambda x: {"x": x, "y": x + 1},
    "UserDict": lambda x: Encoding({"x": x, "y": x + 1}),
    "a mapping of one's own": lambda x: Wrapped({"x": x, "y": x + 1}),
    "nested": lambda x: {"x": [x, {"y": x}]},
}


class Labels(list):
    """A list with an attribute."""

    source = "text"


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str
    inner: dict
    length: int = field(init=False, default=0)


def test_the_types_of_containers_are_kept():
    x = rows(6)
    best = torch.stack([x, x + 1], 1).max(1)
    sample = Sample(x, "a", {"y": x + 1})
    labels = Labels([x, "b"])
    labels.source = "here"
    for (size, maxima, mine, theirs), count in micro_batches((x.size(), best, labels, sample), 3):
        assert type(size) is torch.Size and size == x.size() and count == 2
        assert type(maxima) is type(best) and len(maxima.values) == 2
        assert type(mine) is Labels and mine.source == "here" and len(mine[0]) == 2 and mine[1] == "b"
        assert type(theirs) is Sample and theirs.name == "a" and theirs.length == 0
        assert torch.equal(theirs.inner["y"], theirs.x + 1) and len(theirs.x) == 2
    assert len(sample.x) == 6 and len(labels[0]) == 6


class Pairs(tuple):
    """A tuple with a constructor of its own."""

    __slots__ = ()

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


def test_containers_without_tensors_are_the_caller_s_own():
    """A log that the closure fills, statistics, options."""
    log, seen, options, sample = [], {}, Pairs(1, 2), Sample(None, "a", {})
    for (_, *given), _ in micro_batches((rows(4), log, seen, options, sample), 2):
        assert all(a is b for a, b in zip(given, (log, seen, options, sample), strict=True))


def test_a_tuple_with_a_constructor_of_its_own_becomes_a_plain_one():
    for (pair,), _ in micro_batches((Pairs(rows(4), "a"),), 2):
        assert type(pair) is tuple and len(pair[0]) == 2 and pair[1] == "a"


def test_containers_that_hold_themselves():
    loop = [rows(4)]
    loop.append({"again": loop})
    with pytest.raises(ValueError) as raised:
        micro_batches((loop,), 2)
    assert_one_sentence(raised.value, "argument 0[1]['again']")


def test_sequences_whose_first_dimension_is_not_the_batch():
    packed = torch.nn.utils.rnn.pack_sequence([rows(3), rows(2)])
    nested = torch.nested.nested_tensor([rows(3), rows(2)], layout=torch.jagged)
    for value, name in ((packed, "PackedSequence"), (nested, "NestedTensor")):
        with pytest.raises(TypeError) as raised:
            micro_batches((rows(2), {"x": value}), 2)
        assert_one_sentence(raised.value, name, "argument 1['x']", "micro_batch()")


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_the_batch_itself_stays_whole(make):
    """Written into, it would be cut out of what is left of it."""
    x = rows(6)
    batch = make(x)
    pieces = micro_batches((batch,), 3)
    assert [size for _, size in pieces] == [2, 2, 2]

    def leaves(value):
        if isinstance(value, torch.Tensor):
            return [value]
        entries = list(value) if isinstance(value, (list, tuple)) else list(value.values())
        return [leaf for entry in entries for leaf in leaves(entry)]

    assert all(len(leaf) == 6 for leaf in leaves(batch))
    for (piece,), _ in pieces:
        assert piece is not batch and all(len(leaf) == 2 for leaf in leaves(piece))


def test_everything_else_goes_into_each_piece_as_it_is():
    class Scheduler:
        pass

    x, own, scalar, marker = rows(4), Scheduler(), torch.tensor(7.0), object()
    batch = (x, own, scalar, 3, "text", None, {"x": x, "mask": None, "scale": scalar}, marker)
    for (piece, *rest), size in micro_batches(batch, 2):
        assert len(piece) == size == 2
        assert rest[0] is own and rest[1] is scalar and rest[2:5] == [3, "text", None] and rest[6] is marker
        assert rest[5]["mask"] is None and rest[5]["scale"] is scalar and len(rest[5]["x"]) == 2


@pytest.mark.parametrize("empty", [(), [], {}, ([], {})])
def test_empty_containers_stay_what_they_are(empty):
    for (_, second), _ in micro_batches((rows(2), empty), 2):
        assert second == empty and type(second) is type(empty)


# ---- what cannot be cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "count"), [(3, 4), (0, 1), (1, 2)])
def test_more_micro_batches_than_samples_are_refused(samples, count):
    with pytest.raises(ValueError) as raised:
        micro_batches((rows(samples),), count)
    assert_one_sentence(raised.value, f"{count} micro-batches", f"got {samples}", "num_micro_batches")


DIFFERENT = {
    "arguments": (lambda: (rows(4), rows(5)), ("4 in argument 0", "5 in argument 1")),
    "in a dict": (lambda: ({"ids": rows(4), "mask": rows(3)},), ("4 in argument 0['ids']", "3 in argument 0['mask']")),
    "deep": (lambda: (rows(2), [{"a": (rows(2), rows(1))}]), ("2 in argument 0", "1 in argument 1[0]['a'][1]")),
    "later ones": (lambda: (rows(4), rows(4), rows(8)), ("4 in argument 0", "8 in argument 2")),
}


@pytest.mark.parametrize(("batch", "words"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_numbers_of_samples_are_refused_by_name(batch, words):
    """A mask that is as long as the sequence, or a weight per class: cutting it would pair it with the wrong samples."""
    with pytest.raises(ValueError) as raised:
        micro_batches(batch(), 2)
    assert_one_sentence(raised.value, *words, "micro_batch()")


@pytest.mark.parametrize("batch", [(), (3, "text"), (torch.tensor(1.0),), ([], {"a": None})], ids=str)
def test_a_batch_without_a_tensor_to_cut_is_refused(batch):
    with pytest.raises(ValueError) as raised:
        micro_batches(batch, 1)
    assert_one_sentence(raised.value, "got none", "first dimension", "micro_batch()")


@pytest.mark.parametrize(
    "batch", [lambda: (rows(2), rows(3)), lambda: (rows(2),), lambda: ()], ids=["different", "too few", "nothing"]
)
def test_a_step_over_a_batch_that_cannot_be_cut_changes_nothing(backend, batch):
    w = parameter([1.0], torch.float32)
    optimizer = MicroBatchSAM([w], torch.optim.SGD, num_micro_batches=3, lr=0.1, momentum=0.9, backend=backend)
    w.grad = torch.ones(1)
    called = []
    with pytest.raises(ValueError):
        optimizer.step(lambda *arguments: called.append(arguments), *batch())
    assert not called and w.item() == 1.0 and w.grad.item() == 1.0 and not optimizer.state
    optimizer.zero_grad()

    def closure(x):
        loss = (w * x).sum() / x.numel()
        loss.backward()
        return loss

    optimizer.step(closure, torch.ones(7, 2))
    assert w.item() == pytest.approx(0.9)


def test_the_closure_sees_each_micro_batch_twice_in_order(backend):
    w = parameter([1.0], torch.float32)
    optimizer = MicroBatchSAM([w], torch.optim.SGD, num_micro_batches=2, lr=0.1, backend=backend)
    seen = []

    def closure(batch, scale):
        seen.append((batch["x"][:, 0].tolist(), scale))
        loss = (w * batch["x"]).mean() * scale
        loss.backward()
        return loss

    optimizer.step(closure, {"x": rows(5)}, 0.5)
    assert seen == [([0.0, 1.0, 2.0], 0.5)] * 2 + [([3.0, 4.0], 0.5)] * 2
