"""What is known of the gradients that lie on the parameters: which pass left them, and whether somebody has asked for them."""

from __future__ import annotations

import weakref
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor

from sam_fused.ops.functional import not_all_zero

_version_of = attrgetter("_version")


class GradientWatch:
    """Holds no gradient alive: what it remembers of one is a weak reference and a version.

    Attributes:
        were_read: whether somebody has asked for the parameter groups, as ``GradScaler.unscale_`` does, since the second pass's
            gradients are there.
    """

    def __init__(self) -> None:
        self.were_read = False
        self._left: list[weakref.ref[Tensor] | None] = []
        self._left_versions: list[int] = []
        self._first: list[weakref.ref[Tensor]] = []
        self._first_versions: list[int] = []

    # ---- after a step ------------------------------------------------------------------------------------------------

    def remember(self, grads: list[Tensor | None]) -> None:
        """A step has left these; the next one may clear them, and nothing is lost."""
        try:
            self._left = list(map(weakref.ref, grads))  # type: ignore[arg-type]
            self._left_versions = list(map(_version_of, grads))
        except TypeError:  # None has no weak reference
            self._left = [None if grad is None else weakref.ref(grad) for grad in grads]
            self._left_versions = [0 if grad is None else grad._version for grad in grads]

    def fresh(self, grads: list[Tensor | None]) -> list[Tensor]:
        """Those that no step has left, or that a backward has been added to since. Waits for devices only where the last
        step's gradients have been written, to see whether ``zero_grad(set_to_none=False)`` did."""
        if not any(map(is_not, grads, repeat(None))):
            return []
        known = [None if seen is None else seen() for seen in self._left] + [None] * len(grads)
        fresh = [grad for grad, seen in zip(grads, known, strict=False) if grad is not None and grad is not seen]
        if fresh:
            return fresh
        versions = zip(grads, self._left_versions, strict=False)
        return not_all_zero([grad for grad, version in versions if grad is not None and grad._version != version])

    # ---- between the passes ------------------------------------------------------------------------------------------

    def begin_second_pass(self, grads: list[Tensor | None]) -> None:
        """The weights are perturbed, and the first pass leaves these on the parameters."""
        self.were_read = False
        present = [grad for grad in grads if grad is not None]
        self._first = list(map(weakref.ref, present))
        self._first_versions = list(map(_version_of, present))

    def note_reader(self, param_groups: list[dict[str, Any]]) -> None:
        """Somebody asks for the groups. That counts once there is a gradient which the first pass has not left: what is
        unscaled before the second backward is not what the step is taken with."""
        if self.were_read:
            return
        pairs = zip(self._first, self._first_versions, strict=True)
        known = {id(grad): version for seen, version in pairs if (grad := seen()) is not None}
        present = [param.grad for group in param_groups for param in group["params"] if param.grad is not None]
        self.were_read = any(known.get(id(grad)) != grad._version for grad in present)
