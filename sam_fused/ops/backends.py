"""Which backend serves which device, and why. ``SAM_FUSED_BACKEND`` or ``backend=`` forces one."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import torch

from . import native, schema

_ENVIRONMENT = "SAM_FUSED_BACKEND"


def _why_not(backend: str, device: torch.device) -> str | None:
    """None if ``backend`` can serve ``device``, else the reason and the remedy."""
    if backend == "native":
        if device.type != "cpu":
            return f"the native library has no kernels for {device.type} yet, only for the CPU"
        return native.status().reason
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
    """The backend for ``device``: the forced one, else native if it serves the device, else foreach.

    Raises:
        ValueError: the forced name is no backend.
        RuntimeError: the forced backend cannot serve the device.
    """
    forced = forced or os.environ.get(_ENVIRONMENT) or None
    if forced is None:
        _say_once(device.type)
        return _automatic(device)
    check_name(forced)
    reason = _why_not(forced, device)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} cannot serve {device}: {reason}; leave backend= and {_ENVIRONMENT} out.")
    return forced


def _automatic(device: torch.device) -> str:
    return "native" if _why_not("native", device) is None else "foreach"


@cache
def _say_once(device_type: str) -> None:
    """Says, once in a process, that a device's fast backend is missing."""
    reason = _why_not("native", torch.device(device_type))
    if device_type == "cpu" and reason is not None:
        warnings.warn(f"sam_fused uses the slower 'foreach' backend on {device_type}: {reason}", RuntimeWarning, stacklevel=3)


def report() -> list[dict[str, Any]]:
    """For each device of this machine: the backend it will use, and why."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for device in devices:
        try:
            forced = os.environ.get(_ENVIRONMENT)
            backend = choose(device, forced) if forced else _automatic(device)
            why_not = _why_not("native", device)
            reason = f"forced by {_ENVIRONMENT}" if forced else why_not or "the native library covers it"
        except (RuntimeError, ValueError) as error:
            backend, reason = "none", str(error)
        rows.append({"device": str(device), "backend": backend, "reason": reason})
    return rows
