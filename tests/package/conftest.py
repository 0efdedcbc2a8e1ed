"""The packages under test, built once per session."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from checkouts import build, copy_checkout, make_environment


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.package)
            # One process builds and installs; two would compile everything twice.
            item.add_marker(pytest.mark.xdist_group("package"))


@pytest.fixture
def environment(tmp_path):
    return make_environment(tmp_path / "environment")


@pytest.fixture(scope="session")
def compiling_environment(tmp_path_factory):
    """Where everything native is built: the environment's path is in the compiler's command, and with another one
    ninja would compile everything again."""
    return make_environment(tmp_path_factory.mktemp("native_environment") / "environment")


@pytest.fixture
def native_environment(compiling_environment):
    """The same one, with nothing of ours installed."""
    for left in compiling_environment.site_packages.glob("*sam_fused*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return compiling_environment


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """One copy for the whole session: objects compiled once serve the wheel, the install and the editable install."""
    return copy_checkout(tmp_path_factory.mktemp("package") / "checkout")


@pytest.fixture
def bare_checkout(tmp_path):
    """A copy to be built in with a broken toolchain."""
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture(scope="session")
def native_wheel(checkout, compiling_environment, tmp_path_factory):
    """The wheel with the extension, built in a tree where earlier builds left things that must not be shipped."""
    if sys.platform not in ("linux", "darwin") or shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")
    leftovers = [checkout / "sam_fused" / "_C.cpython-39-other.so", checkout / "sam_fused" / "_build_record.json"]
    stale_build = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "sam_fused"
    stale_build.mkdir(parents=True)
    leftovers.append(stale_build / "removed_long_ago.py")
    for path in leftovers:
        path.write_text("{}")
    target, python = tmp_path_factory.mktemp("native"), compiling_environment.python
    wheel = build(checkout, "build_wheel", target, python, SAM_FUSED_BUILD="cpu")
    for path in leftovers:
        path.unlink(missing_ok=True)
    return wheel


@pytest.fixture(scope="session")
def pure_wheel(checkout, native_wheel, tmp_path_factory):
    """The wheel of `SAM_FUSED_BUILD=none`, built right after a native one in the same tree, a library in it too."""
    stale = checkout / "sam_fused" / "_C.abi3.so"
    stale.write_bytes(b"from an earlier build in place")
    wheel = build(checkout, "build_wheel", tmp_path_factory.mktemp("pure"), SAM_FUSED_BUILD="none")
    stale.unlink()
    return wheel


@pytest.fixture(scope="session")
def sdist(checkout, tmp_path_factory):
    (checkout / "tests").mkdir(exist_ok=True)
    (checkout / "tests" / "test_nothing.py").write_text("")  # setuptools packs tests/test*.py unless told not to
    return build(checkout, "build_sdist", tmp_path_factory.mktemp("sdist"))
