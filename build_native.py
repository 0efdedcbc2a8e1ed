"""Builds `sam_fused._C` and `sam_fused._C_cuda` where this machine can, and writes down why where it cannot.

`SAM_FUSED_BUILD` says what is wanted: `auto` (the default: whatever native kernels are possible, else the pure-Python
path), `cpu` (native CPU kernels or an error, and no others), `cuda` (CPU and CUDA kernels or an error), `none` (pure
Python). What the CUDA kernels need is checked in `build_cuda.py`.

The two are libraries of their own, so that the CPU kernels load where torch has no CUDA, and are built one after the
other, so that a failure of the second leaves the first.

Whether an extension can be built is known only after trying, long after setuptools has asked whether there is one. So
one is always announced, `BuildExt` drops it when it does not come about or adds the second, and `BdistWheel` chooses
the wheel's tag after the build. pip hides what a successful build prints, so the outcome goes into
`sam_fused/_build_record.json`, which `python -m sam_fused.info` and the first optimizer read.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    import setuptools

    raise SystemExit(
        f"sam_fused: expected setuptools 70.1 or later to build with, found {setuptools.__version__}; "
        'run `pip install "setuptools>=70.1"` first'
    ) from None

import build_cuda
from build_cuda import INSTALL, CannotBuild, shorten

ROOT = Path(__file__).resolve().parent
EXTENSION = "sam_fused._C"
CUDA_EXTENSION = "sam_fused._C_cuda"
RECORD = "_build_record.json"
MODES = ("auto", "cpu", "cuda", "none")

# The oldest torch whose stable ABI the kernels use. The library runs on this torch and every later one.
TORCH_FLOOR = (2, 11)
TORCH_TARGET_VERSION = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"
PYTHON_FLOOR = "0x030A0000"  # spelt as torch spells it: it defines the macro too, and two spellings would warn

COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-g0",
    "-ffp-contract=off",  # element.h names every fma; the compiler adding more would make bits differ by machine
    "-fno-math-errno",  # sqrt that may set errno is a call, and a loop with a call in it is not vectorised
    "-fno-trapping-math",  # nobody reads the floating-point flags; no result changes
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}{os.sep}=",  # error messages name csrc/..., not the folder of whoever built the wheel
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PYTHON_FLOOR}",
]


@dataclass
class CudaRecord:
    """The CUDA part of a record."""

    reason: str | None = None
    toolkit: str | None = None
    """The version of the nvcc that passed every check; None where the kernels were not tried."""
    torch_cuda: str | None = None
    architectures: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass
class Record:
    """What a build did. `sam_fused/_record.py` reads it back."""

    mode: str
    version: str
    native: dict[str, bool] = field(default_factory=lambda: {"cpu": False, "cuda": False})
    reason: str | None = None
    torch: str | None = None
    compiler: str | None = None
    cuda: CudaRecord = field(default_factory=CudaRecord)


def requested_mode() -> str:
    mode = os.environ.get("SAM_FUSED_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(
            f"sam_fused: SAM_FUSED_BUILD expected one of {', '.join(MODES)}, got {mode!r}; unset it or set it to one of these."
        )
    return mode


def _sources(*patterns: str) -> list[str]:
    # Relative to the root and with forward slashes, as setuptools demands of everything that goes into an sdist.
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def _arguments(name: str, *sources: str, **flags: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "sources": _sources(*sources),
        "depends": _sources("csrc/**/*.h", "csrc/**/*.inl"),
        "include_dirs": [str(ROOT / "csrc")],  # absolute: ninja compiles from another folder
        "extra_compile_args": flags,
        "py_limited_api": True,
    }


def cpu_arguments() -> dict[str, Any]:
    return _arguments(EXTENSION, "csrc/*.cpp", "csrc/cpu/*.cpp", cxx=COMPILE_FLAGS)


def cuda_arguments(plan: build_cuda.CudaPlan | None = None) -> dict[str, Any]:
    flags = [*COMPILE_FLAGS, *plan.definitions()] if plan else []
    sources = ("csrc/operands.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    return _arguments(CUDA_EXTENSION, *sources, cxx=flags, nvcc=plan.nvcc_flags(flags) if plan else [])


def placeholders() -> list[Extension]:
    """The extensions as announced, before anybody knows whether there is a torch to build them against."""
    return [Extension(**{**arguments, "extra_compile_args": []}) for arguments in (cpu_arguments(), cuda_arguments())]


def wheel_options() -> dict[str, str]:
    # setuptools refuses the limited API on a free-threaded Python; BuildExt says so in a sentence of its own.
    return {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}


def check_torch() -> str:
    """The version of the torch to build against."""
    floor = ".".join(map(str, TORCH_FLOOR))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise CannotBuild(f"torch could not be imported while building ({error}); repair it, then {INSTALL}") from None
        raise CannotBuild(
            f"expected torch>={floor} while building, found none, as under pip's build isolation; "
            f"install torch first, then {INSTALL}"
        ) from None
    except Exception as error:
        raise CannotBuild(
            f"torch could not be imported while building ({_one_line(error)}); repair it, then {INSTALL}"
        ) from None
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or tuple(map(int, found.groups())) < TORCH_FLOOR:
        raise CannotBuild(f"expected torch>={floor} while building, found {torch.__version__}; upgrade torch, then {INSTALL}")
    return str(torch.__version__)


def compiler_command() -> str:
    return os.environ.get("CXX", "").strip() or "c++"


def check_compiler() -> str:
    """The first line of `c++ --version`, for the record."""
    if os.name == "nt":
        raise CannotBuild("native kernels expect Linux or macOS, found Windows; nothing to do, the Python path serves it")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise CannotBuild(
            "native kernels expect a Python with the stable ABI, found a free-threaded one; "
            f"use a regular Python, then {INSTALL}"
        )
    command = shlex.split(compiler_command())
    if shutil.which(command[0]) is None:
        raise CannotBuild(
            f"expected a C++20 compiler (CXX, or c++ on PATH), found nothing called {command[0]!r}; "
            f"install g++ or clang++, then {INSTALL}"
        )
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        raise CannotBuild(
            "expected Python's C headers (Python.h), found none for this interpreter; "
            f"install them (python3-dev or python3-devel), then {INSTALL}"
        )
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    return (answer.splitlines() or [shlex.join(command)])[0]


def _one_line(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}", 200)


class BuildExt(build_ext):
    """Builds the extensions, or drops them from the distribution; either way the record is written beside them."""

    def run(self) -> None:
        record = Record(mode=requested_mode(), version=self.distribution.get_version())
        self._remove_stale("_C", "_C_cuda")
        built: list[Extension] = []
        try:
            if record.mode == "none":
                raise CannotBuild(f"SAM_FUSED_BUILD=none asked for pure Python; unset it, then {INSTALL}")
            record.torch = check_torch()
            record.compiler = check_compiler()
            plan = self._plan_cuda(record)
            built.append(self._compile_cpu(record))
            if plan is not None:
                built.extend(self._compile_cuda(record, plan))
        except CannotBuild as problem:
            if record.mode in ("cpu", "cuda"):
                raise SystemExit(f"sam_fused: SAM_FUSED_BUILD={record.mode}: {problem}.") from None
            record.reason = record.cuda.reason = str(problem)
            print(f"sam_fused: without native kernels: {record.reason}.", file=sys.stderr)
        # What was announced and not built is gone from here on: not copied, not looked for, not in the wheel's tag.
        self.distribution.ext_modules = built
        self.extensions = [announced for announced in self.extensions if announced.name in {made.name for made in built}]
        self._write(record)

    def _plan_cuda(self, record: Record) -> build_cuda.CudaPlan | None:
        """What to build the CUDA kernels with, or None with the reason in the record; raises where they are demanded."""
        try:
            if record.mode == "cpu":
                raise CannotBuild(f"SAM_FUSED_BUILD=cpu asked for CPU kernels alone; unset it, then {INSTALL}")
            plan = build_cuda.plan(compiler_command())
        except CannotBuild as problem:
            self._go_without_cuda(record, problem)
            return None
        record.cuda = CudaRecord(None, plan.toolkit.version, plan.torch_cuda, plan.architectures, plan.left_out)
        return plan

    def _compile_cpu(self, record: Record) -> Extension:
        def extension() -> Extension:
            from torch.utils.cpp_extension import CppExtension

            return CppExtension(**cpu_arguments())

        made = self._compile(record, extension, "cpu", record.compiler)
        record.native["cpu"] = True
        return made

    def _compile_cuda(self, record: Record, plan: build_cuda.CudaPlan) -> list[Extension]:
        """The CUDA library, or nothing: the CPU one, built before, stays if this fails."""

        def extension() -> Extension:
            from torch.utils import cpp_extension

            # It has looked for a toolkit by itself, in fewer places, and keeps what it found in this variable.
            cpp_extension.CUDA_HOME = str(plan.toolkit.home)
            made = cpp_extension.CUDAExtension(**cuda_arguments(plan))
            runtime = plan.runtime_library()
            if runtime is not None:
                made.libraries.remove("cudart")
                made.extra_link_args.append(runtime)
            return made

        try:
            made = self._compile(record, extension, "cuda", f"nvcc {plan.toolkit.version}, {record.compiler}")
        except CannotBuild as problem:
            self._remove_stale("_C_cuda")
            self._go_without_cuda(record, problem)
            return []
        record.native["cuda"] = True
        return [made]

    @staticmethod
    def _go_without_cuda(record: Record, problem: CannotBuild) -> None:
        if record.mode == "cuda":
            raise problem
        record.cuda.reason = str(problem)
        print(f"sam_fused: without CUDA kernels: {problem}.", file=sys.stderr)

    def _compile(self, record: Record, extension: Callable[[], Extension], device: str, compilers: str | None) -> Extension:
        try:
            # torch looks for ninja on PATH alone, and without an activated environment the environment's is not there.
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
            from torch.utils.cpp_extension import BuildExtension

            self.distribution.ext_modules = [extension()]
            command = BuildExtension(self.distribution)
            for option in ("build_lib", "inplace", "debug", "parallel", "editable_mode"):
                setattr(command, option, getattr(self, option))
            # One folder of objects for wheels, editable and in-place builds, so that ninja recompiles only what changed
            # (an editable build would otherwise use a temporary folder and start anew each time). One per library: they
            # share sources, compiled with other flags.
            base = self.get_finalized_command("build").build_base
            command.build_temp = os.path.join(base, f"objects-{sys.implementation.cache_tag}-torch{record.torch}-{device}")
            command.ensure_finalized()
            command.run()
            return self.distribution.ext_modules[0]
        except Exception as error:  # whatever went wrong in there, a user of `auto` still gets a package that works
            where = "above" if record.mode != "auto" else f"with `SAM_FUSED_BUILD={device} pip install --no-build-isolation .`"
            raise CannotBuild(
                f"expected the compiler to succeed, but it failed ({compilers}; {_one_line(error)}); see its messages {where}"
            ) from None

    def _package_dir(self) -> Path:
        return Path(self.get_ext_fullpath(EXTENSION)).parent  # the source tree's when in place, else the build's

    def _remove_stale(self, *libraries: str) -> None:
        # A library from an earlier build would be shipped in a pure wheel, or loaded against the record's word.
        # Removing, not overwriting: a process that has the old one mapped must not see its pages change.
        folder = self._package_dir()
        for library in libraries:
            for stale in (*folder.glob(f"{library}.*so"), *folder.glob(f"{library}.*pyd")):
                stale.unlink()
        (folder / RECORD).unlink(missing_ok=True)

    def _write(self, record: Record) -> None:
        folder = self._package_dir()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, "sam_fused", RECORD)]


class BdistWheel(bdist_wheel):
    """Builds first and chooses the tag afterwards: `cp310-abi3-*` with the extension, `py3-none-any` without."""

    def run(self) -> None:
        if not self.skip_build:
            # Everything in this folder goes into the wheel, also what an earlier version of the tree left there.
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
            self.run_command("build")
            self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()
