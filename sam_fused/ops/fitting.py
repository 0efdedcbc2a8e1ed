"""Fitting tensors to what compiled kernels read.

The kernels see blocks of memory, not strides: element i of a block belongs to element i of every other list's. Tensors whose
memory is arranged differently from their parameter's are copied into the parameter's arrangement, and copied back if the
operation writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import schema
from .checks import is_dense, same_layout


def _fit(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` itself if it lies in memory as ``param`` does (as a contiguous one if ``param`` has gaps), else a copy."""
    if is_dense(param):
        if same_layout(param, tensor):
            return tensor
        return torch.empty_strided(param.size(), param.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.contiguous()


def _check_steps(steps: Sequence[Tensor], device: torch.device) -> None:
    for index, step in enumerate(steps):
        if step.device != device:
            raise ValueError(
                f"steps[{index}]: expected a scalar on {device} as the parameters, got {step.device}: move it there, so that "
                "the kernel can read and advance it."
            )


def call(op: str, backend: str, lists: dict[str, Sequence[Tensor]], reference: str, arguments: dict[str, Any]) -> Any:
    """``torch.ops.sam_fused.<op>.<backend>`` over lists fitted to ``lists[reference]``; writes back what was copied."""
    params = lists[reference]
    fitted: dict[str, list[Tensor]] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    mutates = schema.OPS[op].mutates
    for name, tensors in lists.items():
        if name == "steps":  # scalars, whatever their parameter's shape
            _check_steps(tensors, params[0].device)
            fitted[name] = list(tensors)
            continue
        fitted[name] = [_fit(t, p) if t.numel() == p.numel() else t for t, p in zip(tensors, params, strict=False)]
        if name in mutates:
            copies += [(t, f) for t, f in zip(tensors, fitted[name], strict=False) if f is not t]
    function: Callable[..., Any] = schema.overload(op, backend)
    result = function(**schema.OPS[op].complete({**fitted, **arguments}))
    for tensor, copy in copies:
        tensor.copy_(copy)
    return result
