"""Whether tensors are still what they were, asked for a whole list in one call.

The kernels are handed addresses, so a step asks for hundreds of tensors whether each still has the type, dtype, device, shape
and strides that its address was looked up for. In Python that is a call per tensor and property: for a small
model more than the arithmetic. torch compares all of them in one call for the guards of compiled code, and
looks at the dispatch keys too (lazy negation, missing memory, sparse layouts, dispatch modes). Where that class is missing or
says no, the properties are compared one by one: a "no" costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment,misc]

# Tensors whose memory is theirs alone, and means what their dtype and strides say.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


class Fingerprint:
    """The properties of a list of tensors, as they were when last found acceptable."""

    def __init__(self) -> None:
        self._check: Callable[..., bool] | None = None
        self._count = -1

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Remembers these tensors' properties, and none of the tensors."""
        self._check = None
        # Not of subclasses, which may hold anything inside.
        if TensorGuards is not None and tensors and PLAIN_TYPES.issuperset(map(type, tensors)):
            sizes, strides = [list(t.size()) for t in tensors], [list(t.stride()) for t in tensors]
            guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
            self._check, self._count = guards.check, len(tensors)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """True: every tensor has the properties that its predecessor had. False: they may differ."""
        return self._check is not None and len(tensors) == self._count and self._check(*tensors)
