"""Which Python the development commands run with, and what has to be installed there first.

An interpreter that already imports a supported torch is used as it is: nobody's torch is replaced, and only missing
tools are added. Otherwise `.venv` is made, with the torch that pyproject.toml pins.
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
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Run in the interpreter in question. An import and not the metadata: a torch that does not load is none.
PROBE = """
import importlib.metadata, json, sys
try:
    import torch
    version = str(torch.__version__)
except Exception:
    version = None
missing = []
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps({"torch": version, "missing": missing}))
"""


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
            found.extend(requirements(*nested.group(1).split(",")) if nested else [requirement])
    return list(dict.fromkeys(found))


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def is_supported(torch: str | None) -> bool:
    floor, ceiling = project()["tool"]["sam_fused"]["torch"]["supported"]
    return torch is not None and release(floor) <= release(torch) < release(ceiling)


def probe(python: Path | str, wanted: list[str]) -> tuple[str | None, list[str]]:
    """The torch that an interpreter imports, and which of the wanted requirements it lacks."""
    names = [name_of(requirement) for requirement in wanted]
    answer = subprocess.run([str(python), "-c", PROBE, *names], capture_output=True, text=True)
    if answer.returncode != 0:
        raise CannotSetUp(f"expected {python} to be a working Python, got exit status {answer.returncode}; set PYTHON")
    facts = json.loads(answer.stdout.splitlines()[-1])
    return facts["torch"], [requirement for requirement in wanted if name_of(requirement) in facts["missing"]]


def prepare(*extras: str) -> Environment:
    """The environment to work in, with the extras' requirements installed as far as that is possible."""
    wanted = requirements(*extras, "build")
    running_in_venv = Path(sys.prefix).resolve() == VENV.resolve()
    if not running_in_venv:
        torch, missing = probe(sys.executable, wanted)
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
    if not VENV_PYTHON.exists():
        print(f"creating {VENV.name}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode != 0:
            raise CannotSetUp(
                f"expected `{Path(sys.executable).name} -m venv` to make {VENV.name}, but it failed; install your "
                "distribution's python3-venv, or set PYTHON to an interpreter that has torch"
            )
    torch, missing = probe(VENV_PYTHON, wanted)
    environment = Environment(VENV_PYTHON, torch or "", owned=True)
    if not is_supported(torch):
        pin = f"torch=={project()['tool']['sam_fused']['torch']['install']}"
        print(f"installing {pin}", flush=True)
        if environment.run("-m", "pip", "install", "-q", "--disable-pip-version-check", pin) != 0:
            raise CannotSetUp(f"expected pip to install {pin} into {VENV.name}, but it failed; see its messages above")
        torch, missing = probe(VENV_PYTHON, wanted)
        if torch is None or not is_supported(torch):
            raise CannotSetUp(f"expected {pin} in {VENV.name}, found {torch}; remove {VENV.name} and try again")
        environment.torch = torch
    if missing:
        # All of them at once: whoever runs `test` will run `lint` and `bench` too.
        _, missing = probe(VENV_PYTHON, requirements("dev"))
        print(f"installing {', '.join(map(name_of, missing))}", flush=True)
        if not _install(environment, missing):
            raise CannotSetUp(f"expected pip to install {', '.join(missing)}, but it failed; see its messages above")
    return environment


def _install(environment: Environment, packages: list[str], *options: str) -> bool:
    """Installs packages without letting any of them bring another torch."""
    constraints = ROOT / ".dev" / "constraints.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text(f"torch=={environment.torch}\n", encoding="utf-8")
    command = ["-m", "pip", "install", "-q", "--disable-pip-version-check", *options, "-c", str(constraints), *packages]
    if environment.run(*command) != 0:
        return False
    after, _ = probe(environment.python, [])
    if after != environment.torch:
        raise CannotSetUp(f"expected torch {environment.torch} to stay, found {after} after installing; reinstall it")
    return True


def install_peers(environment: Environment) -> None:
    """The packages the benchmarks compare with. Optional: where they cannot be had the table has a row less."""
    _, missing = probe(environment.python, requirements("peers"))
    if missing and not _install(environment, missing, "--no-deps", "--retries", "1"):
        print(f"tools.dev: could not install {', '.join(missing)}; the benchmark leaves that row out", file=sys.stderr)
