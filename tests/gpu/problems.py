"""What the GPU tests share: parameters with gradients that are handed to them, and the forms of a step over those."""

from __future__ import annotations

import torch

from sam_fused import SAM

DEVICE = torch.device("cuda")
BACKENDS = ("native", "triton")

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
# Around a chunk, around a vector, empty, 0-dimensional.
SHAPES = ((32769,), (64, 33), (17,), (), (0,), (5, 7), (1000,))


def values(shapes=SHAPES, seed=0, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


class Problem:
    """Parameters whose gradients of pass 1 and pass 2 live in tensors that stay: as a captured graph needs them."""

    def __init__(self, base, backend, *, shapes=SHAPES, dtype=torch.float32, device=DEVICE, **options):
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.params = [torch.nn.Parameter(v) for v in values(shapes, 1, dtype, device)]
        self.first, self.second = values(shapes, 2, dtype, device), values(shapes, 3, dtype, device)
        base_class, settings = BASES[base]
        self.optimizer = SAM(self.params, base_class, rho=0.3, backend=backend, **{**settings, **options})

    def give(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def renew(self, seed):
        """Other numbers in the same gradients."""
        for target, offset in ((self.first, 0), (self.second, 1)):
            for grad, value in zip(target, values(self.shapes, 10 * seed + offset, self.dtype, self.device), strict=True):
                grad.copy_(value)

    def step(self, form="first_second"):
        """One step with the gradients that are there, in one of the three forms."""
        if form == "closure":
            passes = iter((self.first, self.second))

            def closure():
                self.give(next(passes))
                return self.first[0].sum()

            self.optimizer.zero_grad()
            self.optimizer.step(closure)
            return
        self.give(self.first)
        if form == "perturbed":
            with self.optimizer.perturbed():
                self.give(self.second)
            self.optimizer.step()
        else:
            self.optimizer.first_step()
            self.give(self.second)
            self.optimizer.second_step()

    def state(self):
        """Every tensor that a step may change: weights, and the base optimizer's state in a fixed order."""
        held = [self.optimizer.state.get(param, {}) for param in self.params]
        return [*self.params, *(entry[key] for entry in held for key in sorted(entry) if entry[key] is not None)]


FORMS = ("closure", "perturbed", "first_second")
