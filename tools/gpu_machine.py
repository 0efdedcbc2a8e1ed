"""What a GPU run was made with: read from the machine, never typed in."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.environment import ROOT

# In a process of its own: a CUDA context in this one would be there during every step.
_PROBE = """
import json
from importlib import metadata
import torch
found = {"torch": torch.__version__, "cuda_runtime": torch.version.cuda, "devices": 0}
try:
    found["triton"] = metadata.version("triton")
except metadata.PackageNotFoundError:
    found["triton"] = None
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {
        "devices": torch.cuda.device_count(),
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
    }
print(json.dumps(found))
"""


def describe() -> dict[str, Any]:
    """The machine. `unusable` is None, or a clause that says why nothing can be run on its GPU."""
    found: dict[str, Any] = {
        "card": None,
        "driver": _driver(),
        "memory_bytes": None,
        "cuda_runtime": None,
        "torch": None,
        "triton": None,
        "nvcc": nvcc_version(),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": _is_dirty(),
        "unusable": None,
    }
    answer = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, cwd=ROOT)
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or ["nothing"])[-1]
        return {**found, "unusable": f"expected a torch that this Python can import, got {said}; repair it"}
    found |= json.loads(answer.stdout.splitlines()[-1])
    if not found["devices"]:
        found["unusable"] = (
            f"expected a CUDA device, torch {found['torch']} sees none; --rehearse goes through the steps without one"
        )
    return found


def _is_dirty() -> bool | None:
    """Whether the tree differs from its commit; None where it is no checkout."""
    status = _output("git", "status", "--porcelain")
    return None if status is None else bool(status)


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _in_toolkit(program: str) -> str | None:
    """The program on PATH, or in the toolkit that the variables name, or in the usual place."""
    on_path = shutil.which(program)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / part for home in homes if home for part in ("bin", "compute-sanitizer")]
    files = [folder / program for folder in folders]
    return on_path or next((str(file) for file in files if os.access(file, os.X_OK)), None)


def find_sanitizer() -> str | None:
    """`compute-sanitizer`: also beside the nvcc that is on PATH."""
    found = _in_toolkit("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent / "compute-sanitizer" if nvcc else None
    return found or (str(beside) if beside and os.access(beside, os.X_OK) else None)


def nvcc_version() -> str | None:
    """Such as 13.0.88."""
    nvcc = _in_toolkit("nvcc")
    said = _output(nvcc, "--version") if nvcc else None
    release = re.search(r"V(\d+\.\d+\.\d+)", said or "")
    return release.group(1) if release else None


def slug(card: str) -> str:
    """A card's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
