"""Ascent directions that are written out, because the kernels do not form them from weights and gradients by themselves.

The kernels know T = 1 and T = ``|w|``. Any other T of ASAM [2102.11600], the sign of p = infinity and a weight decay in the
ascent take torch's multi-tensor calls over a second copy of what is perturbed; norm and perturbation are the kernels' again,
with the direction in the gradient's place. A call per list, in the dtype of the arithmetic; on a GPU torch launches once per
tensor for factors that are tensors (a layerwise T) and for sums of two dtypes (a decay of half weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import captures
from .functional import grad_norm

Entry = TypeVar("Entry")

# Elements of a tensor from which on a norm of its own is faster than its part of torch's call in fp64 (measured).
_LARGE = 2**15

# How the direction of a tensor is scaled. The first two are what the kernels know (``scaling`` in ``schema``).
PLAIN, ELEMENTWISE, LAYERWISE = 0, 1, 2  # T = 1, |w| + eta, ||w||_F


class Directions:
    """``T (g + decay w)`` of the tensors of one device, and then ``T^2 (g + decay w)`` or ``T sign(g + decay w)``.

    Accesses per element: 2 to write g out, 3 for a decay, 2 + 2 + 2 + 3 and then 3 for an elementwise T, 1 + 2 and then 2 for a
    layerwise one, 2 for the signs.

    Args:
        params: the weights; read, never written.
        scaling: ``PLAIN``, ``ELEMENTWISE`` or ``LAYERWISE`` for each.
        out: a tensor for each, in the dtype of the arithmetic: the direction.
        scales: the same for each elementwise one: its T.
        backend: whose norm a layerwise T takes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        scaling: Sequence[int],
        out: Sequence[Tensor],
        scales: Sequence[Tensor],
        backend: str | None = None,
    ) -> None:
        self._params, self._out, self._scales, self._backend = list(params), list(out), list(scales), backend
        self._elementwise = [index for index, kind in enumerate(scaling) if kind == ELEMENTWISE]
        self._layerwise = [index for index, kind in enumerate(scaling) if kind == LAYERWISE]
        self._lengths: list[Tensor] = []

    @torch.no_grad()
    def write(
        self, grads: Sequence[Tensor], etas: Sequence[float], decays: Sequence[float], inv_scale: Tensor | None
    ) -> list[Tensor]:
        """``T (inv_scale g + decay w)``, whose norm is to be taken."""
        out = self._out
        if captures.is_capturing(out[0].device):
            raise RuntimeError(
                "a step in a CUDA graph: expected a perturbation that the kernels form, got eta, a layerwise T, p = inf or a "
                "weight decay in the ascent, which the graph would freeze: capture the step without them."
            )
        torch._foreach_copy_(out, list(grads))
        if inv_scale is not None:
            torch._foreach_mul_(out, inv_scale.to(out[0].device))
        for decay in set(decays) - {0.0}:
            decayed = [index for index, value in enumerate(decays) if value == decay]
            torch._foreach_add_(_at(out, decayed), _at(self._params, decayed), alpha=decay)
        if self._elementwise:
            torch._foreach_copy_(self._scales, _at(self._params, self._elementwise))
            torch._foreach_abs_(self._scales)
            torch._foreach_add_(self._scales, _at(etas, self._elementwise))
        if self._layerwise:
            lengths = self._norms(_at(self._params, self._layerwise))
            self._lengths = [length.to(own.dtype) for length, own in zip(lengths, _at(out, self._layerwise), strict=True)]
        self._scale()
        return out

    def _norms(self, weights: list[Tensor]) -> list[Tensor]:
        """Each one's own, summed in fp64 by one call: squares of fp32 and of halves leave their range. On a CPU that call takes
        several times as long per element as our own norm, whose own cost is a call per tensor: the large ones are worth it."""
        device = weights[0].device.type
        large = [device == "cpu" and weight.numel() >= _LARGE for weight in weights]
        small = [weight for weight, own in zip(weights, large, strict=True) if not own]
        wide = torch.float32 if device == "mps" else torch.float64
        together = iter(torch._foreach_norm(small, 2, dtype=wide) if small else ())
        return [
            grad_norm([weight], backend=self._backend)[0] if own else next(together)
            for weight, own in zip(weights, large, strict=True)
        ]

    @torch.no_grad()
    def finish(self, signs: bool) -> None:
        """What was written, in place, as the perturbation needs it: times T once more, or its signs times T."""
        if signs:
            torch._foreach_sign_(self._out)
        self._scale()

    def _scale(self) -> None:
        if self._elementwise:
            torch._foreach_mul_(_at(self._out, self._elementwise), self._scales)
        if self._layerwise:
            torch._foreach_mul_(_at(self._out, self._layerwise), self._lengths)


def _at(entries: Sequence[Entry], indices: Sequence[int]) -> list[Entry]:
    return [entries[index] for index in indices]


@torch.no_grad()
def one_where_it_moves(norm: Tensor) -> Tensor:
    """1 in place of a norm that perturbs: what is divided by when nothing is to be. A norm that is zero, inf or NaN stays."""
    return torch.where(norm.isfinite() & (norm != 0), torch.ones_like(norm), norm)
