"""Compiles what the Triton backend launches, for a card that is not there: the launches themselves, stopped before the driver.

So signature, specialisation and options are those of the run, whatever they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs kernels that are compiled: unset TRITON_INTERPRET", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs Triton")
JITFunction = triton.runtime.jit.JITFunction

CAPABILITIES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Card:
    """What Triton asks its driver about a card, as far as compiling goes."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device, so each card needs a number of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Kernel:
    """One kernel as it was compiled for one launch."""

    name: str
    constants: dict[str, Any]
    kernel: Any

    @cached_property
    def ptx(self) -> str:
        """The instructions, without the comments."""
        return re.sub(r"//.*", "", self.kernel.asm["ptx"])

    @property
    def ttgir(self) -> str:
        return self.kernel.asm["ttgir"]

    @cached_property
    def instructions(self) -> Counter[str]:
        """PTX instructions by name, with all their suffixes but the address space's window."""
        names = re.findall(r"^\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s", self.ptx, flags=re.MULTILINE)
        return Counter(name.replace("::cta", "") for name in names)

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))

    def _tool(self, name: str, *options: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.kernel.asm["cubin"])
            done = subprocess.run([TOOLS / name, *options, cubin], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL, ...: registers, and bytes."""
        line = re.search(rf"Function {self.name}:\s*\n(.*)", self._tool("cuobjdump", "--dump-resource-usage"))
        assert line is not None
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line[1])}

    @cached_property
    def sass(self) -> Counter[str]:
        """Machine instructions by name."""
        lines = self._tool("nvdisasm", "-c")
        return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", lines, flags=re.MULTILINE))

    def spills(self) -> bool:
        """Whether it keeps anything in local memory. Triton 3.6's and 3.9's put up to four words by."""
        allowed = 0 if triton.__version__.startswith("3.8.") else 16
        return self.resources["STACK"] > allowed or self.resources["LOCAL"] > 0 or self.count(r"(ld|st)\.local.*") > 0


@pytest.fixture
def compile_for(monkeypatch):
    """``compile_for(capability, run)``: the kernels that ``run()`` would launch on such a card."""
    kernels: list[Kernel] = []

    def without_launching(function, grid):
        def compile_only(*arguments, **options):
            kernel = function.warmup(*arguments, grid=grid, **options)
            kernels.append(Kernel(function.fn.__name__, options, kernel))

        return compile_only

    def compiled(capability, run) -> list[Kernel]:
        kernels.clear()
        monkeypatch.setattr(triton.runtime.driver, "_active", Card(capability))
        run()
        return list(kernels)

    monkeypatch.setattr(JITFunction, "__getitem__", without_launching)
    return compiled


def fresh_caches(function: Any) -> None:
    """Forgets what was compiled in this process."""
    function.device_caches.clear()


def empty_like(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros_like(tensor, dtype=dtype) for tensor in tensors]
