"""What the optimizer tests share: bit comparisons, the three forms of a step, naive SAM, small problems."""

from __future__ import annotations

import re

import torch

from tests.devices import randn

BACKENDS = ("native", "foreach", "reference")
FORMS = ("closure", "perturbed", "first_second")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    """The tensor's bit patterns, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).clone()


def snapshot(tensors):
    return [None if tensor is None else bits(tensor) for tensor in tensors]


def assert_same_bits(actual, expected):
    """Both are lists of tensors (or None) or of what ``snapshot`` gave."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for index, (first, second) in enumerate(zip(actual, expected, strict=True)):
        if first is None or second is None:
            assert first is second, f"entry {index}: {first} against {second}"
            continue
        first = bits(first) if first.is_floating_point() else first
        second = bits(second) if second.is_floating_point() else second
        assert torch.equal(first, second), f"entry {index} differs in {int((first != second).sum())} elements"


def snapshot_state(optimizer):
    """Everything in the optimizer's state and groups that a step may change, by parameter position."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = []
    for param in params:
        entry = optimizer.state.get(param, {})
        state.append({k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in entry.items()})
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return state, groups


def assert_same_state(actual, expected):
    """Both are what ``snapshot_state`` gave."""
    assert actual[1] == expected[1]
    assert len(actual[0]) == len(expected[0])
    for first, second in zip(actual[0], expected[0], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if isinstance(first[key], torch.Tensor):
                assert_same_bits([first[key]], [second[key]])
            else:
                assert first[key] == second[key], key


def backups_of(optimizer):
    """The backups of the last ascent, of whom nothing public tells more than their bytes."""
    return [backup for part in optimizer._ascent.parts for backup in part.tensors.backups]


def assert_one_sentence(error, *words):
    """House rule: an error is one sentence, and it names what it is about."""
    message = str(error)
    assert message.endswith(".") and "\n" not in message, message
    assert not re.search(r"[.!?]\s+[A-Z]", message), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def take_step(optimizer, form, evaluate):
    """One SAM step in one of the three forms; ``evaluate`` runs forward and backward and returns the loss."""
    if form == "closure":
        return optimizer.step(evaluate)
    optimizer.zero_grad()
    loss = evaluate()
    if form == "perturbed":
        with optimizer.perturbed():
            evaluate()
        optimizer.step()
    else:
        optimizer.first_step(zero_grad=True)
        evaluate()
        optimizer.second_step()
    return loss


def backward_of(function):
    """A closure out of a function that only computes the loss."""

    def evaluate():
        loss = function()
        loss.backward()
        return loss

    return evaluate


def parameter(values, dtype=torch.float64):
    return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


class NaiveSAM:
    """SAM as the popular class does it, in plain words: add e to the weights, take the second gradient, put the old weights
    back, step. ``rho``, ``adaptive`` and ``perturb`` are lists with one entry per group of ``base``."""

    def __init__(self, base, rho, adaptive=None, perturb=None):
        count = len(base.param_groups)
        self.base = base
        self.rho = rho if isinstance(rho, list) else [rho] * count
        self.adaptive = adaptive if isinstance(adaptive, list) else [bool(adaptive)] * count
        self.perturb = perturb or [True] * count

    def step(self, evaluate):
        self.base.zero_grad()
        loss = evaluate()
        old = {}
        with torch.no_grad():
            members = [
                (param, number)
                for number, group in enumerate(self.base.param_groups)
                for param in group["params"]
                if self.perturb[number] and param.grad is not None
            ]
            lengths = [((p.abs() if self.adaptive[n] else 1.0) * p.grad).norm() for p, n in members]
            length = torch.stack(lengths).norm() if lengths else None
            for param, number in members:
                old[param] = param.clone()
                factor = param * param if self.adaptive[number] else 1.0
                param.add_(factor * param.grad * (self.rho[number] / (length + 1e-12)))
        self.base.zero_grad()
        evaluate()
        with torch.no_grad():
            for param, value in old.items():
                param.copy_(value)
        self.base.step()
        return loss


class Regression:
    """A small smooth net on fixed data. Two of them with the same seed are bit-identical."""

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.LayerNorm(9), torch.nn.Linear(9, 3)
        ).to(dtype)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(randn(param.shape, generator, torch.float64) * 0.5)
        self.x = randn((16, 6), generator, torch.float64).to(dtype)
        self.y = randn((16, 3), generator, torch.float64).to(dtype)
        self.calls = 0

    @property
    def params(self):
        return list(self.model.parameters())

    def loss(self):
        self.calls += 1
        return torch.nn.functional.mse_loss(self.model(self.x), self.y)

    def evaluate(self):
        loss = self.loss()
        loss.backward()
        return loss
