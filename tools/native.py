"""Builds the native libraries in place, when something it is made of has changed since the last time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from tools.environment import ROOT, VENV, CannotSetUp, Environment, probe

PACKAGE = ROOT / "sam_fused"
RECORD = PACKAGE / "_build_record.json"
LIBRARIES = ("_C.*", "_C_cuda.*")
# What changes a build from outside, beside nvcc's own NVCC_*.
VARIABLES = ("SAM_FUSED_BUILD", "CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")


def ensure_built(environment: Environment) -> None:
    """Builds unless the stamp of the last build still fits the sources, the torch and the files it left."""
    # The stamp lives and dies with the environment that the build was made for.
    stamp = (VENV if environment.owned else ROOT / ".dev") / "sam_fused-build.json"
    fingerprint = _fingerprint(environment)
    if _read(stamp) == {"made_of": fingerprint, "left": _left()} and RECORD.exists():
        return
    if environment.owned:
        _register(environment)
    print("building the native libraries in place (half a minute, and up to three with CUDA)", flush=True)
    # build_ext and not pip, so that the compiler's messages can be shown where it fails.
    status, messages = environment.capture("setup.py", "build_ext", "--inplace")
    if status != 0:
        print(messages, file=sys.stderr)
        raise CannotSetUp("expected the package to build in place, but it failed; see the messages above")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    cuda = record["cuda"]
    tried = {"cpu": (record["compiler"], record["reason"]), "cuda": (cuda["toolkit"], cuda["reason"])}
    for device, (compiler, reason) in tried.items():
        print(f"{device} kernels: " + (f"built with {compiler}" if record["native"][device] else f"none: {reason}"), flush=True)
        if compiler is not None and not record["native"][device]:
            # A user's install goes on without kernels; here it would let every test of them be skipped unnoticed.
            print(messages, file=sys.stderr)
            raise CannotSetUp(
                "expected csrc/ to compile, but the compiler failed; see its messages above, mend the sources or the "
                "toolchain, or set SAM_FUSED_BUILD=none to go on without kernels"
            )
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps({"made_of": fingerprint, "left": _left()}), encoding="utf-8")


def _register(environment: Environment) -> None:
    """Makes `.venv` import the checkout from anywhere, once. What is native about it is built apart."""
    if not probe(environment.python, ["sam_fused"]).missing:
        return
    command = ["-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "-e", "."]
    status, messages = environment.capture(*command, SAM_FUSED_BUILD="none")
    if status != 0:
        print(messages, file=sys.stderr)
        raise CannotSetUp("expected pip to install the checkout editable, but it failed; see the messages above")


def _fingerprint(environment: Environment) -> str:
    digest = hashlib.sha256()
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    for path in [*sources, *(ROOT / name for name in ("setup.py", "build_native.py", "build_cuda.py", "pyproject.toml"))]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for setting in (str(environment.python), environment.torch, str(shutil.which("nvcc"))):
        digest.update(setting.encode() + b"\0")
    for variable in (*VARIABLES, *sorted(name for name in os.environ if name.startswith("NVCC_"))):
        digest.update(f"{variable}={os.environ.get(variable, '')}".encode() + b"\0")
    return digest.hexdigest()


def _left() -> dict[str, list[int]]:
    """What a build leaves in the tree. Somebody else's later build changes it, and then the stamp is no longer true."""
    files = [path for pattern in (*LIBRARIES, RECORD.name) for path in PACKAGE.glob(pattern)]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def clean() -> None:
    """Removes what builds, tests and linters leave behind. The virtual environments stay."""
    folders = ["build", "dist", ".dev", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".benchmarks"]
    for folder in [*(ROOT / name for name in folders), *ROOT.glob("*.egg-info")]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("sam_fused", "tests", "benchmarks", "examples", "tools"):
        for cache in (ROOT / name).rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)
    for path in [path for pattern in (*LIBRARIES, RECORD.name) for path in PACKAGE.glob(pattern)]:
        path.unlink()
