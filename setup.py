"""The parts of the build that pyproject.toml cannot say: extensions that may be missing. See build_native.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build frontends run this file without its folder on the path

import build_native

build_native.requested_mode()  # a misspelt SAM_FUSED_BUILD ends here, with one sentence, before anything is written

setup(
    # Here and not in pyproject.toml: setuptools below 77 rejects `license = "Apache-2.0"` there, 77 and later
    # deprecate the table form that older ones want.
    license="Apache-2.0",
    ext_modules=build_native.placeholders(),
    cmdclass={"build_ext": build_native.BuildExt, "bdist_wheel": build_native.BdistWheel},
    options={"bdist_wheel": build_native.wheel_options()},
)
