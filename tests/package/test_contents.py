"""What is in the wheel and in the source archive: everything that must be, and nothing else."""

import email
import json
import re
import tarfile
import zipfile
from pathlib import PurePosixPath

import pytest

import build_native
from checkouts import DOCUMENTS, ROOT
from symbols import DynamicSymbols

DIST_INFO = "sam_fused-0.1.0.dist-info/"


def modules():
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "sam_fused").rglob("*.py")}


def wheel_files(wheel):
    """The names in a wheel; where setuptools puts the licence depends on its version."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.replace(".dist-info/licenses/", ".dist-info/") for name in archive.namelist()}


def read(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


PURE = {
    "sam_fused/py.typed",
    "sam_fused/_build_record.json",
    *(DIST_INFO + name for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "LICENSE")),
}


def test_native_wheel_holds_the_modules_one_library_and_nothing_else(native_wheel):
    assert re.fullmatch(r"sam_fused-0\.1\.0-cp310-abi3-\w+\.whl", native_wheel.name)
    assert wheel_files(native_wheel) == PURE | modules() | {"sam_fused/_C.abi3.so"}
    record = json.loads(read(native_wheel, "sam_fused/_build_record.json"))
    assert record["native"] == {"cpu": True, "cuda": False}
    assert record["mode"] == "cpu"
    assert "SAM_FUSED_BUILD=cpu" in record["cuda"]["reason"]
    assert record["reason"] is None
    assert record["torch"]
    assert record["compiler"]


def test_pure_wheel_is_for_any_machine_and_has_no_library_of_an_earlier_build(pure_wheel):
    assert pure_wheel.name == "sam_fused-0.1.0-py3-none-any.whl"
    assert wheel_files(pure_wheel) == PURE | modules()
    assert b"Root-Is-Purelib: true" in read(pure_wheel, DIST_INFO + "WHEEL")
    record = json.loads(read(pure_wheel, "sam_fused/_build_record.json"))
    assert record["native"] == {"cpu": False, "cuda": False}
    assert "SAM_FUSED_BUILD=none" in record["reason"]
    assert record["cuda"]["reason"] == record["reason"]


def test_metadata_asks_for_torch_only(pure_wheel):
    metadata = email.message_from_bytes(read(pure_wheel, DIST_INFO + "METADATA"))
    unconditional = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    floor = ".".join(map(str, build_native.TORCH_FLOOR))
    assert unconditional == [f"torch>={floor}"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])


def test_sdist_holds_what_a_build_needs_and_the_documents(sdist):
    with tarfile.open(sdist) as archive:
        packed = {PurePosixPath(member.name) for member in archive if member.isfile()}
    names = {path.relative_to("sam_fused-0.1.0").as_posix() for path in packed}
    native = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh") and path.is_file()
    }
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("sam_fused.egg-info/")}
    wanted = {"setup.py", "build_native.py", "build_cuda.py", "pyproject.toml", "MANIFEST.in", *DOCUMENTS, "sam_fused/py.typed"}
    assert names == wanted | native | modules() | made


@pytest.fixture(scope="module")
def library(native_wheel, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "_C.abi3.so"
    path.write_bytes(read(native_wheel, "sam_fused/_C.abi3.so"))
    return DynamicSymbols(path)


def test_library_uses_only_the_stable_abis(library):
    library.check_wanted()


def test_library_offers_its_entry_point_only(library):
    library.check_offered("PyInit__C")


def test_library_does_not_name_the_folder_it_was_built_in(native_wheel, checkout):
    assert str(checkout).encode() not in read(native_wheel, "sam_fused/_C.abi3.so")
