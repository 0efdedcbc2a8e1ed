"""`python -m benchmarks.host`: the host's work in one SAM step, counted where kernels cost next to nothing.

Parameters of one element on the CPU backend, one thread: what is left is Python, the checks of every address and gradient, and
the calls. On a GPU the same lines run, and launches in place of these kernels. Medians over steps whose gradients are new
tensors every time; writes ``benchmarks/results/published/host.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.report import write_json
from sam_fused import SAM

RESULTS = Path(__file__).parent / "results" / "published" / "host.json"
TENSORS = (120, 161, 512)
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}


def step_ms(tensors: int, base: str, steps: int) -> float:
    """The median of ``first_step`` + ``second_step``, in milliseconds."""
    params = [torch.nn.Parameter(torch.randn(1)) for _ in range(tensors)]
    optimizer_class, settings = BASES[base]
    optimizer = SAM(params, optimizer_class, rho=0.05, **settings)
    taken = []
    for _ in range(steps):
        seconds = 0.0
        for half in (optimizer.first_step, optimizer.second_step):
            for param in params:
                param.grad = torch.ones_like(param)
            started = time.perf_counter()
            half()
            seconds += time.perf_counter() - started
        taken.append(seconds)
    return 1e3 * statistics.median(taken[steps // 10 :])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description="The host's work in one SAM step.")
    parser.add_argument("--steps", type=int, default=300, help="per row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for tensors in TENSORS:
        for base in BASES:
            rows.append({"tensors": tensors, "base": base, "median_ms": step_ms(tensors, base, options.steps)})
            print(f"{tensors:4} tensors, {base:5}: {rows[-1]['median_ms']:.2f} ms")
    report = {"command": "python -m benchmarks.host", "machine": describe_machine(1), "steps": options.steps, "rows": rows}
    write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
