"""The C++ libraries, one for the CPU and one for CUDA: loading them, why they are missing, which cards they cover."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .rows import ROW_WORDS

CAPABILITIES = ("default", "avx2", "avx512")

# Capabilities of cards: from this one on they convert bfloat16.
FIRST_CARD = (8, 0)


@dataclass(frozen=True)
class NativeStatus:
    """Whether the CPU's library is loaded; if not, why, and what to do; if so, its instruction set."""

    loaded: bool
    reason: str | None
    capability: str | None


@dataclass(frozen=True)
class CudaStatus:
    """Whether the CUDA library is loaded; if not, why, and what to do; if so, what it was compiled for."""

    loaded: bool
    reason: str | None
    architectures: tuple[str, ...]


@lru_cache(maxsize=1)
def status() -> NativeStatus:
    """Loads the CPU's library on the first call and remembers how that went. Compiles nothing."""
    try:
        from sam_fused import _C  # type: ignore[attr-defined]  # noqa: F401  importing it registers the kernels
    except ImportError as error:
        from sam_fused._record import build_record

        recorded = build_record().reason
        cause = recorded or f"the built library could not be loaded ({error}); reinstall with the torch that is running"
        return NativeStatus(False, cause, None)
    try:
        rows = torch.ops.sam_fused.row_words()
    except (AttributeError, RuntimeError):  # a library of other sources, which registers something else
        rows = 0
    if rows != ROW_WORDS:
        return NativeStatus(
            False,
            f"the built library has rows of {rows} words, expected {ROW_WORDS}: rebuild it from these sources",
            None,
        )
    return NativeStatus(True, None, CAPABILITIES[torch.ops.sam_fused.cpu_capability()])


@lru_cache(maxsize=1)
def cuda_status() -> CudaStatus:
    """Loads the CUDA library on the first call and remembers how that went. Needs no card."""
    from sam_fused._record import build_record

    record = build_record()
    here = status()
    if not here.loaded:
        return CudaStatus(False, record.cuda_reason or here.reason, ())
    try:
        from sam_fused import _C_cuda  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        cause = record.cuda_reason or (
            f"the built CUDA library could not be loaded ({error}); reinstall with the torch that is running"
        )
        if torch.version.cuda is None:  # a wheel with both libraries: the CPU's has loaded, and is all that this torch can use
            cause = f"this torch is built for {_torch_is_for()}; to use CUDA, install a CUDA build of torch"
        return CudaStatus(False, cause, ())
    try:
        architectures = str(torch.ops.sam_fused.cuda_architectures())
    except (AttributeError, RuntimeError):
        return CudaStatus(False, "the built CUDA library is of other sources: rebuild it from these", ())
    return CudaStatus(True, None, tuple(re.split(r"[;, ]+", architectures.strip())))


def _torch_is_for() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"


def covers(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``architectures`` runs on a card: machine code does within its major version from its minor
    version on (``9.0a`` on its own card alone), PTX on every later card too."""
    for entry in architectures:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            continue
        compiled = (int(found[1]), int(found[2]))
        if compiled == capability:
            return True
        if found[3] != "a" and compiled[0] == capability[0] and compiled <= capability:
            return True
        if found[4] and not found[3] and compiled <= capability:
            return True
    return False


def uncovered(device: torch.device) -> str | None:
    """A library that is there and has no code for this card: why, and what to do. None otherwise."""
    cuda = cuda_status()
    if not cuda.loaded or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if covers(cuda.architectures, capability):
        return None
    card = f"{capability[0]}.{capability[1]}"
    remedy = f"reinstall on this machine or with TORCH_CUDA_ARCH_LIST={card}"
    if capability < FIRST_CARD:
        remedy = f"the CUDA kernels need {FIRST_CARD[0]}.{FIRST_CARD[1]} or later, nothing is to be done"
    return f"the CUDA library was built for {' '.join(cuda.architectures)} and {device} is {card}; {remedy}"


def reason_not(device: torch.device) -> str | None:
    """None if the libraries can serve ``device``, else the cause and the remedy."""
    if device.type == "cpu":
        return status().reason
    if device.type != "cuda":
        return f"the native library has kernels for the CPU and CUDA, not for {device.type}"
    if torch.version.cuda is None:
        return f"this torch is built for {_torch_is_for()}, not for CUDA; install a CUDA build of torch"
    if not cuda_status().loaded:
        return cuda_status().reason
    return uncovered(device)


class NativeDoor:
    """The libraries' ``Door``: the operators find the device by themselves."""

    def table(self, rows: Tensor, device: torch.device) -> Any:
        if device.type == "cpu":
            return None
        return torch.ops.sam_fused.device_table(rows, torch.empty(0, dtype=torch.int64, device=device))

    def grad_norm_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_grad_norm_(*arguments)

    def perturb_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_perturb_(*arguments)

    def restore_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_restore_(*arguments)

    def restore_accumulate_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_restore_accumulate_(*arguments)

    def restore_sgd_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_restore_sgd_(*arguments)

    def restore_adamw_(self, *arguments: Any) -> None:
        torch.ops.sam_fused.prepared_restore_adamw_(*arguments)


DOOR = NativeDoor()
