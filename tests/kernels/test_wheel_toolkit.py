"""Builds with toolkits that are not the machine's own, against a torch with CUDA: nvcc out of packages, and none at all."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.kernels.wheels import build_wheel, machine_toolkit, run
from tests.package.checkouts import copy_checkout
from tests.package.toolkits import make_compiler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path / "checkout")


def sentence(printed):
    """The one line that sam_fused itself contributes to a failed build."""
    assert isinstance(printed, str), "expected the build to fail"
    assert "Traceback" not in printed, printed
    lines = {line.strip() for line in printed.splitlines() if line.strip().startswith("sam_fused: ")}
    assert len(lines) == 1, printed
    return lines.pop()


def path_without_nvcc():
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())


def test_without_nvcc_the_sentence_names_packages_and_the_build_finds_the_nvcc_in_them(cuda_python, checkout, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = sentence(build_wheel(cuda_python, checkout, tmp_path / "none", SAM_FUSED_BUILD="cuda", CUDA_HOME=str(empty)))
    assert f"found none in CUDA_HOME={empty}" in said
    command = shlex.split(re.search(r"`(pip install [^`]*nvcc[^`]*)`", said).group(1))

    packages = tmp_path / "packages"
    status, printed = run(cuda_python, "-m", *command, "--quiet", "--target", packages, cwd=tmp_path)
    if status != 0 and ("No matching distribution" in printed or "connection" in printed):
        pytest.skip("pip could not fetch the packages with nvcc: no package index in reach")
    assert status == 0, printed
    variables = {"PATH": path_without_nvcc(), "PYTHONPATH": str(packages), "TORCH_CUDA_ARCH_LIST": "9.0"}
    wheel = build_wheel(cuda_python, checkout, tmp_path / "wheels", SAM_FUSED_BUILD="cuda", **variables)
    assert not isinstance(wheel, str), wheel[-5000:]
    assert re.search(rf"{re.escape(str(packages))}/nvidia/cu\d+/bin/nvcc .*-c ", wheel.printed)
    assert wheel.record()["cuda"]["architectures"] == ["9.0"]

    installed = wheel.unpack(cuda_python, tmp_path / "installed")
    program = "import json; from sam_fused.ops import native; s = native.cuda_status(); print(json.dumps([s.loaded, s.reason]))"
    status, printed = run(cuda_python, "-c", program, cwd=installed, PYTHONPATH=str(installed))
    assert status == 0, printed
    assert json.loads(printed.splitlines()[-1]) == [True, None]


def test_a_host_compiler_that_nvcc_refuses_is_said_before_anything_is_compiled(cuda_python, checkout, tmp_path):
    compiler = make_compiler(tmp_path / "g++-99", 99)
    variables = {"CXX": str(compiler), **machine_toolkit()}
    said = sentence(build_wheel(cuda_python, checkout, tmp_path / "wheels", SAM_FUSED_BUILD="cuda", **variables))
    assert "SAM_FUSED_BUILD=cuda: expected nvcc" in said
    assert str(compiler) in said and "unsupported GNU version" in said and "in CXX" in said
    assert not list((checkout / "build").glob("objects-*"))
