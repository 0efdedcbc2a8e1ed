"""Which Python the development commands run with, and what has to be installed there first.

An interpreter that already imports a supported torch is used as it is: nobody's torch is replaced, and only missing
tools are added. Otherwise `.venv` is made, with the torch that pyproject.toml pins. Where that torch has no CUDA,
`.cuda-venv` is made beside it, for building the CUDA kernels and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pip carries the parser that 3.11 took into its library
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CUDA_VENV = ROOT / ".cuda-venv"

# Run in the interpreter in question. An import and not the metadata: a torch that does not load is none.
PROBE = """
import importlib.metadata, json, sys
try:
    import torch
    version, cuda = str(torch.__version__), torch.version.cuda
except Exception:
    version = cuda = None
missing = []
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps({"torch": version, "cuda": cuda, "missing": missing}))
"""


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


class CannotSetUp(Exception):
    """A development command cannot go on; the message is the whole sentence."""


@dataclass
class Environment:
    """An interpreter with a supported torch."""

    python: Path
    torch: str
    owned: bool
    """True for `.venv`, which these commands made and may change; False for an interpreter that was there before."""
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str) -> int:
        """Runs the interpreter in the repository's root and returns its exit status."""
        sys.stdout.flush()
        return subprocess.run([str(self.python), *arguments], cwd=ROOT, env={**os.environ, **self.variables}).returncode

    def capture(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """The same with the output kept back: whether it is worth showing is known only afterwards."""
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=ROOT,
            env={**os.environ, **self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return done.returncode, done.stdout


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(*extras: str) -> list[str]:
    """The requirements of the extras in pyproject.toml, with `sam_fused[...]` replaced by what it stands for."""
    listed: dict[str, list[str]] = project()["project"]["optional-dependencies"]
    found: list[str] = []
    for extra in extras:
        for requirement in listed[extra]:
            nested = re.fullmatch(r"sam_fused\[([\w,-]+)\]", requirement)
            if nested:
                found.extend(requirements(*nested.group(1).split(",")))
            elif _applies_here(requirement):
                found.append(requirement)
    return list(dict.fromkeys(found))


def _applies_here(requirement: str) -> bool:
    """Whether a requirement's marker, of which pyproject.toml has one kind, names this system."""
    marker = requirement.partition(";")[2].strip()
    return marker in ("", f"sys_platform == '{sys.platform}'")


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def is_supported(torch: str | None) -> bool:
    floor, ceiling = project()["tool"]["sam_fused"]["torch"]["supported"]
    return torch is not None and release(floor) <= release(torch) < release(ceiling)


@dataclass(frozen=True)
class Found:
    """What an interpreter has."""

    torch: str | None
    """The version of the torch that it imports."""
    cuda: str | None
    """The CUDA which that torch was built for."""
    missing: list[str]
    """Which of the wanted requirements it lacks."""


def probe(python: Path | str, wanted: list[str]) -> Found:
    names = [name_of(requirement) for requirement in wanted]
    answer = subprocess.run([str(python), "-c", PROBE, *names], capture_output=True, text=True)
    if answer.returncode != 0:
        raise CannotSetUp(f"expected {python} to be a working Python, got exit status {answer.returncode}; set PYTHON")
    facts = json.loads(answer.stdout.splitlines()[-1])
    missing = [requirement for requirement in wanted if name_of(requirement) in facts["missing"]]
    return Found(facts["torch"], facts["cuda"], missing)


def prepare(*extras: str) -> Environment:
    """The environment to work in, with the extras' requirements installed as far as that is possible."""
    wanted = requirements(*extras, "build")
    running_in_venv = Path(sys.prefix).resolve() == VENV.resolve()
    if not running_in_venv:
        found = probe(sys.executable, wanted)
        torch, missing = found.torch, found.missing
        if torch is not None and is_supported(torch):
            # The checkout is imported from where it is: nothing of ours is installed into somebody's interpreter.
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            borrowed = Environment(Path(sys.executable), torch, owned=False, variables={"PYTHONPATH": path})
            if missing and not _install(borrowed, missing, "--retries", "1"):
                names = ", ".join(map(name_of, missing))
                print(
                    f"tools.dev: expected {names} beside torch {torch}, found none and could not install them "
                    "(no package index in reach?); what needs them will be skipped or fail, install them by hand",
                    file=sys.stderr,
                )
            return borrowed
    return _prepare_venv(wanted)


def _prepare_venv(wanted: list[str]) -> Environment:
    environment = _venv_with_torch(VENV, project()["tool"]["sam_fused"]["torch"]["install"])
    if probe(environment.python, wanted).missing:
        # All of them at once: whoever runs `test` will run `lint` and `bench` too.
        missing = probe(environment.python, requirements("dev")).missing
        print(f"installing {', '.join(map(name_of, missing))}", flush=True)
        if not _install(environment, missing):
            raise CannotSetUp(f"expected pip to install {', '.join(missing)}, but it failed; see its messages above")
    return environment


def _venv_with_torch(folder: Path, version: str) -> Environment:
    """A virtual environment with a supported torch: the pinned version, unless another one is there already."""
    python, pin = python_of(folder), f"torch=={version}"
    if not python.exists():
        print(f"creating {folder.name}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode != 0:
            raise CannotSetUp(
                f"expected `{Path(sys.executable).name} -m venv` to make {folder.name}, but it failed; install your "
                "distribution's python3-venv, or set PYTHON to an interpreter that has torch"
            )
    environment = Environment(python, probe(python, []).torch or "", owned=True)
    if not is_supported(environment.torch):
        print(f"installing {pin} into {folder.name}", flush=True)
        if environment.run("-m", "pip", "install", "-q", "--disable-pip-version-check", pin) != 0:
            raise CannotSetUp(f"expected pip to install {pin} into {folder.name}, but it failed; see its messages above")
        torch = probe(python, []).torch
        if torch is None or not is_supported(torch):
            raise CannotSetUp(f"expected {pin} in {folder.name}, found {torch}; remove {folder.name} and try again")
        environment.torch = torch
    return environment


def prepare_cuda(environment: Environment) -> Path:
    """The interpreter to build the CUDA kernels with: the environment's, or that of `.cuda-venv`."""
    if probe(environment.python, []).cuda is not None:
        return environment.python
    version = project()["tool"]["sam_fused"]["cuda"]["install"]
    building = _venv_with_torch(CUDA_VENV, version)
    found = probe(building.python, requirements("build"))
    if found.cuda is None:
        raise CannotSetUp(
            f"expected torch=={version} to be a build for CUDA, found {found.torch}; let pip take it from an index that has "
            f"one, and remove {CUDA_VENV.name} first"
        )
    if found.missing and not _install(building, found.missing):
        raise CannotSetUp(f"expected pip to install {', '.join(found.missing)}, but it failed; see its messages above")
    return building.python


def _install(environment: Environment, packages: list[str], *options: str) -> bool:
    """Installs packages without letting any of them bring another torch."""
    constraints = ROOT / ".dev" / "constraints.txt"
    constraints.parent.mkdir(exist_ok=True)
    pins = [f"torch=={environment.torch}"]
    if environment.owned:  # elsewhere the torch that is there decides which Triton goes with it
        pins.append(f"triton=={project()['tool']['sam_fused']['triton']['install']}")
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    command = ["-m", "pip", "install", "-q", "--disable-pip-version-check", *options, "-c", str(constraints), *packages]
    if environment.run(*command) != 0:
        return False
    after = probe(environment.python, []).torch
    if after != environment.torch:
        raise CannotSetUp(f"expected torch {environment.torch} to stay, found {after} after installing; reinstall it")
    return True


def install_peers(environment: Environment) -> None:
    """The packages the benchmarks compare with. Optional: where they cannot be had the table has a row less."""
    missing = probe(environment.python, requirements("peers")).missing
    if missing and not _install(environment, missing, "--no-deps", "--retries", "1"):
        print(f"tools.dev: could not install {', '.join(missing)}; the benchmark leaves that row out", file=sys.stderr)
