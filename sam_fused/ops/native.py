"""The C++ library: loading it, why it is missing, and fitting tensors to what its kernels read.

The kernels see blocks of memory, not strides: element i of a block belongs to element i of every other list's. Tensors whose
memory is arranged differently from their parameter's are copied into the parameter's arrangement, and copied back if the
operation writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import schema
from .checks import is_dense, same_layout

CAPABILITIES = ("default", "avx2", "avx512")


@dataclass(frozen=True)
class NativeStatus:
    """Whether the C++ library is loaded; if not, why, and what to do; if so, its CPU instruction set."""

    loaded: bool
    reason: str | None
    capability: str | None


@lru_cache(maxsize=1)
def status() -> NativeStatus:
    """Loads the library on the first call and remembers how that went. Compiles nothing."""
    try:
        from sam_fused import _C  # type: ignore[attr-defined]  # noqa: F401  importing it registers the kernels
    except ImportError as error:
        from sam_fused._record import build_record

        recorded = build_record().reason
        cause = recorded or f"the built library could not be loaded ({error}); reinstall with the torch that is running"
        return NativeStatus(False, cause, None)
    try:
        rows = torch.ops.sam_fused.row_words()
    except (AttributeError, RuntimeError):  # a library of other sources, which registers something else
        rows = 0
    from .prepared import ROW_WORDS

    if rows != ROW_WORDS:
        return NativeStatus(
            False,
            f"the built library has rows of {rows} words, expected {ROW_WORDS}: rebuild it from these sources",
            None,
        )
    return NativeStatus(True, None, CAPABILITIES[torch.ops.sam_fused.cpu_capability()])


def _fit(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` itself if it lies in memory as ``param`` does (as a contiguous one if ``param`` has gaps), else a copy."""
    if is_dense(param):
        if same_layout(param, tensor):
            return tensor
        return torch.empty_strided(param.size(), param.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.contiguous()


def call(op: str, lists: dict[str, Sequence[Tensor]], reference: str, arguments: dict[str, Any]) -> Any:
    """``torch.ops.sam_fused.<op>.native`` over lists fitted to ``lists[reference]``; writes back what was copied."""
    params = lists[reference]
    fitted: dict[str, list[Tensor]] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    mutates = schema.OPS[op].mutates
    for name, tensors in lists.items():
        if name == "steps":  # scalars, whatever their parameter's shape
            fitted[name] = list(tensors)
            continue
        fitted[name] = [_fit(t, p) if t.numel() == p.numel() else t for t, p in zip(tensors, params, strict=False)]
        if name in mutates:
            copies += [(t, f) for t, f in zip(tensors, fitted[name], strict=False) if f is not t]
    function: Callable[..., Any] = schema.overload(op, "native")
    result = function(**schema.OPS[op].complete({**fitted, **arguments}))
    for tensor, copy in copies:
        tensor.copy_(copy)
    return result
