"""Installs the package the ways people do, with and without what the kernels need, and reads what it says."""

import json
import zipfile

import pytest
import torch

from checkouts import PIP_INSTALL, build

REMEDY = "pip install --no-build-isolation ."


def sentence(printed):
    """The one line that sam_fused itself contributes to a failed install."""
    assert "Traceback" not in printed, printed
    lines = {line.strip() for line in printed.splitlines() if line.strip().startswith("sam_fused: ")}
    assert len(lines) == 1, printed
    return lines.pop()


def reason_of_pure_wheel(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("sam_fused/_build_record.json"))
    assert record["native"] == {"cpu": False, "cuda": False}
    return record["reason"]


def expect_pure(environment, *phrases):
    """The package works, without kernels, and the report says why and what to do."""
    facts = environment.facts()
    assert facts["build"]["native_cpu"] is False
    assert facts["native"]["loaded"] is False
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["backend"] == "foreach"
    for phrase in phrases:
        assert phrase in facts["build"]["reason"]
        assert phrase in facts["devices"][0]["reason"]


def test_without_isolation_the_kernels_are_built_and_used(checkout, native_wheel, native_environment):
    status, printed = native_environment.install(checkout)
    assert status == 0, printed
    facts = native_environment.facts()
    assert facts["build"]["mode"] == "auto"
    assert facts["build"]["native_cpu"] is True
    assert facts["build"]["reason"] is None
    assert facts["native"]["loaded"] is True, facts["native"]
    assert facts["native"]["capability"] in ("default", "avx2", "avx512")
    assert facts["devices"][0]["backend"] == "native"
    assert facts["version"] == "0.1.0"
    report = native_environment.info()
    assert facts["build"]["compiler"] in report
    assert "native library: loaded" in report


def test_under_isolation_the_install_succeeds_and_says_how_to_get_the_kernels(bare_checkout, environment):
    status, printed = environment.install(bare_checkout, isolated=True)
    if status != 0 and "setuptools" in printed and ("No matching distribution" in printed or "connection" in printed):
        pytest.skip("pip could not fetch setuptools for the isolated build: no package index in reach")
    assert status == 0, printed
    expect_pure(environment, "torch", "isolation", REMEDY)
    report = environment.info()
    assert "built: no native kernels" in report
    assert REMEDY in report


# A name that leads nowhere, and nothing on PATH at all: both are what a machine without a compiler looks like.
@pytest.mark.parametrize("toolchain", [{"CXX": "no-such-compiler"}, {"PATH": "", "CXX": ""}], ids=["cxx", "path"])
def test_without_a_compiler_the_wheel_is_pure_and_says_so(bare_checkout, tmp_path, toolchain):
    reason = reason_of_pure_wheel(build(bare_checkout, "build_wheel", tmp_path / "wheels", **toolchain))
    assert f"found nothing called '{toolchain['CXX'] or 'c++'}'" in reason
    assert REMEDY in reason


def test_without_a_compiler_the_install_succeeds(bare_checkout, environment):
    status, printed = environment.install(bare_checkout, CXX="no-such-compiler")
    assert status == 0, printed
    expect_pure(environment, "install g++ or clang++", REMEDY)


def test_wheel_survives_a_compiler_that_rejects_the_sources(bare_checkout, tmp_path):
    for source in (bare_checkout / "csrc").rglob("*.cpp"):
        source.write_text("#error not C++20\n")
    assert "failed" in reason_of_pure_wheel(build(bare_checkout, "build_wheel", tmp_path / "wheels"))


def test_first_optimizer_says_once_why_it_is_slow(pure_wheel, environment, tmp_path):
    status, printed = environment.run(*PIP_INSTALL, pure_wheel, cwd=tmp_path)
    assert status == 0, printed
    program = (
        "import torch, sam_fused\n"
        "print('imported', flush=True)\n"
        "for _ in range(2):\n"
        "    w = torch.ones(3, requires_grad=True)\n"
        "    optimizer = sam_fused.SAM([w], torch.optim.SGD, lr=0.1)\n"
        "    def closure():\n"
        "        loss = (w * w).sum(); loss.backward(); return loss\n"
        "    optimizer.step(closure)\n"
        "assert w.max() < 1\n"
    )
    status, printed = environment.run("-W", "always", "-c", program, cwd=tmp_path)
    assert status == 0, printed
    assert printed.startswith("imported")
    assert printed.count(REMEDY) == 1, printed


def test_editable_install_builds_in_place_and_a_pure_one_removes_the_library(checkout, native_wheel, native_environment):
    status, printed = native_environment.install(checkout, "-e")
    assert status == 0, printed
    library = checkout / "sam_fused" / "_C.abi3.so"
    assert library.exists()
    facts = native_environment.facts()
    assert facts["native"]["loaded"] is True
    assert facts["build"]["native_cpu"] is True

    status, printed = native_environment.install(checkout, "-e", SAM_FUSED_BUILD="none")
    assert status == 0, printed
    assert not library.exists()
    expect_pure(native_environment, "SAM_FUSED_BUILD=none")


def test_editable_install_survives_a_failing_compiler(bare_checkout, environment):
    status, printed = environment.install(bare_checkout, "-e", CXX="false")
    assert status == 0, printed
    expect_pure(environment, "compiler", "failed", "SAM_FUSED_BUILD=cpu " + REMEDY)


def test_cpu_without_a_compiler_fails_with_one_sentence(bare_checkout, environment):
    status, printed = environment.install(bare_checkout, SAM_FUSED_BUILD="cpu", CXX="no-such-compiler")
    assert status != 0
    message = sentence(printed)
    assert "SAM_FUSED_BUILD=cpu" in message
    assert "'no-such-compiler'" in message
    assert REMEDY in message


@pytest.mark.parametrize(
    ("mode", "phrases"),
    [("gpu", ("auto, cpu, cuda, none", "'gpu'")), ("cuda", ("expect a torch for CUDA", torch.__version__, REMEDY))],
)
def test_a_mode_that_cannot_be_had_fails_with_one_sentence(bare_checkout, environment, mode, phrases):
    if mode == "cuda" and torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA")
    status, printed = environment.install(bare_checkout, SAM_FUSED_BUILD=mode)
    assert status != 0
    message = sentence(printed)
    for phrase in phrases:
        assert phrase in message
