"""What a perturbation really was, after rounding to the weights' storage dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class PerturbationMetrics(NamedTuple):
    """The perturbation that the weights hold, as 0-dim tensors on the CPU or the first parameter's device.

    Attributes:
        norm: ``||w_perturbed - w_clean||``, the realised length of e.
        cosine: its cosine to the direction that was asked for, ``T^2 g``.
        moved: the fraction of the perturbed elements that changed at all.
    """

    norm: Tensor
    cosine: Tensor
    moved: Tensor


@torch.no_grad()
def perturbation_metrics(
    params: Sequence[Tensor], backups: Sequence[Tensor], grads: Sequence[Tensor], scaling: Sequence[int] = ()
) -> PerturbationMetrics:
    """Compares perturbed weights with their backups, in fp64. Allocates temporaries: for looking, not for every step."""
    if not params:
        zero = torch.zeros((), dtype=torch.float64)
        return PerturbationMetrics(zero, zero, zero)
    realised = [(w.double() - b.double()).to(params[0].device) for w, b in zip(params, backups, strict=True)]
    wanted = []
    for index, (grad, backup) in enumerate(zip(grads, backups, strict=True)):
        clean = backup.double()
        direction = grad.double()
        wanted.append((clean * (clean * direction) if scaling and scaling[index] else direction).to(params[0].device))
    # Each direction is brought to unit length before the product, so that nothing overflows.
    norm, _ = reference.grad_norm(realised)
    asked, _ = reference.grad_norm(wanted)
    product = sum(((e / norm) * (d / asked)).sum() for e, d in zip(realised, wanted, strict=True))
    elements = sum(e.numel() for e in realised)
    moved = sum((e != 0).sum() for e in realised) / max(elements, 1)
    cosine = torch.where((norm > 0) & (asked > 0), torch.as_tensor(product), torch.zeros_like(norm))
    return PerturbationMetrics(norm, cosine, torch.as_tensor(moved, dtype=torch.float64))
