"""What compiling the CUDA kernels takes: a toolkit that fits torch, a host compiler it accepts, and a list of cards.

All of it is checked before anything is compiled, because torch's own build reports the same conditions late and as bare
tracebacks. What decides is the toolkit and torch's build, never a visible GPU: a machine without one builds the wheel too.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL = "`pip install --no-build-isolation .`"

TOOLKIT_FLOOR = (12, 1)  # the first with 32 KB of kernel arguments, which the tables of addresses take
CARD_FLOOR = (8, 0)  # the first that converts bfloat16 in hardware
DEFAULT_CARDS = ((8, 0), (9, 0), (10, 0), (12, 0))  # one for each generation that binaries do not carry over from
NAMED_CARDS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}

# The packages that make up a toolkit. They unpack into one folder, nvidia/cu13, of which the build needs nothing else.
WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
WHEELS_FLOOR = 13  # the wheels of CUDA 12 hold the assembler without the compiler

# nvcc's -ffp-contract=off: element.h names every fma, and bits must not depend on the backend.
ARITHMETIC_FLAGS = ["-fmad=false"]

PROBE = "#include <cuda_runtime.h>\n#include <cuda_bf16.h>\n__global__ void probe() {}\n"


class CannotBuild(Exception):
    """The native kernels cannot be built here; the message is a clause with its remedy, without a full stop."""


@dataclass(frozen=True)
class Toolkit:
    """One CUDA toolkit. ``version`` is what its nvcc calls itself, such as 13.0.88."""

    nvcc: Path
    version: str
    home: Path

    @property
    def release(self) -> tuple[int, int]:
        major, minor, *_ = map(int, self.version.split("."))
        return major, minor


@dataclass(frozen=True)
class CudaPlan:
    """Everything a build of the CUDA library has to know."""

    toolkit: Toolkit
    torch_cuda: str
    architectures: tuple[str, ...]
    """As in TORCH_CUDA_ARCH_LIST: capabilities, with +PTX where code for later cards is included."""
    left_out: tuple[str, ...]
    """What TORCH_CUDA_ARCH_LIST names and the kernels cannot serve."""
    host_compiler: str

    def nvcc_flags(self, host_flags: list[str]) -> list[str]:
        flags = ["-O3", "-std=c++20", *ARITHMETIC_FLAGS, "--threads=2", f"-ccbin={self.host_compiler}"]
        for flag in host_flags:
            if flag.startswith("-D"):
                flags.append(flag)
            elif not flag.startswith(("-O", "-std")):  # those nvcc hands on itself
                flags.append("-Xcompiler=" + flag.replace(",", "\\,"))
        cards = [*map(_code_flag, self.architectures), *map(_ptx_flag, filter(_has_ptx, self.architectures))]
        return [*flags, *dict.fromkeys(cards)]

    def definitions(self) -> list[str]:
        # USE_CUDA uncovers the CUDA part of torch's stable headers. The library tells which cards it covers.
        return ["-DUSE_CUDA", f'-DSAM_FUSED_CUDA_ARCHITECTURES="{";".join(self.architectures)}"']

    def runtime_library(self) -> str | None:
        """The file to link as the CUDA runtime. The toolkit made of wheels lacks the name that `-lcudart` looks for."""
        for folder in ("lib64", "lib", "targets/*/lib"):
            found = sorted(glob.glob(str(self.toolkit.home / folder / "libcudart.so*")))
            if found:
                return found[0]
        return None


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def _has_ptx(architecture: str) -> bool:
    return architecture.endswith("+PTX")


def _code_flag(architecture: str) -> str:
    number = _number(architecture)
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def _ptx_flag(architecture: str) -> str:
    number = _number(architecture)
    return f"-gencode=arch=compute_{number},code=compute_{number}"


def plan(host_compiler: str) -> CudaPlan:
    """What to build with and for; raises CannotBuild with the reason and the remedy."""
    import torch

    if torch.version.hip is not None:
        raise CannotBuild(
            f"CUDA kernels expect a torch for CUDA, found {torch.__version__} for ROCm {torch.version.hip}; "
            f"install a CUDA build of torch, then {INSTALL}"
        )
    if torch.version.cuda is None:
        raise CannotBuild(
            f"CUDA kernels expect a torch for CUDA, found {torch.__version__}, which has none; "
            f"install a CUDA build of torch, then {INSTALL}"
        )
    toolkit = find_toolkit(torch.version.cuda, str(torch.__version__))
    known = _cards_known_to(toolkit)
    architectures, left_out = choose_cards(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known, toolkit.version)
    found = CudaPlan(toolkit, torch.version.cuda, architectures, left_out, nvcc_host_compiler(host_compiler))
    _probe(found)
    return found


def wheels_command(cuda: str) -> str:
    major, minor = cuda.split(".")[:2]
    return "`pip install " + " ".join(f'"{name}=={major}.{minor}.*"' for name in WHEELS) + "`"


def _how_to_get_nvcc(cuda: str) -> str:
    major = int(cuda.split(".")[0])
    if major < WHEELS_FLOOR:
        return f"install NVIDIA's CUDA toolkit {cuda} and set CUDA_HOME to it, then {INSTALL}"
    return f"{wheels_command(cuda)} brings one that the build finds by itself, then {INSTALL}"


def find_toolkit(cuda: str, torch_version: str) -> Toolkit:
    """The toolkit that CUDA_HOME names, else the first one found of torch's major version."""
    wanted = f"expected nvcc of CUDA {cuda.split('.')[0]}, as torch {torch_version} was built with CUDA {cuda}"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found: list[Toolkit] = []
    for nvcc, named_home in [(Path(home, "bin", "nvcc"), Path(home))] if home else [(path, None) for path in _places()]:
        toolkit = _inspect(nvcc, named_home)
        if toolkit is not None and toolkit not in found:
            found.append(toolkit)
    if not found:
        where = f"in CUDA_HOME={home}" if home else "in CUDA_HOME, on PATH, among the installed wheels or in /usr/local/cuda"
        raise CannotBuild(f"{wanted}, found none {where}; {'unset CUDA_HOME or ' if home else ''}{_how_to_get_nvcc(cuda)}")
    fitting = [toolkit for toolkit in found if toolkit.release[0] == int(cuda.split(".")[0])]
    if not fitting:
        raise CannotBuild(
            f"{wanted}, found nvcc {found[0].version} in {found[0].home}; "
            f"{'unset CUDA_HOME or set it to a toolkit that fits; ' if home else ''}{_how_to_get_nvcc(cuda)}"
        )
    able = [toolkit for toolkit in fitting if toolkit.release >= TOOLKIT_FLOOR]
    if not able:
        raise CannotBuild(
            f"expected nvcc {'.'.join(map(str, TOOLKIT_FLOOR))} or later, which passes kernels 32 KB of arguments, "
            f"found {fitting[0].version} in {fitting[0].home} for torch's CUDA {cuda}; {_how_to_get_nvcc(cuda)}"
        )
    return able[0]


