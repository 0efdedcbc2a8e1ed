"""Problems whose sharpness is known: quadratics, the four-dimensional toy, a small net with its full Hessian."""

from __future__ import annotations

import copy
import random
from itertools import pairwise

import numpy
import torch
from torch import nn
from torch.func import functional_call

from sam_fused.sharpness import LossSurface, batch_loss
from tests.optim.helpers import bits

# Mean 1 over the four samples; 4/3 for whoever takes the mean of the two batches' means.
SCALES = ([0.0, 1.0, 1.0], [2.0])


class Weights(nn.Module):
    """The loss of a batch is ``function(w)`` times the mean of the batch."""

    def __init__(self, at, function):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(at, dtype=torch.float64))
        self.function = function

    def forward(self, scales):
        return self.function(self.w) * scales.mean()


def surface_of(function, at, **kwargs):
    batches = [torch.tensor(part, dtype=torch.float64) for part in SCALES]
    return LossSurface(Weights(at, function), batch_loss(lambda model, batch: model(batch)), batches, **kwargs)


def quadratic(diagonal, at=None, **kwargs):
    """``L = 0.5 sum_i a_i w_i^2``."""
    a = torch.tensor(diagonal, dtype=torch.float64)
    return surface_of(lambda w: 0.5 * (a * w * w).sum(), at or [0.0] * len(diagonal), **kwargs)


def f1(x1, x2):
    return x1**2 + 6 * x2**2 + 8


def f2(x1, x2):
    return 4 * (1 - x1) ** 2 + (1 - x2) ** 2 + 1


def toy(at, **kwargs):
    """``L = 0.5 F1(x1, x2) x3^2 + 0.5 F2(x1, x2) x4^2``."""
    return surface_of(lambda x: 0.5 * f1(x[0], x[1]) * x[2] ** 2 + 0.5 * f2(x[0], x[1]) * x[3] ** 2, at, **kwargs)


class Net:
    """A tanh MLP of 989 weights on 50 samples, in batches of 16, 16, 16 and 2."""

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        sizes = (10, 24, 24, 5)
        layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(normal(*layer.weight.shape) / layer.weight.size(1) ** 0.5)
                layer.bias.copy_(normal(*layer.bias.shape) * 0.1)
        self.model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(dtype)
        self.x, self.y = normal(50, 10).to(dtype), torch.randint(5, (50,), generator=generator)
        self.batches = list(zip(self.x.split(16), self.y.split(16), strict=True))
        self.loss = nn.functional.cross_entropy

    def surface(self, **kwargs):
        return LossSurface(self.model, self.loss, self.batches, **kwargs)

    def flat_loss(self, flat):
        """The loss over the whole data as a function of all weights, computed in one piece and without the library."""
        parameters, start = {}, 0
        for name, parameter in self.model.named_parameters():
            parameters[name] = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        return self.loss(functional_call(self.model, parameters, (self.x,)), self.y)

    @property
    def flat(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def hessian(self):
        return torch.func.hessian(self.flat_loss)(self.flat)


class BatchNormNet(nn.Module):
    """BatchNorm, dropout, a tied weight, a frozen one, a buffer that counts its forwards and one that overlaps itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.third.bias.requires_grad_(False)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(6).expand(2, 6))

    def forward(self, x):
        self.forwards = self.forwards + 1  # in another tensor each time
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        return self.third(torch.tanh(self.second(x))) * self.mask[0]


def batch_norm_case(dtype=torch.float64):
    """A trained-in model in a mixture of modes, with gradients, and three uneven batches."""
    generator = torch.Generator().manual_seed(3)
    model = BatchNormNet().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        for _ in range(5):
            model(torch.randn((8, 4), generator=generator, dtype=torch.float64).to(dtype) * 2 + 1)
    model.norm.eval()  # frozen by somebody
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn((13, 4), generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn((13, 6), generator=generator, dtype=torch.float64).to(dtype)
    return model, x, y


def everything(model, *generators):
    """All that a measurement must leave alone: values as bits, objects and addresses by identity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    numpy_state = numpy.random.get_state()
    return {
        "bits": {name: bits(tensor).tolist() if tensor.is_floating_point() else tensor.tolist() for name, tensor in tensors},
        "grads": {name: bits(p.grad).tolist() for name, p in model.named_parameters() if p.grad is not None},
        "places": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors},
        # What autograd goes by. BatchNorm in training mode counts up its statistics' own.
        "versions": [parameter._version for parameter in model.parameters()],
        "grad places": [(id(p.grad), None if p.grad is None else p.grad.data_ptr()) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "flags": [module.training for module in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": (numpy_state[1].tolist(), numpy_state[2]),
        "own": [generator.get_state().tolist() for generator in generators],
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def cut(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def twin(model):
    return copy.deepcopy(model)
