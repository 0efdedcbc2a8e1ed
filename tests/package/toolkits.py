"""Toolkits that are not there: an nvcc that answers as the build asks it, and a torch that says it has CUDA."""

import os

# What the build asks an nvcc, in the order of the cases; whatever else it is asked to do fails.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{version}" ;;
  *--list-gpu-code*) echo "{cards}" ;;
  *--dryrun*) echo "#$ TOP={top}" >&2 ;;
  *probe.cu*) {probe} ;;
  *) echo "nvcc fatal: this one compiles nothing" >&2; exit 1 ;;
esac
"""
CARDS = ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))

# Imported when Python starts. With the variable set, a torch without CUDA says that it has one.
SITE_CUSTOMIZE = """
import os

if "PRETENDED_CUDA" in os.environ:
    import torch

    torch.version.cuda = os.environ["PRETENDED_CUDA"]
"""


def make_nvcc(home, version, cards=CARDS, probe=":", top=None):
    """A script in home/bin. Returns home."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    names = " ".join(f"sm_{major}{minor}" for major, minor in cards)
    release = ".".join(version.split(".")[:2])
    nvcc.write_text(NVCC.format(release=release, version=version, cards=names, probe=probe, top=top or home))
    nvcc.chmod(0o755)
    return home


def make_compiler(path, version):
    """A g++ that passes itself off as another version. Returns the path."""
    path.write_text(f'#!/bin/sh\nexec "{os.environ.get("CXX") or "c++"}" -U__GNUC__ -D__GNUC__={version} "$@"\n')
    path.chmod(0o755)
    return path
