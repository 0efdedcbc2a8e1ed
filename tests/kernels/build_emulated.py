"""Compiles CUDA sources for the CPU: g++ with the emulation's ``<cuda_runtime.h>`` in place of the toolkit's.

The kernels then run over fibers, one block after another (``emulation/cuda_runtime.h``). A library compiled with the
sanitizers only loads into a process that started with their runtimes: ``run_sanitized`` starts such a Python.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_native import COMPILE_FLAGS

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"

# What the threads of a block and the blocks of a grid can be run in; a right kernel gives the same bits in each.
ORDERS = ("ascending", "descending", "random")

FLAGS = [
    *COMPILE_FLAGS,
    "-O1",
    "-g1",  # line numbers in what the sanitizers report
    "-fPIC",
    "-fno-strict-aliasing",  # 16-byte packs are read where floats were written
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DSAM_FUSED_EMULATED",
    f"-I{EMULATION}",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler():
    """The C++ compiler's command; skips the test where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs a C++ compiler, found nothing called {command[0]!r}")
    return command


class Build:
    """Starts to compile ``sources`` (.cu or .cpp) into ``folder``/``name``.so; ``finish`` waits, links and returns its path.

    Each source becomes an object named after it, so two may not share a stem. ``flags`` come last: include paths, macros.
    """

    def __init__(self, folder, name, sources, *, sanitize=False, flags=()):
        self.library, self._command = folder / f"{name}.so", compiler()
        self._flags = [*FLAGS, *(SANITIZE if sanitize else ()), *flags]
        self._running = []
        for source in map(Path, sources):
            target = folder / f"{name}-{source.stem}.o"
            command = [*self._command, *self._flags, "-x", "c++", "-c", str(source), "-o", str(target)]
            self._running.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))

    def finish(self):
        for target, process in self._running:
            _, errors = process.communicate()
            assert process.returncode == 0, f"{target.name} does not compile:\n{errors}"
        objects = [str(target) for target, _ in self._running]
        subprocess.run([*self._command, *self._flags, "-shared", *objects, "-o", str(self.library)], check=True)
        return self.library


class Emulated:
    """A library of emulated kernels: its functions, and what tests set about launches."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.sam_emulation_message.restype = ctypes.c_char_p
        self.library.sam_emulation_launches.restype = ctypes.c_uint64

    def __getattr__(self, name):
        return getattr(self.library, name)

    def set_orders(self, threads="ascending", blocks="ascending", seed=0):
        """For the launches to come; ``seed`` and how many launches ran since then make the random ones."""
        orders = (ORDERS.index(threads), ORDERS.index(blocks), ctypes.c_uint64(seed))
        self.library.sam_emulation_set_orders(*orders)

    def set_threads_per_block(self, threads):
        """What ``sam_emulation::threads_per_block`` gives; 0: what the source asks for."""
        self.library.sam_emulation_set_threads_per_block(threads)

    def fail_next_launch(self, error, before=0):
        """After ``before`` launches that run, one does not and leaves the ``cudaError_t`` ``error``."""
        self.library.sam_emulation_fail_next_launch(error, before)

    @property
    def launches(self):
        """Launches that ran since the orders were set."""
        return self.library.sam_emulation_launches()

    @property
    def message(self):
        """What the last call through ``sam_emulation::caught`` threw; empty where it threw nothing."""
        return self.library.sam_emulation_message().decode()


def sanitizer_environment():
    """The environment in which a Python can load a sanitized library; skips the test where the compiler has no runtimes."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        asked = [*compiler(), f"-print-file-name={name}"]
        found = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
        if not found.is_absolute():
            pytest.skip(f"needs the sanitizers' runtimes, found no {name} beside the compiler")
        runtimes.append(str(found.resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's, at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that Python's buffers are guarded too
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def run_sanitized(code, *arguments):
    """``python -c code arguments...`` with the sanitizers' runtimes, from the checkout's root: the completed process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=sanitizer_environment(), cwd=ROOT, capture_output=True, text=True)
