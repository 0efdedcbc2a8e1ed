"""What the build checks before it compiles a CUDA kernel: each fault is one sentence with both versions and the remedy."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

import build_cuda
from build_cuda import CannotBuild, choose_cards, find_toolkit
from checkouts import PIP_INSTALL, build
from toolkits import CARDS, SITE_CUSTOMIZE, make_nvcc

TORCH = "2.14.1+cu130"
REMEDY = "pip install --no-build-isolation ."


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """No toolkit in any place but those that a test makes."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_cuda, "_visible_cards", lambda: [])


@pytest.fixture
def places(monkeypatch):
    """Where the build looks when CUDA_HOME does not say."""

    def set_places(*homes):
        monkeypatch.setattr(build_cuda, "_places", lambda: iter([Path(home, "bin", "nvcc") for home in homes]))

    return set_places


def reason(function, *arguments):
    """The clause with which something cannot be built: one sentence in the end, so no full stop and no line break."""
    with pytest.raises(CannotBuild) as raised:
        function(*arguments)
    message = str(raised.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def test_missing_nvcc_names_the_wheels_of_torchs_cuda(places):
    places()
    message = reason(find_toolkit, "13.2", "2.14.1+cu132")
    assert "expected nvcc of CUDA 13" in message and "2.14.1+cu132" in message and "found none" in message
    command = re.search(r"`(pip install [^`]*nvcc[^`]*)`", message).group(1)
    assert command == "pip install " + " ".join(f'"{name}==13.2.*"' for name in build_cuda.WHEELS)
    assert "finds by itself" in message and REMEDY in message


def test_missing_nvcc_of_a_cuda_whose_wheels_have_no_compiler_names_the_toolkit(places):
    places()
    message = reason(find_toolkit, "12.6", "2.11.0+cu126")
    assert "nvidia-cuda-nvcc" not in message
    assert "CUDA toolkit 12.6" in message and "CUDA_HOME" in message


def test_cuda_home_without_an_nvcc_is_not_passed_over(places, tmp_path, monkeypatch):
    places(make_nvcc(tmp_path / "fits", "13.0.88"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    message = reason(find_toolkit, "13.0", TORCH)
    assert f"found none in CUDA_HOME={tmp_path / 'empty'}; unset CUDA_HOME" in message


def test_another_major_version_is_refused_with_both_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "old", "12.4.99")))
    message = reason(find_toolkit, "13.0", TORCH)
    assert "CUDA 13.0" in message and TORCH in message
    assert f"found nvcc 12.4.99 in {tmp_path / 'old'}" in message
    assert "nvidia-cuda-nvcc==13.0.*" in message and "unset CUDA_HOME" in message


def test_of_several_toolkits_the_first_that_fits_is_taken(places, tmp_path):
    homes = [make_nvcc(tmp_path / version, version) for version in ("12.4.99", "13.1.7", "13.0.88")]
    places(*homes)
    toolkit = find_toolkit("13.0", TORCH)
    assert (toolkit.version, toolkit.home) == ("13.1.7", homes[1])  # another minor version is no obstacle
    assert find_toolkit("12.8", TORCH).home == homes[0]


def test_places_are_path_then_the_folder_of_the_wheels_then_the_usual_one(tmp_path, monkeypatch):
    on_path, unpacked = make_nvcc(tmp_path / "a", "13.0.88"), make_nvcc(tmp_path / "b" / "nvidia" / "cu13", "13.0.88")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "b")])
    assert list(build_cuda._places()) == [
        *(home / "bin" / "nvcc" for home in (on_path, unpacked)),
        Path("/usr/local/cuda/bin/nvcc"),
    ]


def test_a_script_on_path_that_starts_another_nvcc_does_not_mislead(places, tmp_path):
    real = tmp_path / "cuda-13.0"
    real.mkdir()
    places(make_nvcc(tmp_path / "usr", "13.0.88", top=f"{real}/bin/.."))
    (real / "bin").mkdir()
    assert find_toolkit("13.0", TORCH).home == real


