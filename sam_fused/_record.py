"""Reads what the build wrote down about itself: pip hides what a build prints, so the reason is kept in the package."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("_build_record.json")
INSTALL = "`pip install --no-build-isolation .`"


@dataclass(frozen=True)
class BuildRecord:
    """The outcome of the last build of this copy of the package (written by `build_native.py`)."""

    mode: str
    """What `SAM_FUSED_BUILD` asked for: auto, cpu, cuda or none; "unbuilt" where no build ever ran."""
    native_cpu: bool
    """Whether the native CPU kernels were built."""
    reason: str | None
    """Why there are none, with the remedy: a clause without a full stop. None where there are."""
    torch: str | None
    """The torch that the kernels were built against."""
    compiler: str | None
    """The first line that the compiler says about its version."""
    version: str | None
    """The version of the package that was built."""
    native_cuda: bool = False
    """Whether the native CUDA kernels were built."""
    cuda_reason: str | None = None
    """Why there are none, with the remedy: a clause without a full stop. None where there are."""
    nvcc: str | None = None
    """The version of the nvcc that the build found and accepted."""
    torch_cuda: str | None = None
    """The CUDA of the torch that the kernels were built against."""
    architectures: tuple[str, ...] = ()
    """The capabilities that the CUDA kernels were compiled for, with +PTX where later cards can compile them too."""
    architectures_left_out: tuple[str, ...] = ()
    """What `TORCH_CUDA_ARCH_LIST` named and the kernels are too new for."""


def build_record(path: Path = PATH) -> BuildRecord:
    """The build record of this copy of the package.

    Never raises: a missing or unreadable record is itself a reason for having no native kernels.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        if _is_installed_elsewhere(path.parent):
            return _without(
                f"{path.parent} is a source tree that was never built, and hides the sam_fused that is installed; start Python "
                "in another folder, or run `make build` in this one"
            )
        return _without(f"not installed: running from a source tree that was never built; run {INSTALL} there, or `make setup`")
    try:
        fields = json.loads(text)
        return BuildRecord(
            mode=str(fields["mode"]),
            native_cpu=bool(fields["native"]["cpu"]),
            reason=fields["reason"],
            torch=fields["torch"],
            compiler=fields["compiler"],
            version=fields["version"],
            **_cuda_part(fields),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return _without(f"expected a build record in {path.name}, found something unreadable; build again with {INSTALL}")


def _cuda_part(fields: dict[str, Any]) -> dict[str, Any]:
    """What the record says about CUDA; records of releases before there were CUDA kernels say nothing."""
    if "cuda" not in fields:
        return {"cuda_reason": f"the build is from before there were CUDA kernels; build again with {INSTALL}"}
    cuda = fields["cuda"]
    return {
        "native_cuda": bool(fields["native"]["cuda"]),
        "cuda_reason": cuda["reason"],
        "nvcc": cuda["toolkit"],
        "torch_cuda": cuda["torch_cuda"],
        "architectures": tuple(cuda["architectures"]),
        "architectures_left_out": tuple(cuda["left_out"]),
    }


def _is_installed_elsewhere(package: Path) -> bool:
    # All of them: the first one found may be the egg-info that a build left in the source tree itself.
    places = (Path(str(found.locate_file("sam_fused"))) for found in importlib.metadata.distributions(name="sam_fused"))
    return any(place.is_dir() and place.resolve() != package.resolve() for place in places)


def _without(reason: str) -> BuildRecord:
    return BuildRecord("unbuilt", native_cpu=False, reason=reason, torch=None, compiler=None, version=None, cuda_reason=reason)
