"""All operations once over lists that need chunks, blocks, tails and threads; a digest of every bit they leave behind.

Run as a program it prints one line per case: the compilations for different instruction sets are compared in processes of
their own, because a process chooses one when it starts.
"""

from __future__ import annotations

import hashlib
import sys

import torch

from sam_fused.ops import native
from tests.ops.cases import FITTING, LARGE, STORAGES, WIDEST, Case, Entry
from tests.ops.runner import Lists, make_lists, run, takes

# Mixed dtypes of one parameter: conversions in every loop.
_MIXED = tuple(Entry((size,)) for size in (1, 7, 513, 1030))


def digest(case: Case, lists: Lists, result: tuple[torch.Tensor, ...] | None) -> str:
    found = hashlib.sha256()
    written = [t for role in takes(case) for t in lists.of(role)]
    for tensor in (*written, *lists.steps, *(result or ())):
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        found.update(flat.view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def lists_for(case: Case, which: str) -> Lists:
    dtypes = [storage.dtype for storage in STORAGES]
    if which == "large":
        return make_lists(LARGE, dtypes, case, periodic=True)
    if which == "fitting":
        return make_lists(FITTING, dtypes[1:] + dtypes[:1], case)
    lists = make_lists(_MIXED, [dtypes[0], dtypes[2], dtypes[3]], case)
    lists.grads = [grad.to(dtypes[(index + 1) % 4]) for index, grad in enumerate(lists.grads)]
    return lists


def digests(runner: str = "native", which: tuple[str, ...] = ("large", "fitting", "mixed")) -> dict[str, str]:
    found = {}
    for case in WIDEST:
        for name in which:
            lists = lists_for(case, name)
            found[f"{case.name} {name}"] = digest(case, lists, run(case, runner, lists))
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print(native.status().capability)
    for key, value in digests().items():
        print(f"{key} {value}")
