"""A backend called "emulated": the sources of the CUDA library, compiled for the CPU over fibers, behind the same two doors.

"Device memory" is the CPU's, so CPU tensors go through the library's own host code (rows, tables, argument blocks, launches)
and its kernels, and every test of the operations can ask for this backend.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from build_native import TORCH_TARGET_VERSION
from sam_fused.ops import backends, prepared, schema
from tests.kernels.build_emulated import Build, Emulated

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NAME = "emulated"
SOURCES = [
    CSRC / "operands.cpp",
    CSRC / "cuda" / "ops.cpp",
    *sorted((CSRC / "cuda").glob("*.cu")),
    Path(__file__).with_name("emulated_registration.cpp"),
]

# Two warps: the smallest block in which everything happens that happens in a large one.
THREADS = 64

# A table of 37 tensors, 16 hyper-parameters and 53 words a launch: lists of a usual length overflow them.
SMALL_ARGUMENTS = "-DSAM_FUSED_SMALL_ARGUMENTS"

# "full" in this variable: the sizes that users get.
SIZES_VARIABLE = "SAM_FUSED_EMULATED_ARGUMENTS"


def is_sanitized() -> bool:
    """Whether this process was started with the sanitizers' runtimes (``build_emulated.sanitizer_environment``)."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def has_small_arguments() -> bool:
    return os.environ.get(SIZES_VARIABLE) != "full"


def build(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    flags = [
        f"-I{CSRC}",
        f"-I{ROOT}",
        *(f"-isystem{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-DUSE_CUDA",
        "-Wno-unknown-pragmas",  # unroll, which is for nvcc
        "-Wl,--no-as-needed",
        f"-L{torch_folder / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
        *([SMALL_ARGUMENTS] if has_small_arguments() else []),
    ]
    return Build(folder, NAME, SOURCES, sanitize=is_sanitized(), flags=flags).finish()


def built_once() -> Path:
    """The library, compiled when its sources have changed; kept beside the other things that tools leave in ``.dev``."""
    digest = hashlib.sha256(f"{torch.__version__} {is_sanitized()} {has_small_arguments()}".encode())
    for path in sorted([*CSRC.rglob("*"), *Path(__file__).parent.rglob("*.[hpc]*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    folder = ROOT / ".dev" / f"emulated-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several processes of one run of the tests ask at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / f"{NAME}.so"
        return library if library.exists() else build(folder)


class EmulatedDoor:
    """``ops.door.Door``, on "device" tables in CPU memory."""

    def table(self, rows: torch.Tensor, device: torch.device) -> Any:
        return torch.ops.sam_fused.emulated_device_table(rows, torch.empty(0, dtype=torch.int64, device=device))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.sam_fused, f"emulated_prepared_{name}")


_library: torch.library.Library | None = None


def install(path: Path) -> Emulated:
    """Makes the built library a backend of this process; returns what tests set about launches."""
    global _library
    if _library is None:
        _library = torch.library.Library("sam_fused", "FRAGMENT")
        for op in schema.OPS.values():
            _library.define(f"{op.name}.{NAME}{op.signature}")
            torch.library.register_fake(f"sam_fused::{op.name}.{NAME}", op.fake, lib=_library)
        for name, signature in schema.PREPARED.items():
            if name.startswith("prepared_") or name == "device_table":
                _library.define(f"emulated_{name}{signature}")
        schema.BACKENDS = (*schema.BACKENDS, NAME)  # type: ignore[assignment]
        backends.COMPILED[NAME] = lambda device: None
        prepared.DOORS[NAME] = EmulatedDoor()  # type: ignore[assignment]
    emulated = Emulated(path)
    emulated.set_threads_per_block(THREADS)
    return emulated
