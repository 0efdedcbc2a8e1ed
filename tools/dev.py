"""`python -m tools.dev setup|build|test|test-kernels|gpu|lint|bench|clean`: every development command, each from a fresh clone.

Arguments after the command go to pytest (`test`), to the benchmark (`bench`) or to `tools/gpu.py` (`gpu`), or name
proofs (`test-kernels`). The Makefile's targets are these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tools.environment import CannotSetUp, install_peers, prepare
from tools.gpu import main as run_on_gpu
from tools.kernels import prove
from tools.native import clean, ensure_built

PYTHON_FLOOR = (3, 10)


def setup(extra: list[str]) -> int:
    """everything the other commands need"""
    environment = prepare("dev")
    install_peers(environment)
    ensure_built(environment)
    return environment.run("-m", "sam_fused.info")


def build(extra: list[str]) -> int:
    """the native libraries, in place, if their sources changed"""
    ensure_built(prepare())
    return 0


def test(extra: list[str]) -> int:
    """pytest over tests/, in two processes; or over what the arguments say, in one"""
    environment = prepare("test")
    install_peers(environment)  # baselines are tested too
    ensure_built(environment)
    # Two, whatever the machine: most tests are short and single-threaded, and importing torch takes longer than many.
    return environment.run("-m", "pytest", *(extra or ["--numprocesses=2", "--dist=loadgroup"]))


def test_kernels(extra: list[str]) -> int:
    """the proofs of the GPU kernels that need nvcc and no GPU; or those that the arguments name"""
    environment = prepare("test")
    ensure_built(environment)
    return prove(environment, extra)


def gpu(extra: list[str]) -> int:
    """build, test and measure on this machine's GPU, with the Python that is here, in ten minutes"""
    return run_on_gpu(extra)


def lint(extra: list[str]) -> int:
    """ruff and mypy"""
    environment = prepare("lint")
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    return max([environment.run("-m", *check) for check in checks])


def bench(extra: list[str]) -> int:
    """python -m benchmarks.throughput, with the arguments; without any, micro-batch SAM in brief as well"""
    environment = prepare("bench")
    install_peers(environment)
    ensure_built(environment)
    done = environment.run("-m", "benchmarks.throughput", *extra)
    return done if done or extra else environment.run("-m", "benchmarks.micro_batch", "--brief")


def tidy(extra: list[str]) -> int:
    """remove what builds, tests and linters left"""
    clean()
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "setup": setup,
    "build": build,
    "test": test,
    "test-kernels": test_kernels,
    "gpu": gpu,
    "lint": lint,
    "bench": bench,
    "clean": tidy,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dev",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="\n".join(f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("extra", nargs=argparse.REMAINDER, help="arguments for pytest or the benchmark")
    options = parser.parse_args(arguments)
    if sys.version_info < PYTHON_FLOOR:
        found = ".".join(map(str, sys.version_info[:2]))
        parser.error(f"expected Python 3.10 or later, got {found}; set PYTHON to a newer one")
    try:
        return COMMANDS[options.command](options.extra)
    except CannotSetUp as problem:
        print(f"tools.dev: {problem}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
