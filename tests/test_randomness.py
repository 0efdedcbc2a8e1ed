"""Both passes draw the same numbers, and the run goes on as if there had been one pass."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sam_fused import SAM
from sam_fused.randomness import Randomness
from tests.devices import default
from tests.optim.helpers import assert_one_sentence


def dropped(model, x):
    return model(x) == 0


def net():
    return nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5))


def randomness():
    return Randomness([default()])


def test_both_passes_drop_the_same_units():
    model, x, recorded = net(), torch.ones(3, 5), randomness()
    recorded.record()
    first = dropped(model, x)
    recorded.replay()
    second = dropped(model, x)
    assert torch.equal(first, second) and 20 < first.sum() < 100
    assert not torch.equal(dropped(model, x), first)


@pytest.mark.parametrize("passes", [2, 3])
def test_the_run_goes_on_as_if_there_had_been_one_pass(passes):
    """Neither the next step's masks nor the order of the next epoch may tell that masks were replayed."""
    model, x, recorded = net(), torch.ones(3, 5), randomness()

    def go_on():
        return [torch.randperm(50), *(dropped(model, x) for _ in range(2)), torch.rand(3, device="cpu")]

    torch.manual_seed(1)
    model(x)
    expected = go_on()
    torch.manual_seed(1)
    recorded.record()
    model(x)
    after_first = torch.get_rng_state()
    for _ in range(passes - 1):
        recorded.replay()
        model(x)
    assert torch.equal(torch.get_rng_state(), after_first)
    assert all(map(torch.equal, go_on(), expected))


def test_what_others_draw_between_the_steps_is_not_drawn_again():
    """The order of the next epoch, drawn after a step: replaying may only reach back to the last record()."""
    recorded, orders = randomness(), []
    for _ in range(4):
        recorded.record()
        torch.rand(7)
        recorded.replay()
        torch.rand(7)
        orders.append(torch.randperm(100).tolist())
    assert len({tuple(order) for order in orders}) == 4


def test_recording_draws_nothing_and_does_not_seed():
    torch.manual_seed(3)
    expected = torch.rand(4, device="cpu")
    torch.manual_seed(3)
    recorded = randomness()
    recorded.record()
    assert torch.equal(torch.rand(4, device="cpu"), expected)


def test_what_was_recorded_is_no_view_of_the_generator():
    recorded = randomness()
    recorded.record()
    first = torch.rand(4, device="cpu")
    torch.manual_seed(99)
    for _ in range(2):
        recorded.replay()
        assert torch.equal(torch.rand(4, device="cpu"), first)


def test_generators_of_their_own_and_pythons_are_left_alone():
    recorded, own = randomness(), torch.Generator(device="cpu").manual_seed(5)
    recorded.record()
    first, number = torch.rand(3, generator=own, device="cpu"), random.random()
    recorded.replay()
    assert not torch.equal(torch.rand(3, generator=own, device="cpu"), first) and random.random() != number


def test_two_records_are_independent():
    outer, inner = randomness(), randomness()
    outer.record()
    torch.rand(3)
    inner.record()
    middle = torch.rand(3)
    inner.replay()
    assert torch.equal(torch.rand(3), middle)
    outer.replay()
    torch.rand(3)
    assert torch.equal(torch.rand(3), middle)


def test_the_gradient_of_a_sam_step_is_that_of_one_network():
    """With a loss that is linear in the weights the gradient does not depend on e: it differs if the mask does."""
    model, x, recorded = net(), torch.ones(3, 5), randomness()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend="foreach")
    recorded.record()
    model(x).sum().backward()
    first = [p.grad.clone() for p in model.parameters()]
    with optimizer.perturbed():
        recorded.replay()
        model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))


# ---- moves that are not possible -------------------------------------------------------------------------------------


def test_replay_before_record_is_one_sentence_and_changes_nothing():
    recorded = randomness()
    assert not recorded.is_recorded
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError) as error:
        recorded.replay()
    assert_one_sentence(error.value, "replay()", "record()", "expected", "got")
    assert torch.equal(torch.get_rng_state(), before)
    recorded.record()
    assert recorded.is_recorded
    recorded.replay()
    assert recorded.is_recorded


# ---- CUDA ------------------------------------------------------------------------------------------------------------


class Generators:
    """Stands for torch.cuda where there is none: a state per device, and who asked for which."""

    def __init__(self, monkeypatch, current=0, capturing=False):
        self.states = {index: torch.tensor([index], dtype=torch.uint8, device="cpu") for index in range(3)}
        self.current, self.capturing, self.asked = current, capturing, []
        for name in ("get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _index(self, device):
        index = torch.device(device).index
        return self.current if index is None else index

    def get_rng_state(self, device="cuda"):
        self.asked.append(self._index(device))
        return self.states[self._index(device)].clone()

    def set_rng_state(self, state, device="cuda"):
        self.asked.append(self._index(device))
        self.states[self._index(device)] = state.clone()


def test_the_generators_of_the_cuda_devices_given_and_of_no_others(monkeypatch):
    cuda = Generators(monkeypatch)
    recorded = Randomness(["cpu", torch.device("cuda", 2), "cuda:1", "meta", "cuda:1"])
    recorded.record()
    cuda.states = {index: torch.tensor([77], dtype=torch.uint8, device="cpu") for index in range(3)}
    recorded.replay()
    assert [cuda.states[index].item() for index in range(3)] == [77, 1, 2]
    assert sorted(cuda.asked) == [1, 1, 2, 2]


def test_a_device_without_a_number_is_the_one_that_was_current_when_recorded(monkeypatch):
    cuda = Generators(monkeypatch, current=2)
    recorded = Randomness(["cuda"])
    recorded.record()
    cuda.current = 0
    cuda.states[0] = cuda.states[2] = torch.tensor([77], dtype=torch.uint8, device="cpu")
    recorded.replay()
    assert [cuda.states[index].item() for index in range(3)] == [77, 1, 2]


def test_on_the_cpu_cuda_is_not_asked(monkeypatch):
    cuda = Generators(monkeypatch, capturing=True)
    recorded = Randomness(["cpu"])
    recorded.record()
    recorded.replay()
    assert cuda.asked == []


@pytest.mark.parametrize("move", ["record", "replay"])
def test_a_capture_is_refused_in_one_sentence(monkeypatch, move):
    cuda = Generators(monkeypatch)
    recorded = Randomness(["cpu", "cuda:0"])
    recorded.record()
    before, cuda.capturing, cuda.asked = torch.get_rng_state(), True, []
    with pytest.raises(RuntimeError) as error:
        getattr(recorded, move)()
    assert_one_sentence(error.value, f"{move}()", "capture")
    assert cuda.asked == [] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_masks_are_equal_captures_are_refused_and_nothing_waits():
    model, x = net().cuda(), torch.ones(3, 5, device="cuda")
    recorded = Randomness(["cuda"])
    recorded.record()
    first = dropped(model, x)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorded.replay()
        second = dropped(model, x)
        recorded.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second) and torch.equal(torch.cuda.get_rng_state(), state)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for move in (recorded.record, recorded.replay):
            with pytest.raises(RuntimeError, match="capture"):
                move()
        torch.zeros(1, device="cuda")
