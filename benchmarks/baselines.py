"""What a user would run instead, each defined once, in the best form we know.

All share one call form, `first_step()` then `second_step()`, and a public `base_optimizer`; gradients are found in
`.grad`. `tests/benchmarks/test_bench_baselines.py` holds each to the weights that `NaiveSAM` reaches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The settings of every measurement: SGD with momentum and weight decay, AdamW with torch's defaults spelt out. At this learning
# rate the nets of the whole steps train: one that diverges leaves NaN gradients, along which SAM does not move.
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}),
}
RHO = 0.05
PERTURB_EPS = 1e-12


def make_base(params: list[Tensor], base: str, **form: bool) -> torch.optim.Optimizer:
    """torch's optimizer of this name with the settings above; `fused=True` and the like choose its form."""
    optimizer_class, settings = BASES[base]
    return optimizer_class(params, **{**settings, **form})


class NaiveSAM:
    """The algorithm of the class that most people copy: a Python loop with a handful of torch calls per tensor.

    The factor 1.0 stands where its adaptive form has |w|; its users pay for that product, so it is kept. The base
    optimizer runs in the form that torch picks when nothing is asked for.
    """

    def __init__(self, params: list[Tensor], base: str) -> None:
        self.base_optimizer = make_base(params, base)
        self.backup: dict[Tensor, Tensor] = {}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base_optimizer.param_groups for p in group["params"] if p.grad is not None]

    def scale(self) -> Tensor:
        """rho / (|g| + eps)."""
        norms = [(1.0 * gradient(p)).norm(p=2) for p in self._parameters()]
        return RHO / (torch.norm(torch.stack(norms), p=2) + PERTURB_EPS)

    @torch.no_grad()
    def first_step(self) -> None:
        """w + rho * g / (|g| + eps), the clean weights kept as one clone per tensor."""
        scale = self.scale()
        for p in self._parameters():
            self.backup[p] = p.data.clone()
            ascent = 1.0 * gradient(p) * scale.to(p)
            p.add_(ascent)

    @torch.no_grad()
    def second_step(self) -> None:
        """Puts the clones in the parameters' place, then the base step."""
        for p in self._parameters():
            p.data = self.backup[p]
        self.base_optimizer.step()


class ForeachInPlaceSAM:
    """torch's multi-tensor calls by hand, at stable addresses, with torch's fused base optimizer.

    The scale leaves the graph through `.item()`, which lets one call multiply and add; the backup is allocated once.
    """

    def __init__(self, params: list[Tensor], base: str) -> None:
        self.base_optimizer = make_base(params, base, fused=True)
        self.params = params
        self.backup: list[Tensor] | None = None

    @torch.no_grad()
    def first_step(self) -> None:
        """Copies into the kept backup, adds in place."""
        if self.backup is None:
            self.backup = [torch.empty_like(p) for p in self.params]
        grads = [gradient(p) for p in self.params]
        alpha = ascent_scale(grads)
        torch._foreach_copy_(self.backup, self.params)
        torch._foreach_add_(self.params, grads, alpha=alpha)

    @torch.no_grad()
    def second_step(self) -> None:
        """Copies the backup back, then the base step."""
        assert self.backup is not None, "second_step needs a first_step before it"
        torch._foreach_copy_(self.params, self.backup)
        self.base_optimizer.step()


class SwapSAM:
    """`p.data` is swapped for a perturbed copy and back: fewer accesses, and every address changes twice a step.

    Three ways to make the copy, since the fastest depends on the sizes: `fresh` allocates it in the one multi-tensor
    call that adds (large tensors then pay page faults), `kept` copies into kept tensors and adds there, and `loop` is
    one `torch.add(..., out=kept)` per tensor: the fewest accesses without an allocation, but no multi-tensor call.
    """

    def __init__(self, params: list[Tensor], base: str, copy: str) -> None:
        self.base_optimizer = make_base(params, base, fused=True)
        self.params = params
        self.clean = [p.data for p in params]
        self.perturbed = [torch.empty_like(w) for w in self.clean] if copy != "fresh" else []
        self.copy = copy

    @torch.no_grad()
    def first_step(self) -> None:
        """Each parameter becomes the perturbed copy."""
        grads = [gradient(p) for p in self.params]
        alpha = ascent_scale(grads)
        if self.copy == "fresh":
            self.perturbed = list(torch._foreach_add(self.clean, grads, alpha=alpha))
        elif self.copy == "kept":
            torch._foreach_copy_(self.perturbed, self.clean)
            torch._foreach_add_(self.perturbed, grads, alpha=alpha)
        else:
            for w, g, moved in zip(self.clean, grads, self.perturbed, strict=True):
                torch.add(w, g, alpha=alpha, out=moved)
        swap_data(self.params, self.perturbed)

    @torch.no_grad()
    def second_step(self) -> None:
        """Each parameter becomes its clean tensor again, then the base step."""
        swap_data(self.params, self.clean)
        if self.copy == "fresh":
            self.perturbed = []
        self.base_optimizer.step()


class PytorchOptimizerSAM:
    """SAM of pytorch_optimizer, the package a user would install instead, with `rho` and `perturb_eps` as ours.

    `foreach=True` is its multi-tensor form (it hands the keyword to the base optimizer too); with `foreach=False` it
    loops over tensors, and the base optimizer may be torch's fused one.
    """

    def __init__(self, params: list[Tensor], base: str, foreach: bool) -> None:
        from pytorch_optimizer import SAM

        optimizer_class, settings = BASES[base]
        if foreach:
            self._sam = SAM(params, optimizer_class, rho=RHO, perturb_eps=PERTURB_EPS, foreach=True, **settings)
        else:
            self._sam = SAM(params, optimizer_class, rho=RHO, perturb_eps=PERTURB_EPS, fused=True, **settings)
        self.base_optimizer: torch.optim.Optimizer = self._sam.base_optimizer
        self.first_step = self._sam.first_step
        self.second_step = self._sam.second_step


def swap_data(params: list[Tensor], tensors: list[Tensor]) -> None:
    """Each parameter takes the storage of the tensor beside it."""
    for p, tensor in zip(params, tensors, strict=True):
        p.data = tensor


def gradient(p: Tensor) -> Tensor:
    """`p.grad`, which the benchmark always sets."""
    assert p.grad is not None, "the benchmark gives every parameter a gradient"
    return p.grad


def ascent_scale(grads: list[Tensor]) -> float:
    """rho / (|g| + eps), as a number: it has to leave torch for one call to multiply and add."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return RHO / (norm.item() + PERTURB_EPS)
