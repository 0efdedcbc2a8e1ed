"""The C++ of csrc that needs no torch, compiled once per session behind a C interface and called through ctypes."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from build_native import COMPILE_FLAGS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

FLAGS = [*COMPILE_FLAGS, "-fPIC", f"-I{CSRC}", "-Wall", "-Wextra", "-Werror"]
TABLES = [CSRC / "cpu" / f"kernels_{name}.cpp" for name in ("default", "avx2", "avx512")]


def _compiler():
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs a C++ compiler, found nothing called {command[0]!r}")
    return command


class _Build:
    """Objects compiled side by side, then linked when the library is asked for."""

    def __init__(self, folder, name, sources, *flags):
        self.library, self.command, self.running = folder / f"{name}.so", _compiler(), []
        for source in sources:
            target = folder / f"{name}-{source.stem}.o"
            command = [*self.command, *FLAGS, *flags, "-c", str(source), "-o", str(target)]
            self.running.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))

    def load(self):
        for _, process in self.running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        objects = [str(target) for target, _ in self.running]
        subprocess.run([*self.command, "-shared", *objects, "-o", str(self.library)], check=True)
        return ctypes.CDLL(str(self.library))


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    return {
        "plain": _Build(folder, "plain", [HERE / "kernels.cpp", *TABLES], "-DSAM_FUSED_NO_MULTIVERSION"),
        "kernels": _Build(folder, "kernels", [HERE / "kernels.cpp", *TABLES]),
        "plan_and_element": _Build(folder, "plan_and_element", [HERE / "plan_and_element.cpp"]),
    }


@pytest.fixture(scope="session")
def plan_and_element(builds):
    library = builds["plan_and_element"].load()
    library.plan_new.restype = ctypes.c_void_p
    for name in ("plan_tensors", "plan_chunks", "plan_elements", "plan_tensor_of", "plan_walk", "plan_constant", "row_offset"):
        getattr(library, name).restype = ctypes.c_int64
    library.row_dtypes_after.restype = ctypes.c_uint64
    return library


class Table:
    """One compilation of the kernels."""

    def __init__(self, library, pointer, name):
        self._library, self._pointer, self.name = library, ctypes.c_void_p(pointer), name

    def __getattr__(self, kernel):
        function = getattr(self._library, kernel)
        return lambda *arguments: function(self._pointer, *arguments)


def _load_tables(build, label):
    library = build.load()
    library.table.restype = ctypes.c_void_p
    library.table_name.restype = library.chosen_name.restype = ctypes.c_char_p
    tables = {}
    for which in range(3):
        pointer = library.table(which)
        if pointer:
            name = library.table_name(ctypes.c_void_p(pointer)).decode()
            tables[f"{label}{name}"] = Table(library, pointer, name)
    return library, tables


@pytest.fixture(scope="session")
def multiversion(builds):
    return _load_tables(builds["kernels"], "")


@pytest.fixture(scope="session")
def plain(builds):
    return _load_tables(builds["plain"], "plain ")


@pytest.fixture(scope="session")
def tables(multiversion, plain):
    """Every compilation that this machine can run: default, avx2, avx512, and the default without multiversioning."""
    return {**multiversion[1], **plain[1]}