def test_a_toolkit_without_large_kernel_arguments_is_refused_with_both_versions(places, tmp_path):
    places(make_nvcc(tmp_path / "old", "12.0.76"))
    message = reason(find_toolkit, "12.6", "2.11.0+cu126")
    assert "nvcc 12.1 or later" in message and "32 KB" in message and "12.0.76" in message and "12.6" in message


REFUSAL = (
    "echo '/usr/include/crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are "
    "not supported! The nvcc flag -allow-unsupported-compiler can be used' >&2; exit 1"
)


def test_a_refused_host_compiler_is_named_with_what_nvcc_says(places, tmp_path, monkeypatch):
    places(make_nvcc(tmp_path / "cuda", "13.0.88", probe=REFUSAL))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    compiler = tmp_path / "g++-99"
    compiler.write_text("#!/bin/sh\necho 'g++ (made up) 99.1.0'\n")
    compiler.chmod(0o755)
    message = reason(build_cuda.plan, f"ccache {compiler}")
    assert f"nvcc 13.0.88 in {tmp_path / 'cuda'}" in message
    assert f"{compiler} (g++ (made up) 99.1.0)" in message
    assert "gcc versions later than 15 are not supported!" in message
    assert "in CXX" in message and REMEDY in message


@pytest.mark.parametrize(
    ("requested", "chosen", "left_out"),
    [
        ("", ("8.0", "9.0", "10.0", "12.0+PTX"), ()),
        ("9.0", ("9.0",), ()),
        ("9.0 8.0;12.0+PTX", ("8.0", "9.0", "12.0+PTX"), ()),
        ("9.0a,8.6", ("8.6", "9.0a"), ()),
        ("Ampere", ("8.0", "8.6+PTX"), ()),
        ("7.5;8.0;9.0;", ("8.0", "9.0"), ("7.5",)),
    ],
)
def test_requested_cards(requested, chosen, left_out):
    assert choose_cards(requested, list(CARDS), "13.0.88") == (chosen, left_out)


@pytest.mark.parametrize(
    ("requested", "phrases"),
    [
        ("sm_90", ("'sm_90'", "8.0, 8.6, 9.0, 10.0, 12.0", "nvcc 13.0.88")),
        ("8.0;13.0", ("'13.0'", "'8.0;13.0'")),
        ("Volta", ("'Volta'",)),
        ("7.0 7.5+PTX", ("8.0 or later", "bfloat16", "'7.0 7.5+PTX'")),
        (" ; ", ("8.0 or later", "';'")),
    ],
)
def test_a_list_of_cards_that_cannot_be_served_is_refused(requested, phrases):
    message = reason(choose_cards, requested, list(CARDS), "13.0.88")
    for phrase in ("TORCH_CUDA_ARCH_LIST", REMEDY, *phrases):
        assert phrase in message


def test_a_toolkit_that_does_not_know_the_newest_cards_builds_for_those_it_knows():
    older = [card for card in CARDS if card < (10, 0)]
    assert choose_cards("", older, "12.6.20") == (("8.0", "9.0+PTX"), ())


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        ([(9, 0)], ("9.0",)),
        ([(7, 5), (8, 6), (9, 0)], ("8.6", "9.0")),
        ([(9, 0), (12, 1)], ("9.0", "12.0+PTX")),  # newer than this nvcc: what it has newest, to be compiled when loaded
    ],
)
def test_visible_cards_are_built_for_and_no_others(monkeypatch, visible, chosen):
    monkeypatch.setattr(build_cuda, "_visible_cards", lambda: visible)
    assert choose_cards("", list(CARDS), "13.0.88") == (chosen, ())
    assert choose_cards("8.0", list(CARDS), "13.0.88") == (("8.0",), ())


def test_visible_cards_that_are_all_too_old_are_a_reason(monkeypatch):
    monkeypatch.setattr(build_cuda, "_visible_cards", lambda: [(7, 0), (7, 5)])
    message = reason(choose_cards, "", list(CARDS), "13.0.88")
    assert "8.0 or later" in message and "7.0, 7.5" in message and "TORCH_CUDA_ARCH_LIST" in message


