"""The second door: what a backend offers that takes rows of addresses instead of lists of tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Door(Protocol):
    """The operations of ``functional`` on rows. Nothing here waits for a device; addresses were checked by the caller.

    ``rows`` is the table of ``ops/rows.py``, on the CPU; ``grads`` an int64 tensor on the CPU with one gradient address per
    row (0 where the tensor is empty); ``table`` whatever ``table()`` made of ``rows`` for the device, to be reused as long as
    the rows stay what they were; ``perturbed`` an int64 cell on the CPU, set to 1 by the call that moves the weights and to 0
    by the one that brings them back. ``weight`` is given if the rows have accumulators, and only then. Scalars are 0-dim fp32
    or fp64 tensors on the parameters' device, ``hyper`` a float64 table there or on the CPU.
    """

    def table(self, rows: Tensor, device: torch.device) -> Any:
        """The rows where kernels on ``device`` can read them; None where they read ``rows`` itself."""

    def grad_norm_(
        self,
        rows: Tensor,
        grads: Tensor,
        norm: Tensor,
        found_inf: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        overflows: Tensor | None,
        table: Any,
    ) -> None:
        """Writes the norm and the non-finite flag into the tensors given. ``overflows``, an int64 scalar on the parameters'
        device, becomes one more where the norm is not finite."""

    def perturb_(
        self,
        rows: Tensor,
        grads: Tensor,
        norm: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        backup_exists: bool,
        inv_scale: Tensor | None,
        table: Any,
    ) -> None: ...

    def restore_(self, rows: Tensor, perturbed: Tensor, table: Any) -> None: ...

    def restore_accumulate_(
        self, rows: Tensor, grads: Tensor, weight: Tensor, perturbed: Tensor, fresh: bool, table: Any
    ) -> None: ...

    def restore_sgd_(
        self,
        rows: Tensor,
        grads: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        table: Any,
    ) -> None:
        """On a device, ``first`` in the table becomes 0 with the step that was taken."""

    def restore_adamw_(
        self,
        rows: Tensor,
        grads: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        table: Any,
    ) -> None:
        """On a device, the step counts (role ``step``) live there and advance with the step that was taken."""
