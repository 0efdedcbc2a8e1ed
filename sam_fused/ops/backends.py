"""Which backend serves which device, and why. ``SAM_FUSED_BACKEND`` or ``backend=`` forces one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import native, schema, triton

_ENVIRONMENT = "SAM_FUSED_BACKEND"

# Those with compiled kernels, the best first: each says why it cannot serve a device.
COMPILED: dict[str, Callable[[torch.device], str | None]] = {"native": native.reason_not, "triton": triton.reason_not}


def is_compiled(backend: str) -> bool:
    """Whether the backend has kernels of its own: they read blocks of memory, and run the last pass fused on every device."""
    return backend in COMPILED


def _why_not(backend: str, device: torch.device) -> str | None:
    """None if ``backend`` can serve ``device``, else the reason and the remedy."""
    if backend in COMPILED:
        return COMPILED[backend](device)
    if backend == "reference" and device.type not in ("cpu", "cuda"):
        return f"the reference computes in float64, which {device.type} may not have"
    return None


def available_backends(device: torch.device | str) -> dict[str, str | None]:
    """Every backend's name with None if it can serve ``device``, else the reason why it cannot."""
    device = torch.device(device)
    return {backend: _why_not(backend, device) for backend in schema.BACKENDS}


def check_name(forced: str | None) -> None:
    """Raises ValueError for a name that is no backend's; None is fine."""
    if forced is not None and forced not in schema.BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(schema.BACKENDS)}, got {forced!r}: pass one of these as backend= "
            f"or in {_ENVIRONMENT}, or leave both out."
        )


def choose(device: torch.device, forced: str | None = None) -> str:
    """The backend for ``device``: the forced one, else native if it serves the device, else triton on CUDA, else foreach.

    Raises:
        ValueError: the forced name is no backend.
        RuntimeError: the forced backend cannot serve the device.
    """
    forced = forced or os.environ.get(_ENVIRONMENT) or None
    if forced is None:
        backend = _automatic(device)
        _say_once(str(device), backend)
        return backend
    check_name(forced)
    reason = _why_not(forced, device)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} cannot serve {device}: {reason}; leave backend= and {_ENVIRONMENT} out.")
    return forced


def _automatic(device: torch.device) -> str:
    if native.reason_not(device) is None:
        return "native"
    # Elsewhere Triton runs under its interpreter at best, which is for tests.
    if device.type == "cuda" and triton.reason_not(device) is None:
        return "triton"
    return "foreach"


@cache
def _say_once(name: str, backend: str) -> None:
    """Says, once in a process for each device, that its fastest backend is missing. That Triton serves where nothing was built
    needs no saying: it is the same kernels."""
    device = torch.device(name)
    if backend == "foreach" and device.type in ("cpu", "cuda"):
        reasons = {name: reason for name in _candidates(device) if (reason := _why_not(name, device)) is not None}
        causes = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        message = f"sam_fused uses the slower 'foreach' backend on {name}: {causes}"
    elif backend == "triton" and native.uncovered(device) is not None:
        message = f"sam_fused uses its Triton kernels on {name}: {native.uncovered(device)}"
    else:
        return
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _candidates(device: torch.device) -> tuple[str, ...]:
    return ("native", "triton") if device.type == "cuda" else ("native",)


def report() -> list[dict[str, Any]]:
    """For each device of this machine: the backend it will use, and why."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    if torch.version.cuda and not torch.cuda.is_available():
        rows.append(
            {"device": "cuda", "backend": "none", "reason": "torch sees no CUDA device; check the driver with nvidia-smi"}
        )
    for device in devices:
        try:
            forced = os.environ.get(_ENVIRONMENT)
            backend = choose(device, forced) if forced else _automatic(device)
            reason = f"forced by {_ENVIRONMENT}" if forced else _why(backend, device)
        except (RuntimeError, ValueError) as error:
            backend, reason = "none", str(error)
        rows.append({"device": str(device), "backend": backend, "reason": reason})
    return sorted(rows, key=lambda row: row["device"])


def _why(backend: str, device: torch.device) -> str:
    if backend == "native":
        return "the native library covers it"
    reasons = [f"{name}: {reason}" for name in _candidates(device) if (reason := _why_not(name, device)) is not None]
    return reasons[0].split(": ", 1)[1] if len(reasons) == 1 else "; ".join(reasons)
