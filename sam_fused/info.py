"""`python -m sam_fused.info`: what was built, what each device here will use, and why. `--json` for programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sam_fused._record import BuildRecord, build_record
from sam_fused.ops import backends, native


def collect() -> dict[str, Any]:
    """Everything `main` prints, as plain data."""
    record = build_record()
    status, cuda = native.status(), native.cuda_status()
    return {
        "version": _version(record),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "build": asdict(record),
        "native": {"loaded": status.loaded, "capability": status.capability, "reason": status.reason},
        "native_cuda": {"loaded": cuda.loaded, "architectures": cuda.architectures, "reason": cuda.reason},
        "devices": backends.report(),
    }


def _version(record: BuildRecord) -> str:
    # The record comes first: it lies beside this very file, while the metadata found may be another copy's.
    if record.version is not None:
        return record.version
    try:
        return importlib.metadata.version("sam_fused")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def describe(facts: dict[str, Any]) -> list[str]:
    """The lines of the report."""
    build, library = facts["build"], facts["native"]
    lines = [
        f"sam_fused {facts['version']}, torch {facts['torch']}, Python {facts['python']}, "
        f"{facts['platform']}, {facts['threads']} threads",
    ]
    if build["native_cpu"]:
        lines.append(f"built: native CPU kernels, with {build['compiler']} against torch {build['torch']}")
    elif library["loaded"]:
        lines.append("built: by hand, without a build record; `make build` writes one")
    else:
        lines.append(f"built: no native kernels: {build['reason']}")
    if build["native_cpu"]:
        lines.append(_cuda_line(build))
    if library["loaded"]:
        lines.append(f"native library: loaded, CPU kernels compiled for {library['capability']}")
    elif build["native_cpu"]:
        lines.append(f"native library: built but not loaded: {library['reason']}")
    else:
        lines.append("native library: none")
    if facts["native_cuda"]["loaded"]:
        lines.append(f"native CUDA library: loaded, for {' '.join(facts['native_cuda']['architectures'])}")
    elif build["native_cuda"]:
        lines.append(f"native CUDA library: built but not loaded: {facts['native_cuda']['reason']}")
    lines.append("backends:")
    width = max((len(row["device"]) for row in facts["devices"]), default=0)
    lines.extend(f"  {row['device']:{width}}  {row['backend']}: {row['reason']}" for row in facts["devices"])
    return lines


def _cuda_line(build: dict[str, Any]) -> str:
    if not build["native_cuda"]:
        return f"built: no CUDA kernels: {build['cuda_reason']}"
    left_out = build["architectures_left_out"]
    too_old = f" (not for {' '.join(left_out)}, older than the kernels can serve)" if left_out else ""
    return (
        f"built: CUDA kernels for {' '.join(build['architectures'])}{too_old}, "
        f"with nvcc {build['nvcc']} against torch's CUDA {build['torch_cuda']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sam_fused.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(describe(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
