"""The wheel with the CUDA library: building it as a user does, installing it apart, and reading its machine code."""

import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.package.checkouts import clean_environment

TOOLKIT = ("CUDA_HOME", "CUDA_PATH")  # where the machine says its toolkit is; dropped from tests that bring one


def run(python, *arguments, cwd, **variables):
    """A Python's exit status and everything it printed."""
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        # Without cards to see, or the default list of cards would be those.
        env=clean_environment(**{"CUDA_VISIBLE_DEVICES": "", **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def machine_toolkit():
    return {name: os.environ[name] for name in TOOLKIT if name in os.environ}


@dataclass
class Wheel:
    path: Path
    printed: str
    seconds: float
    """How long the build took."""
    work: float
    """How long its processes ran, one after the other: what it would take one core that does nothing else."""

    def names(self):
        with zipfile.ZipFile(self.path) as archive:
            return set(archive.namelist())

    def record(self):
        with zipfile.ZipFile(self.path) as archive:
            return json.loads(archive.read("sam_fused/_build_record.json"))

    def unpack(self, python, folder):
        """Installs it apart, as pip does it. The folder goes on PYTHONPATH."""
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        status, printed = run(python, *install, "--target", folder, self.path, cwd=folder.parent)
        assert status == 0, printed
        return folder


def _children_ran():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def build_wheel(python, checkout, folder, **variables):
    """Returns the wheel, or what a failed build printed."""
    started, worked = time.monotonic(), _children_ran()
    command = ("-m", "pip", "wheel", ".", "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    status, printed = run(python, *command, cwd=checkout, **variables)
    seconds, work = time.monotonic() - started, _children_ran() - worked
    if status != 0:
        return printed
    (wheel,) = folder.glob("sam_fused-*.whl")
    return Wheel(wheel, printed, seconds, work)


def find_cuobjdump():
    """The toolkit's, or that of the Triton package: toolkits made of wheels have none."""
    homes = [Path(home) for home in machine_toolkit().values()]
    found = [home / "bin" / "cuobjdump" for home in homes] + [Path(shutil.which("cuobjdump") or "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((path for path in found if path.is_file()), None)


def _cuobjdump(library, option):
    tool = find_cuobjdump()
    assert tool is not None, "expected cuobjdump in the toolkit or in the Triton package, found none; install triton"
    return subprocess.run([str(tool), option, str(library)], capture_output=True, text=True, check=True).stdout


def _short(mangled):
    """The kernel's own name: the identifiers of a mangled name each follow their length."""
    return re.search(r"\d([a-z][a-z_]*_kernel)(?=[EI])", mangled).group(1)


def resources(library):
    """{(kernel, architecture): {resource: amount}} of all machine code in a library."""
    found, architecture, kernel = {}, None, None
    for line in _cuobjdump(library, "--dump-resource-usage").splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = _short(match.group(1))
        elif "REG:" in line:
            found[kernel, architecture] = {name: int(amount) for name, amount in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def accesses(library):
    """{(kernel, architecture): {instruction: how often}} for loads from and stores to memory, such as LDG.128 or STL.32."""
    found, architecture, counts = {}, None, None
    for line in _cuobjdump(library, "--dump-sass").splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found[_short(match.group(1)), architecture] = defaultdict(int)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?(LDG?|STG?|LDL|STL)((?:\.\w+)*) ", line):
            width = re.search(r"\.(128|64)\b", match.group(2))
            counts[f"{match.group(1)}.{width.group(1) if width else 32}"] += 1
    return found
