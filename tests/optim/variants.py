"""What the tests of the variants share: their names, e as the papers write it, runs."""

import math

import pytest
import torch
from torch.optim import SGD

from sam_fused import SAM
from tests.optim.helpers import (
    Regression,
    backward_of,
    snapshot,
    take_step,
)

ABS = 1e-11

# Each with what it is called in ``test_against_the_definition``.
VARIANTS = {
    "all": {"adaptive": "all"},
    "all, eta": {"adaptive": "all", "eta": 0.3},
    "weights": {"adaptive": "weights"},
    "weights, eta": {"adaptive": "weights", "eta": 0.3},
    "layerwise": {"adaptive": "layerwise"},
    "inf": {"p": math.inf},
    "inf, weights": {"p": math.inf, "adaptive": "weights", "eta": 0.3},
    "inf, layerwise": {"p": math.inf, "adaptive": "layerwise"},
    "unnormalised": {"normalize": False},
    "unnormalised, all": {"normalize": False, "adaptive": "all"},
    "unnormalised, layerwise": {"normalize": False, "adaptive": "layerwise"},
    "decay": {"weight_decay_in_ascent": True, "weight_decay": 0.4},
    "decay, weights": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "adaptive": "weights", "eta": 0.3},
    "decay, unnormalised": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "normalize": False},
    "decay, inf": {"weight_decay_in_ascent": True, "weight_decay": 0.4, "p": math.inf},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def defined(names, weights, grads, rho, options):
    """e as the papers write it, in fp64: one line for each thing that may be asked for."""
    adaptive, eta = options.get("adaptive"), options.get("eta", 0.0)
    grads = [g + options.get("weight_decay", 0.0) * w for g, w in zip(grads, weights, strict=True)]
    scales = []
    for name, w in zip(names, weights, strict=True):
        scaled = adaptive == "all" or (adaptive == "weights" and name.endswith("weight"))
        scales.append(w.norm() if adaptive == "layerwise" else w.abs() + eta if scaled else torch.ones_like(w))
    if options.get("p") == math.inf:
        return [rho * t * g.sign() for t, g in zip(scales, grads, strict=True)]
    norm = torch.stack([(t * g).norm() for t, g in zip(scales, grads, strict=True)]).norm()
    return [rho * t * t * g / (norm if options.get("normalize", True) else 1) for t, g in zip(scales, grads, strict=True)]


def trained(backend, form="closure", steps=3, dtype=torch.float32, cls=SAM, base=SGD, prepare=None, **options):
    """The bits of the weights after some steps."""
    task = Regression(dtype)
    if prepare is not None:
        prepare(task)
    params = options.pop("params", None)
    optimizer = cls(
        params(task) if params else task.model.named_parameters(), base, backend=backend, **{"lr": 0.1, "rho": 0.2, **options}
    )
    for _ in range(steps):
        take_step(optimizer, form, task.evaluate)
    return snapshot(task.params)


def two_steps(named, curvatures, backend, form, **options):
    """The weights after one and after two steps of lr 0.1 and rho 0.5 (unless said) on 1/2 sum a w^2."""
    params = [param for _, param in named]
    optimizer = SAM(named, SGD, **{"lr": 0.1, "rho": 0.5, **options}, backend=backend)
    curvatures = [torch.as_tensor(a, dtype=torch.float64) for a in curvatures]

    def loss():
        return sum(0.5 * (a * w * w).sum() for a, w in zip(curvatures, params, strict=True))

    seen = []
    for _ in range(2):
        take_step(optimizer, form, backward_of(loss))
        seen.append([value for param in params for value in param.flatten().tolist()])
    return seen
