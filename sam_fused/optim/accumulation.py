"""What the micro-batches of a step add up to: ``sum_k weight_k g_k`` in fp32 (fp64 for fp64 parameters)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sam_fused.ops import captures
from sam_fused.ops.dtypes import HALVES, arithmetic_dtype
from sam_fused.ops.functional import unrounded_
from sam_fused.ops.prepared import TensorSet

from .ascent import Ascent, Part, partition
from .buffers import FlatBuffers
from .state import Control

# Patterns of missing gradients that are remembered, and weights that are kept as tensors.
_REMEMBERED = 8
_WEIGHTS = 64

# How far from 1 the weights of a step's micro-batches may add up to: rounding, and no more.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Adding:
    """What the end of a micro-batch is done with: its sets, the perturbed parts that none of them restores whole, and which
    parameters have a gradient."""

    parts: list[Part]
    left_over: list[Part]
    present: list[bool]


class Accumulation:
    """The accumulators of a step, one for each parameter that any of its micro-batches has a gradient for.

    They are one flat buffer per device, allocated at first use and kept, which nothing zeroes: the first micro-batch writes.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._buffers = FlatBuffers(arithmetic_dtype)
        self._params: list[Tensor] = []
        self._known: dict[Any, _Adding] = {}
        self._sums: tuple[list[bool], list[Tensor | None]] | None = None
        self._weights: OrderedDict[tuple[float, torch.device], Tensor] = OrderedDict()
        self._holds: list[bool] = []
        self._exposed: list[Tensor | None] = []
        self._are_known = False
        self.count = 0
        self.weight = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the micro-batches so far are a whole batch."""
        return abs(self.weight - 1) <= TOLERANCE

    def reset(self) -> None:
        """Nothing has been added up."""
        self.count, self.weight, self._holds, self._exposed = 0, 0.0, [], []

    def weight_on(self, weight: float, device: torch.device) -> Tensor:
        """The weight as the scalar tensor that kernels read: filled there, which waits for nothing."""
        tensor = self._weights.get((weight, device))
        if tensor is None:
            dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # which others may not have
            tensor = torch.full((), weight, dtype=dtype, device=device)
            if captures.is_capturing(device):
                return tensor  # the graph's own, which holds nothing before a replay
            self._weights[weight, device] = tensor
            if len(self._weights) > _WEIGHTS:
                self._weights.popitem(last=False)
        captures.keep_if_captured(tensor, device)
        return tensor

    def add(self, ascent: Ascent, params: list[Tensor], grads: list[Tensor | None], weight: float) -> None:
        """``w = backup; accumulator += weight g`` for every parameter with a gradient; the other perturbed ones are restored.

        If anything is thrown, some accumulators may hold this micro-batch and others not: the step is to be given up.
        """
        adding = self._adding(ascent, params, grads)
        checked = [part.tensors.checked(part.pick(grads)) for part in adding.parts]
        ascending = ascent.perturbed_parts()
        if adding.left_over:
            # First, and whole: an operation below clears the cell that it shares with tensors which it does not restore.
            for part in adding.left_over:
                part.tensors.restore_()
            for part in adding.parts:
                part.tensors.perturbed.fill_(1)
        for part, chosen in zip(adding.parts, checked, strict=True):
            holds = part.pick(self._holds) if self._holds else []
            if any(holds) and not all(holds):
                for accumulator, holding in zip(part.tensors.accumulators, holds, strict=True):
                    if not holding:
                        accumulator.zero_()
            part.tensors.restore_accumulate_(chosen, self.weight_on(weight, part.device), fresh=not any(holds))
            if self._are_known and part.tensors.accumulators:
                increment_version(part.tensors.accumulators)
        for part in ascending:
            part.tensors.perturbed.zero_()
        if self._holds:
            self._holds = [held or has for held, has in zip(self._holds, adding.present, strict=True)]
        else:
            self._holds = adding.present
        self.count += 1
        self.weight += weight

    def covers(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether exactly the parameters that hold something have a gradient: then the last pass can do the last addition."""
        return self._holds == list(map(is_not, grads, repeat(None)))

    def accumulators(self, params: list[Tensor]) -> list[Tensor | None]:
        """The sums, None where no micro-batch had a gradient."""
        if self._sums is None or self._sums[0] != self._holds:
            holding = [param for param, holds in zip(params, self._holds, strict=True) if holds]
            self._refuse_new_memory(holding)
            views = iter(self._buffers.views(holding))
            self._sums = list(self._holds), [next(views) if holds else None for holds in self._holds]
        return self._sums[1]

    # ---- as gradients --------------------------------------------------------------------------------------------------------

    def expose(self, params: list[Tensor]) -> None:
        """Makes the sums the parameters' ``.grad``, in the parameters' dtype: for base optimizers, clipping, scalers, logs.

        Of fp32 and fp64 parameters it is the accumulators themselves, which the next step overwrites: autograd is told then.
        """
        sums = self.accumulators(params)
        self._are_known = True
        for param, total in zip(params, sums, strict=True):
            param.grad = total if total is None or total.dtype == param.dtype else total.to(param.dtype)
        self._exposed = [param.grad for param in params]

    def gradients(self, params: list[Tensor]) -> list[Tensor | None]:
        """The step's gradients: what ``.grad`` holds, or, element by element, the sum that it was rounded from where it still
        holds that."""
        grads = [param.grad for param in params]
        if len(self._exposed) != len(params):
            return grads
        return [
            grad if grad is None or total is None or grad is not seen or grad.dtype not in HALVES else unrounded_(grad, total)
            for grad, seen, total in zip(grads, self._exposed, self.accumulators(params), strict=True)
        ]

    # ---- sets ----------------------------------------------------------------------------------------------------------------

    def _adding(self, ascent: Ascent, params: list[Tensor], grads: list[Tensor | None]) -> _Adding:
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            if self._holds:
                raise RuntimeError(
                    "micro-batches: expected the same parameters throughout a step, got others in the groups than the "
                    "micro-batches before had: add and remove parameters between steps."
                )
            self._known.clear()
            self._params = list(params)
            self._buffers.keep(params)
        complete = all(map(is_not, grads, repeat(None)))
        perturbed = tuple(part.serial for part in ascent.perturbed_parts())
        key = (perturbed, None if complete else tuple(grad is None for grad in grads))
        adding = self._known.get(key)
        if adding is None or not all(part.tensors.is_current() for part in adding.parts):
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._sums = None
            adding = self._known[key] = self._build(ascent, params, grads)
        return adding

    def _build(self, ascent: Ascent, params: list[Tensor], grads: list[Tensor | None]) -> _Adding:
        present = [index for index, grad in enumerate(grads) if grad is not None]
        if self._holds:
            self._refuse_new_memory([param for param, holds in zip(params, self._holds, strict=True) if holds])
        # All at once, so that they share a buffer.
        sums = dict(zip(present, self._buffers.views([params[index] for index in present]), strict=True))
        parts = []
        for (_, backend), chosen in partition(params, present, self._control.backend).items():
            members = [params[index] for index in chosen]
            backups, cell = ascent.restoring(members)
            tensors = TensorSet(
                members, backups, backend=backend, accumulators=[sums[index] for index in chosen], perturbed=cell
            )
            parts.append(Part(tensors, chosen, len(params)))
        adding = {id(params[index]) for index in present}
        left_over = [part for part in ascent.perturbed_parts() if not adding.issuperset(map(id, part.tensors.params))]
        return _Adding(parts, left_over, [grad is not None for grad in grads])

    def _refuse_new_memory(self, holding: list[Tensor]) -> None:
        """What was added up lies in the arrangement that the parameters had: in another it would have to be allocated anew."""
        if not self._buffers.has_all(holding):
            raise RuntimeError(
                "micro-batches: expected parameters of one dtype, device and memory format throughout a step, got some "
                "converted between two micro-batches: convert the model between steps."
            )

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes

    def release(self) -> None:
        self.reset()
        self._known.clear()
        self._params, self._sums = [], None
        self._weights.clear()
        self._buffers.release()
