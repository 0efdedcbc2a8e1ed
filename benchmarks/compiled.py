"""The optimizer side of a SAM step as two functions compiled by torch.compile, base update included.

Without a compiled base update the second phase would be torch's fused optimizer, which `baselines.py` has already.
`dynamic=False` and `fullgraph=True`: one graph per phase with the shapes built in, the compiler's best case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.baselines import BASES, PERTURB_EPS, RHO, gradient, swap_data


def _ascent(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """w + rho * g / (|g| + eps). The scale stays a tensor: an `.item()` would cut the graph in two."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    scaled = torch._foreach_mul(grads, RHO / (norm + PERTURB_EPS))
    return list(torch._foreach_add(weights, scaled))


def _perturb_into(weights: list[Tensor], grads: list[Tensor], perturbed: list[Tensor]) -> None:
    """The compiler fuses the copy into the addition, so that the kept tensors are written once and never read."""
    torch._foreach_copy_(perturbed, _ascent(weights, grads))


def _perturb_in_place(weights: list[Tensor], grads: list[Tensor], backup: list[Tensor]) -> None:
    torch._foreach_copy_(backup, weights)
    torch._foreach_copy_(weights, _ascent(weights, grads))


def _sgd(out: list[Tensor], clean: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    """torch's SGD with momentum and weight decay; a buffer of zeros gives its first step too, dampening being zero."""
    settings = BASES["sgd"][1]
    decayed = torch._foreach_add(grads, clean, alpha=settings["weight_decay"])
    torch._foreach_mul_(momenta, settings["momentum"])
    torch._foreach_add_(momenta, decayed)
    torch._foreach_copy_(out, torch._foreach_add(clean, momenta, alpha=-settings["lr"]))


def _adamw(
    out: list[Tensor],
    clean: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    step_size: Tensor,
    correction: Tensor,
) -> None:
    """torch's AdamW. The two bias corrections come in as tensors: as Python numbers each step would compile anew."""
    settings = BASES["adamw"][1]
    beta1, beta2 = settings["betas"]
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, correction)
    torch._foreach_add_(denominators, settings["eps"])
    updates = torch._foreach_div(averages, denominators)
    torch._foreach_mul_(updates, step_size)
    decayed = torch._foreach_mul(clean, 1 - settings["lr"] * settings["weight_decay"])
    torch._foreach_copy_(out, torch._foreach_sub(decayed, updates))


class CompiledSAM:
    """Two compiled phases. `swap=True` perturbs into kept tensors and swaps `p.data`; else in place with a kept backup.

    Swapping moves one access per parameter less, at addresses that change; both are measured by `--full`.
    """

    def __init__(self, params: list[Tensor], base: str, swap: bool = True) -> None:
        self.params = params
        self.swap = swap
        self.base = base
        self.weights = [p.data for p in params]
        self.other = [torch.empty_like(w) for w in self.weights]
        self.state = [[torch.zeros_like(w) for w in self.weights] for _ in range(1 if base == "sgd" else 2)]
        self.step_size, self.correction = (torch.zeros((), device=params[0].device) for _ in range(2))
        self.steps = 0
        perturb = _perturb_into if swap else _perturb_in_place
        self._perturb = torch.compile(perturb, fullgraph=True, dynamic=False)
        self._update = torch.compile(_sgd if base == "sgd" else _adamw, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        """The compiled ascent; the parameters then hold the perturbed weights."""
        self._perturb(self.weights, [gradient(p) for p in self.params], self.other)
        if self.swap:
            swap_data(self.params, self.other)

    @torch.no_grad()
    def second_step(self) -> None:
        """The compiled base update, which reads the clean weights wherever they are: restoring costs nothing."""
        self.steps += 1
        corrections: list[Tensor] = []
        if self.base == "adamw":
            lr, (beta1, beta2) = BASES["adamw"][1]["lr"], BASES["adamw"][1]["betas"]
            self.step_size.fill_(lr / (1 - beta1**self.steps))
            self.correction.fill_(math.sqrt(1 - beta2**self.steps))
            corrections = [self.step_size, self.correction]
        clean = self.weights if self.swap else self.other
        self._update(self.weights, clean, [gradient(p) for p in self.params], *self.state, *corrections)
        if self.swap:
            swap_data(self.params, self.weights)
