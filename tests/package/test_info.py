"""The report of `python -m sam_fused.info` and the build record it reads, for builds other than this machine's."""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest

from sam_fused import info
from sam_fused._record import build_record
from sam_fused.ops import backends, native

BUILT = {
    "mode": "auto",
    "version": "0.1.0",
    "native": {"cpu": True},
    "reason": None,
    "torch": "2.11.0",
    "compiler": "g++ 12.2.0",
}


CUDA = {
    **BUILT,
    "native": {"cpu": True, "cuda": True},
    "cuda": {
        "reason": None,
        "toolkit": "13.0.88",
        "torch_cuda": "13.0",
        "architectures": ["8.0", "12.0+PTX"],
        "left_out": [],
    },
}


NO_CUDA_LIBRARY = native.CudaStatus(False, "none was built", ())


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this process report another build: machine(record, status, devices)."""

    def pretend(record, status, devices, cuda=NO_CUDA_LIBRARY):
        path = tmp_path / "_build_record.json"
        path.write_text(json.dumps(record))
        monkeypatch.setattr(info, "build_record", lambda: build_record(path))
        monkeypatch.setattr(native, "status", lambda: status)
        monkeypatch.setattr(native, "cuda_status", lambda: cuda)
        monkeypatch.setattr(backends, "report", lambda: devices)

    return pretend


def test_report_names_compiler_capability_and_every_device(machine, capsys):
    devices = [
        {"device": "cpu", "backend": "native", "reason": "built"},
        {"device": "cuda:0", "backend": "foreach", "reason": "no kernels for cuda"},
    ]
    machine(BUILT, native.NativeStatus(True, None, "avx2"), devices)
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert "sam_fused 0.1.0" in printed
    assert "built: native CPU kernels, with g++ 12.2.0 against torch 2.11.0" in printed
    assert "loaded, CPU kernels compiled for avx2" in printed
    assert "  cpu     native: built" in printed
    assert "  cuda:0  foreach: no kernels for cuda" in printed


def test_report_tells_a_library_that_does_not_load_from_one_that_was_not_built(machine, capsys):
    machine(BUILT, native.NativeStatus(False, "undefined symbol", None), [])
    info.main([])
    assert "native library: built but not loaded: undefined symbol" in capsys.readouterr().out

    not_built = {**BUILT, "native": {"cpu": False}, "reason": "expected a compiler; install g++"}
    machine(not_built, native.NativeStatus(False, "expected a compiler; install g++", None), [])
    info.main([])
    printed = capsys.readouterr().out
    assert "built: no native kernels: expected a compiler; install g++" in printed
    assert "native library: none" in printed


def test_report_says_for_which_cards_the_cuda_kernels_are_or_why_there_are_none(machine, capsys):
    status = native.NativeStatus(True, None, "avx2")
    machine(CUDA, status, [], native.CudaStatus(True, None, ("8.0", "12.0+PTX")))
    info.main([])
    printed = capsys.readouterr().out
    assert "built: CUDA kernels for 8.0 12.0+PTX, with nvcc 13.0.88 against torch's CUDA 13.0" in printed
    assert "native CUDA library: loaded, for 8.0 12.0+PTX" in printed
    assert "no CUDA kernels" not in printed

    machine(CUDA, status, [], native.CudaStatus(False, "libtorch_cuda.so is missing", ()))
    info.main([])
    assert "native CUDA library: built but not loaded: libtorch_cuda.so is missing" in capsys.readouterr().out

    machine({**CUDA, "cuda": {**CUDA["cuda"], "left_out": ["7.5"]}}, status, [])
    info.main([])
    assert "for 8.0 12.0+PTX (not for 7.5, older than the kernels can serve), with" in capsys.readouterr().out

    none = {"reason": "expected nvcc, found none; install it", "toolkit": None, "torch_cuda": None}
    without = {**CUDA, "native": {"cpu": True, "cuda": False}, "cuda": {**CUDA["cuda"], **none, "architectures": []}}
    machine(without, status, [])
    info.main([])
    assert "built: no CUDA kernels: expected nvcc, found none; install it" in capsys.readouterr().out


def test_a_record_from_before_there_were_cuda_kernels_is_still_read(machine):
    machine(BUILT, native.NativeStatus(True, None, "avx2"), [])
    record = info.build_record()
    assert record.native_cpu and record.compiler == "g++ 12.2.0" and record.reason is None
    assert not record.native_cuda and record.architectures == ()
    assert "before there were CUDA kernels" in record.cuda_reason
    assert "pip install --no-build-isolation ." in record.cuda_reason


def test_json_is_one_object_with_the_same_facts(machine, capsys):
    machine(BUILT, native.NativeStatus(True, None, "avx512"), [{"device": "cpu", "backend": "native", "reason": "built"}])
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["build"]["torch"] == "2.11.0"
    assert facts["native"] == {"loaded": True, "reason": None, "capability": "avx512"}
    assert facts["devices"] == [{"device": "cpu", "backend": "native", "reason": "built"}]


def _installed(monkeypatch, *folders):
    def distribution(folder):
        return SimpleNamespace(locate_file=lambda name: folder / name)

    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: map(distribution, folders))


def test_a_clone_that_hides_the_installed_package_says_so(tmp_path, monkeypatch):
    """Started in the clone's folder Python takes the clone, whatever was installed; a build's egg-info lies in both."""
    clone, site_packages = tmp_path / "clone", tmp_path / "site-packages"
    for folder in (clone, site_packages):
        (folder / "sam_fused").mkdir(parents=True)
    _installed(monkeypatch, clone, site_packages)
    reason = build_record(clone / "sam_fused" / "_build_record.json").reason
    assert "hides" in reason and "another folder" in reason
    _installed(monkeypatch, clone)
    assert "never built" in build_record(clone / "sam_fused" / "_build_record.json").reason


def test_a_tree_that_was_never_built_says_so(tmp_path, monkeypatch):
    _installed(monkeypatch)
    record = build_record(tmp_path / "missing.json")
    assert not record.native_cpu
    assert "never built" in record.reason
    assert "pip install --no-build-isolation ." in record.reason


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"native": true}', "\x00", json.dumps({**CUDA, "cuda": None})])
def test_an_unreadable_record_is_a_reason_and_not_an_error(tmp_path, text):
    path = tmp_path / "_build_record.json"
    path.write_text(text)
    record = build_record(path)
    assert not record.native_cpu and not record.native_cuda
    assert "unreadable" in record.reason
