"""Copies of the checkout, throwaway environments, and the build backend.

An environment made here sees the torch, pip and setuptools of the interpreter that runs the tests (through a `.pth`
file), so nothing large is installed twice, while what is installed under test lies in the environment alone.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKED = ("csrc", "sam_fused", "setup.py", "build_native.py", "build_cuda.py", "pyproject.toml", "MANIFEST.in")
DOCUMENTS = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
PIP_INSTALL = ("-m", "pip", "install", "--no-deps", "--ignore-installed", "--disable-pip-version-check")


def clean_environment(**changes):
    """The tests' own settings must not leak into a build or an import under test."""
    dropped = (
        "PYTHONPATH",
        "PYTHONHOME",
        "SAM_FUSED_BUILD",
        "SAM_FUSED_BACKEND",
        "CUDA_HOME",
        "CUDA_PATH",
        "TORCH_CUDA_ARCH_LIST",
        "PIP_NO_BUILD_ISOLATION",
        "PIP_QUIET",
    )
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **changes}


def copy_checkout(target):
    """What a user clones, less what a developer's builds left in it."""
    left_behind = shutil.ignore_patterns("__pycache__", "*.so", "_build_record.json", "*.egg-info")
    target.mkdir()
    for name in (*PACKED, *DOCUMENTS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=left_behind)
        elif source.exists():
            shutil.copy2(source, target / name)
    return target


@dataclass
class Environment:
    python: Path
    site_packages: Path

    def run(self, *arguments, cwd, **variables):
        """Runs its Python and returns the exit status and everything it printed."""
        done = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=cwd,
            env=clean_environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def install(self, checkout, *options, isolated=False, **variables):
        flags = () if isolated else ("--no-build-isolation",)
        return self.run(*PIP_INSTALL, *flags, *options, ".", cwd=checkout, **variables)

    def info(self, *options):
        """What `python -m sam_fused.info` prints, run from where no checkout can be imported by accident."""
        status, printed = self.run("-m", "sam_fused.info", *options, cwd=self.python.parent)
        assert status == 0, printed
        return printed

    def facts(self):
        return json.loads(self.info("--json"))


def make_environment(folder):
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    shared = {str(Path(torch.__file__).parents[1]), *(path for path in sys.path if path.endswith("-packages"))}
    site_packages = Path(paths["purelib"])
    (site_packages / "shared.pth").write_text("\n".join(sorted(shared)) + "\n", encoding="utf-8")
    return Environment(python, site_packages)


def build(checkout, kind, target, python=sys.executable, **variables):
    """`build_wheel` or `build_sdist` of the build backend, as pip and `build` call it. Returns the file."""
    target.mkdir(exist_ok=True)
    program = f"import sys; from setuptools import build_meta; print(build_meta.{kind}(sys.argv[1]))"
    done = subprocess.run(
        [str(python), "-c", program, str(target)],
        cwd=checkout,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]