def _places() -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path)
    for folder in sys.path:
        yield from sorted(Path(folder).glob("nvidia/cu[0-9]*/bin/nvcc"))
    yield Path("/usr/local/cuda/bin/nvcc")


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess([], 1, "", str(error))


def _inspect(nvcc: Path, home: Path | None) -> Toolkit | None:
    version = re.search(r"\bV(\d+\.\d+(?:\.\d+)*)", _run(nvcc, "--version").stdout)
    if version is None:
        return None
    if home is None:
        # Asked and not guessed from the path: what is on PATH may be a script that starts the nvcc of another folder.
        top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "nothing.cu").stderr, re.MULTILINE)
        home = Path(top.group(1)) if top else nvcc.resolve().parent.parent
    return Toolkit(nvcc, version.group(1), home.resolve())


def _cards_known_to(toolkit: Toolkit) -> list[tuple[int, int]]:
    listed = re.findall(r"\bsm_(\d+)(\d)\b", _run(toolkit.nvcc, "--list-gpu-code").stdout)
    return sorted({(int(major), int(minor)) for major, minor in listed} - {(0, 0)})


def choose_cards(requested: str, known: list[tuple[int, int]], version: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The capabilities to compile for, and the requested ones that are too old for the kernels.

    The requested list decides; without one the visible cards; without those ``DEFAULT_CARDS``.
    """
    requested = requested.strip()
    if requested and requested != "native":
        return _requested_cards(requested, known, version)
    visible = _visible_cards()
    if visible:
        return _covering(visible, known), ()
    cards = [card for card in DEFAULT_CARDS if card in known]
    if not cards:
        raise CannotBuild(
            f"expected nvcc {version} to compile for one of {_listed(DEFAULT_CARDS)}, found {_listed(known)}; "
            f"name the cards to build for in TORCH_CUDA_ARCH_LIST, then {INSTALL}"
        )
    return (*map(_dotted, cards[:-1]), f"{_dotted(cards[-1])}+PTX"), ()


def _requested_cards(requested: str, known: list[tuple[int, int]], version: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    expanded = " ".join(NAMED_CARDS.get(name, name) for name in re.split(r"[;,\s]+", requested))
    chosen: dict[str, tuple[int, int]] = {}
    left_out: list[str] = []
    for entry in filter(None, re.split(r"[;\s]+", expanded)):
        parsed = re.fullmatch(r"(\d+)\.(\d)[af]?(?:\+PTX)?", entry)
        card = (int(parsed.group(1)), int(parsed.group(2))) if parsed else None
        if card is not None and card < CARD_FLOOR:
            left_out.append(entry)
        elif card is None or card not in known:
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST expected capabilities that nvcc {version} compiles for "
                f"({_listed(card for card in known if card >= CARD_FLOOR)}; as in 8.0;9.0+PTX), got {entry!r} in "
                f"{requested!r}; correct it or unset it, then {INSTALL}"
            )
        else:
            chosen[entry] = card
    if not chosen:
        raise CannotBuild(
            f"TORCH_CUDA_ARCH_LIST expected a capability of {_dotted(CARD_FLOOR)} or later, the first that converts bfloat16, "
            f"got {requested!r}; add one or unset it, then {INSTALL}"
        )
    return tuple(sorted(chosen, key=lambda entry: chosen[entry])), tuple(left_out)


def _visible_cards() -> list[tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def _covering(visible: list[tuple[int, int]], known: list[tuple[int, int]]) -> tuple[str, ...]:
    served = [card for card in visible if card >= CARD_FLOOR]
    if not served:
        raise CannotBuild(
            f"CUDA kernels expect a GPU of capability {_dotted(CARD_FLOOR)} or later, the first that converts bfloat16, found "
            f"{_listed(visible)}; name the cards to build for in TORCH_CUDA_ARCH_LIST, then {INSTALL}"
        )
    # A card that this nvcc has no name for yet compiles the newest code there is, as it will be loaded.
    newest = f"{_dotted(known[-1])}+PTX" if known else ""
    return tuple(dict.fromkeys(_dotted(card) if card in known else newest for card in served))


def _dotted(card: tuple[int, int]) -> str:
    return f"{card[0]}.{card[1]}"


def _listed(cards: Any) -> str:
    return ", ".join(map(_dotted, cards)) or "none"


def nvcc_host_compiler(command: str) -> str:
    """The program in a command like `ccache g++ -m64`: nvcc takes a file and no arguments."""
    words = [word for word in shlex.split(command) if Path(word).name not in ("ccache", "sccache", "distcc")]
    return shutil.which(words[0]) or words[0]


def _probe(found: CudaPlan) -> None:
    """Compiles an empty kernel: a compiler too new for nvcc and a toolkit with parts missing both show here."""
    toolkit, compiler = found.toolkit, found.host_compiler
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE, encoding="utf-8")
        flags = ["-std=c++20", f"-ccbin={compiler}", _code_flag(found.architectures[0])]
        done = _run(toolkit.nvcc, *flags, "-c", source, "-o", source.with_suffix(".o"))
    if done.returncode == 0:
        return
    lines = (done.stderr + done.stdout).splitlines()
    first = next((line for line in lines if re.search(r"error|fatal|not found", line, re.IGNORECASE)), "no message")
    said = shorten(re.sub(r"^.*?error: |^\S*/", "", first.strip()))
    versions = (_run(compiler, "--version").stdout.splitlines() or ["no version"])[0]
    raise CannotBuild(
        f"expected nvcc {toolkit.version} in {toolkit.home} to compile with {compiler} ({versions}), but it says {said!r}; "
        f"name a compiler that it accepts in CXX, or repair the toolkit, then {INSTALL}"
    )


def shorten(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
