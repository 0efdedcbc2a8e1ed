"""Micro-batch SAM as a user would write it without sam_fused, each form once, in the best form we know.

All share `perturb()` after a micro-batch's first backward pass, `accumulate(weight)` after its second and `step()` after the
last micro-batch. Every pass but the first needs gradients that are None, so the two calls clear them, as ours do. The sums
are in the parameters' dtype. `tests/benchmarks/test_bench_micro_batch.py` holds each to a naive loop in fp64.

In place, the weights have to be copied back after every second pass, since the next first pass needs them clean: writing the
next `backup + c * g` over them without copying back would save two accesses and compute something else. Swapping `p.data` is
the form that saves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines import NaiveSAM, SwapSAM, ascent_scale, gradient, make_base, swap_data


class NaiveMicroBatchSAM(NaiveSAM):
    """The loop of `NaiveSAM` over micro-batches, and one more loop that adds up.

    Two forms, since the faster depends on the sizes. `clones`: its own first and second step, a clone per tensor and
    micro-batch that takes the parameter's place afterwards. `kept`: buffers that stay, one copy a step, copied back.
    """

    def __init__(self, params: list[Tensor], base: str, kept: bool) -> None:
        super().__init__(params, base)
        self.params = params
        self.kept = [torch.empty_like(p.data) for p in params] if kept else None
        self.sums = [torch.empty_like(p.data) for p in params] if kept else []
        self.count = 0

    @torch.no_grad()
    def perturb(self) -> None:
        """w + rho * g / (|g| + eps)."""
        if self.kept is None:
            self.first_step()
        else:
            scale = self.scale()
            for p, kept in zip(self.params, self.kept, strict=True):
                if self.count == 0:
                    kept.copy_(p)
                p.add_(1.0 * gradient(p) * scale.to(p))
        clear_gradients(self.params)

    @torch.no_grad()
    def accumulate(self, weight: float) -> None:
        """The clean weights again; the sum of weight * g, which the first micro-batch writes without reading."""
        for index, p in enumerate(self.params):
            if self.kept is None:
                p.data = self.backup[p]
            else:
                p.copy_(self.kept[index])
            if self.count:
                self.sums[index].add_(gradient(p), alpha=weight)
            elif self.kept is None:
                self.sums.append(gradient(p) * weight)
            else:
                torch.mul(gradient(p), weight, out=self.sums[index])
        self.count += 1
        clear_gradients(self.params)

    def step(self) -> None:
        """The base step along the sums."""
        for p, total in zip(self.params, self.sums, strict=True):
            p.grad = total
        self.base_optimizer.step()
        clear_gradients(self.params)
        if self.kept is None:
            self.sums = []
        self.count = 0


class _Sums:
    """What foreach forms add up to.

    `fresh`: the first micro-batch's product is the sum, allocated anew every step. `kept`: copied and multiplied in place.
    `loop`: one `torch.mul(..., out=kept)` per tensor, the fewest accesses without an allocation, but no multi-tensor call.
    """

    def __init__(self, params: list[Tensor], memory: str) -> None:
        self.memory = memory
        self.tensors = [torch.empty_like(p.data) for p in params] if memory != "fresh" else []
        self.count = 0

    def add(self, grads: list[Tensor], weight: float) -> None:
        """sum + weight * g."""
        if self.count:
            torch._foreach_add_(self.tensors, grads, alpha=weight)
        elif self.memory == "fresh":
            self.tensors = list(torch._foreach_mul(grads, weight))
        elif self.memory == "kept":
            torch._foreach_copy_(self.tensors, grads)
            torch._foreach_mul_(self.tensors, weight)
        else:
            for g, total in zip(grads, self.tensors, strict=True):
                torch.mul(g, weight, out=total)
        self.count += 1

    def step(self, params: list[Tensor], base: torch.optim.Optimizer) -> None:
        """The base step along the sums."""
        for p, total in zip(params, self.tensors, strict=True):
            p.grad = total
        base.step()
        clear_gradients(params)
        if self.memory == "fresh":
            self.tensors = []
        self.count = 0


class ForeachInPlaceMicroBatchSAM:
    """torch's multi-tensor calls at stable addresses with its fused base optimizer; one copy into the kept backup a step."""

    def __init__(self, params: list[Tensor], base: str, sums: str) -> None:
        self.base_optimizer = make_base(params, base, fused=True)
        self.params = params
        self.backup = [torch.empty_like(p.data) for p in params]
        self.sums = _Sums(params, sums)

    @torch.no_grad()
    def perturb(self) -> None:
        """Copies into the backup in the first micro-batch, adds in place."""
        grads = [gradient(p) for p in self.params]
        alpha = ascent_scale(grads)
        if self.sums.count == 0:
            torch._foreach_copy_(self.backup, self.params)
        torch._foreach_add_(self.params, grads, alpha=alpha)
        clear_gradients(self.params)

    @torch.no_grad()
    def accumulate(self, weight: float) -> None:
        """Copies the backup back, adds up."""
        torch._foreach_copy_(self.params, self.backup)
        self.sums.add([gradient(p) for p in self.params], weight)
        clear_gradients(self.params)

    def step(self) -> None:
        """The base step along the sums."""
        self.sums.step(self.params, self.base_optimizer)


class SwapMicroBatchSAM(SwapSAM):
    """`p.data` swapped for a perturbed copy and back, with the forms of `SwapSAM` for the copy and the same for the sums."""

    def __init__(self, params: list[Tensor], base: str, copy: str) -> None:
        super().__init__(params, base, copy)
        self.sums = _Sums(params, copy)

    def perturb(self) -> None:
        """Each parameter becomes the perturbed copy."""
        self.first_step()
        clear_gradients(self.params)

    @torch.no_grad()
    def accumulate(self, weight: float) -> None:
        """Each parameter becomes its clean tensor again; adds up."""
        swap_data(self.params, self.clean)
        if self.copy == "fresh":
            self.perturbed = []
        self.sums.add([gradient(p) for p in self.params], weight)
        clear_gradients(self.params)

    def step(self) -> None:
        """The base step along the sums."""
        self.sums.step(self.params, self.base_optimizer)


def clear_gradients(params: list[Tensor]) -> None:
    """What `zero_grad()` does, and nothing else that it does."""
    for p in params:
        p.grad = None
