"""The table that kernels read tensors from: one row of int64 per parameter, ``TensorRow`` in ``csrc/plan.h``.

A row holds ``numel, group, scaling, first, dtypes`` and then one address per role; ``dtypes`` has one byte per role, a code of
``ops/dtypes.py``. Element i of every role's block of memory is the same parameter element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .dtypes import CODES

COLUMNS = ("numel", "group", "scaling", "first", "dtypes")
ROLES = ("weight", "backup", "grad", "state0", "state1", "state2", "step", "accumulator")
ROW_WORDS = len(COLUMNS) + len(ROLES)
FIRST = COLUMNS.index("first")

# Elements that one piece of work has at most: a block of a GPU kernel, a chunk of a CPU loop (kChunk in csrc/plan.h).
CHUNK = 32768


def column_of(role: str) -> int:
    """The column that holds the addresses of ``role``."""
    return len(COLUMNS) + ROLES.index(role)


def build_rows(
    by_role: Mapping[str, Sequence[Tensor]],
    numels: Sequence[int],
    *,
    groups: Sequence[int] = (),
    scaling: Sequence[int] = (),
    first: Sequence[int] = (),
    grad_dtypes: Sequence[torch.dtype] = (),
) -> Tensor:
    """The table, on the CPU. Lists may be empty: then that role has no address. Sizes, devices and layouts were checked.

    ``grad_dtypes`` are those of gradients whose addresses come later, with every step.
    """
    rows = []
    for index, numel in enumerate(numels):
        dtypes, addresses = 0, [0] * len(ROLES)
        for role, tensors in by_role.items():
            if tensors:
                dtypes |= CODES[tensors[index].dtype] << (8 * ROLES.index(role))
                addresses[ROLES.index(role)] = tensors[index].data_ptr()
        if grad_dtypes:
            dtypes |= CODES[grad_dtypes[index]] << (8 * ROLES.index("grad"))
        dealt = (values[index] if values else 0 for values in (groups, scaling, first))
        rows.append([numel, *dealt, dtypes, *addresses])
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), ROW_WORDS)