def test_rocm_is_told_from_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert "ROCm 6.4.1" in reason(build_cuda.plan, "c++")


def test_flags_keep_every_contraction_off_and_reach_the_host_compiler(places, tmp_path, monkeypatch):
    places(make_nvcc(tmp_path / "cuda", "13.0.88"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    flags = build_cuda.plan("c++").nvcc_flags(["-O3", "-std=c++20", "-ffp-contract=off", "-DNAME=1"])
    assert {"-fmad=false", "-Xcompiler=-ffp-contract=off", "-DNAME=1"} <= set(flags)
    assert not [flag for flag in flags if "fast" in flag or flag.startswith("-Xcompiler=-std")]
    for number in (80, 90, 100, 120):
        assert f"-gencode=arch=compute_{number},code=sm_{number}" in flags
    assert [flag for flag in flags if "code=compute" in flag] == ["-gencode=arch=compute_120,code=compute_120"]


# From here on with the build itself, in an environment whose torch says that it has CUDA 13.0.


@pytest.fixture
def pretending_environment(native_environment, native_wheel):
    """The one that has compiled the CPU kernels, so that they are not compiled again."""
    (native_environment.site_packages / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    return native_environment


def record_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
        return json.loads(archive.read("sam_fused/_build_record.json")), libraries


def test_auto_builds_the_cpu_kernels_where_the_toolkit_does_not_fit(checkout, pretending_environment, tmp_path):
    variables = {"PRETENDED_CUDA": "13.0", "CUDA_HOME": str(make_nvcc(tmp_path / "old", "12.4.99"))}
    wheel = build(checkout, "build_wheel", tmp_path / "wheels", pretending_environment.python, **variables)
    record, libraries = record_of(wheel)
    assert record["native"] == {"cpu": True, "cuda": False}
    assert libraries == {"sam_fused/_C.abi3.so"}
    assert record["reason"] is None
    assert "12.4.99" in record["cuda"]["reason"] and "13.0" in record["cuda"]["reason"]
    status, printed = pretending_environment.run(*PIP_INSTALL, wheel, cwd=tmp_path)
    assert status == 0, printed
    assert f"built: no CUDA kernels: {record['cuda']['reason']}" in pretending_environment.info()
    assert pretending_environment.facts()["devices"][0]["backend"] == "native"


def test_auto_keeps_the_cpu_kernels_when_the_cuda_ones_do_not_compile(checkout, pretending_environment, tmp_path):
    variables = {"PRETENDED_CUDA": "13.0", "CUDA_HOME": str(make_nvcc(tmp_path / "cuda", "13.0.88"))}
    wheel = build(checkout, "build_wheel", tmp_path / "wheels", pretending_environment.python, **variables)
    record, libraries = record_of(wheel)
    assert record["native"] == {"cpu": True, "cuda": False}
    assert libraries == {"sam_fused/_C.abi3.so"}
    assert "it failed (nvcc 13.0.88" in record["cuda"]["reason"]
    assert "SAM_FUSED_BUILD=cuda " + REMEDY in record["cuda"]["reason"]


def test_demanded_cuda_kernels_fail_with_one_sentence_before_anything_is_compiled(bare_checkout, environment, tmp_path):
    (environment.site_packages / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    variables = {"PRETENDED_CUDA": "13.0", "CUDA_HOME": str(make_nvcc(tmp_path / "old", "12.4.99"))}
    status, printed = environment.install(bare_checkout, SAM_FUSED_BUILD="cuda", **variables)
    assert status != 0
    assert "Traceback" not in printed, printed
    lines = [line.strip() for line in printed.splitlines() if line.strip().startswith("sam_fused: ")]
    assert len(lines) == 1, printed
    assert lines[0].startswith("sam_fused: SAM_FUSED_BUILD=cuda: expected nvcc of CUDA 13")
    assert "12.4.99" in lines[0]
    assert not list((bare_checkout / "build").glob("objects-*"))
