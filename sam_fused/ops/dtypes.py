"""The storage dtypes, once: which are supported and the code each has in the native library (``csrc/plan.h``)."""

from __future__ import annotations

import torch

CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

SUPPORTED: frozenset[torch.dtype] = frozenset(CODES)

HALVES: frozenset[torch.dtype] = frozenset((torch.bfloat16, torch.float16))

SUPPORTED_NAMES = "float32, float64, bfloat16 or float16"


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values stored as ``dtype`` are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
