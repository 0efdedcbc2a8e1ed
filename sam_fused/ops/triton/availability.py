"""Whether Triton can serve a device. It compiles when a kernel is first launched, so only a launch can tell."""

from __future__ import annotations

import importlib.util
import os
import re

import torch

from .. import captures
from .transfer import by_value, may_wait

FIRST_VERSION, LAST_VERSION = (3, 6), (3, 9)

_found: dict[torch.device, str | None] = {}


def reason_not(device: torch.device) -> str | None:
    """None if Triton can serve ``device``, else why not and what to do, as a clause.

    The first question about a CUDA device launches one tiny kernel there, which compiles it, and waits for it; the answer is
    kept. Inside a graph capture neither is possible, so the answer is then a reason, and is not kept.
    """
    if str(device) == "cuda":  # without an index: the current one
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if device not in _found:
        reason = _without_launching(device)
        if reason is None and device.type == "cuda":
            with torch.cuda.device(device):
                if captures.is_capturing(device):
                    return "Triton was never tried on this device and cannot be during a graph capture; take one step before it"
                reason = _launched(device)
        _found[device] = reason
    return _found[device]


def _without_launching(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"Triton serves CUDA devices, not {device.type}"
    reason = _wrong_version()
    if reason is not None or device.type == "cpu":
        return reason
    if interpreted:
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU; unset it to run them on the GPU"
    if getattr(torch.version, "hip", None) is not None:
        return "these kernels are tested on NVIDIA's GPUs, and this torch is built for ROCm; use the foreach backend there"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver with nvidia-smi"
    return None


def _wrong_version() -> str | None:
    remedy = "pip install 'triton>={}.{},<{}.{}'".format(*FIRST_VERSION, LAST_VERSION[0], LAST_VERSION[1] + 1)
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; {remedy}"
    try:
        import triton

        found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    except Exception as error:
        return f"Triton cannot be imported ({_first_line(error)}); {remedy}"
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not FIRST_VERSION <= version <= LAST_VERSION:
        supported = "{}.{} to {}.{}".format(*FIRST_VERSION, *LAST_VERSION)
        return f"Triton is {triton.__version__}, expected {supported}; {remedy}"
    return None


# Words that show every half of a word, signs included.
_TRIED = (1, -1, 2**63 - 1, -(2**63), 2**40 + 7)


def _launched(device: torch.device) -> str | None:
    """The launch is an upload by value, so that its kernel is loaded before a capture needs it."""
    words = torch.tensor(_TRIED, dtype=torch.int64, device="cpu")
    try:
        with torch.cuda.device(device), may_wait(device):
            arrived = torch.equal(by_value(words, device).cpu(), words)
    except Exception as error:
        # Mostly the launcher that Triton compiles on its first launch, and says little about.
        return (
            f"Triton's first launch failed ({_first_line(error)}); it needs a C compiler (gcc or clang, or CC=...) and "
            "Python.h (python3-dev) at run time"
        )
    return None if arrived else "Triton's first launch wrote other words than expected; update the driver"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
