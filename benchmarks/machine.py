"""What the numbers were measured on: read from the machine, never typed in."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def _first_match(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _l3_bytes() -> int | None:
    """The last-level cache as the kernel states it, such as "32768K"."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _memory_bytes() -> int | None:
    total = _first_match("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _git(*arguments: str) -> str | None:
    """What git says about the folder that holds the benchmarks, or None where it is no checkout."""
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, cores, last-level cache, memory, system, versions, commit: what a reader needs to compare."""
    import sam_fused

    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "l3_bytes": _l3_bytes(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sam_fused": getattr(sam_fused, "__version__", None) or _version("sam_fused"),
        "pytorch_optimizer": _version("pytorch-optimizer"),
        "transformers": _version("transformers"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_modified": None if status is None else bool(status),
    }
