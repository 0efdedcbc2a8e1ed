"""Every operation a few times over small tensors, for ``compute-sanitizer`` to look on: memory, races of shared memory.

``python -m tests.gpu.sanitized_suite native`` runs a backend through both doors and a step of the optimizer, and compares with
the CPU's native kernels. ``--device cpu`` shows without a card that the suite itself is right. Each tensor has an allocation
of its own (``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, set by ``tools/gpu.py``), so that one past its end is past an allocation.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.gpu import problems
from tests.ops.cases import WIDEST, Entry
from tests.ops.runner import Lists, make_lists, run, takes

# A scalar, a vector's tail, nothing, two chunks of which the second has one element, something unaligned.
ENTRIES = (Entry(()), Entry((17,)), Entry((0,)), Entry((32769,)), Entry((513,), "offset"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def on(device: torch.device, lists: Lists, case: object) -> Lists:
    there = Lists(steps=[step.clone().to(device) for step in lists.steps])
    for role in takes(case):  # type: ignore[attr-defined]
        for tensor in lists.of(role):
            # One element before it keeps what is unaligned unaligned.
            offset = tensor.storage_offset()
            block = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)
            there.of(role).append(block[offset:].view(tensor.shape).copy_(tensor))
    return there


def operations(backend: str, device: torch.device) -> int:
    calls = 0
    for case in WIDEST:
        for door in (backend, f"prepared-{backend}"):
            if case.backup_exists and door != backend:
                continue
            for dtypes in ([DTYPES[0]], [DTYPES[2]], list(DTYPES)):
                lists = make_lists(ENTRIES, dtypes, case)
                there = on(device, lists, case)
                wanted = run(case, "native", lists)
                with device:
                    found = run(case, door, there)
                for role in (*takes(case), "steps"):
                    pairs = zip(there.of(role), lists.of(role), strict=True)
                    assert all(torch.equal(ours.cpu(), cpu) for ours, cpu in pairs), f"{case.name} {door} {dtypes}: {role}"
                if wanted is not None:
                    assert abs(float(found[0]) - float(wanted[0])) <= 1e-6 * float(wanted[0]), f"{case.name} {door}: norm"
                calls += 1
    return calls


def steps(backend: str, device: torch.device) -> int:
    for base in problems.BASES:
        problem = problems.Problem(base, backend, shapes=((32769,), (17,), ()), device=device)
        for form in problems.FORMS:
            problem.step(form)
        assert all(bool(tensor.isfinite().all()) for tensor in problem.state()), base
    return len(problems.BASES) * len(problems.FORMS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized_suite", description=__doc__)
    parser.add_argument("backend", choices=(*problems.BACKENDS, "foreach"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    calls, taken = operations(options.backend, device), steps(options.backend, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"sanitized suite, {options.backend} on {device}: {calls} operations and {taken} steps are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
