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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this process report another build: machine(record, status, devices)."""

    def pretend(record, status, devices):
        path = tmp_path / "_build_record.json"
        path.write_text(json.dumps(record))
        monkeypatch.setattr(info, "build_record", lambda: build_record(path))
        monkeypatch.setattr(native, "status", lambda: status)
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"native": true}', "\x00"])
def test_an_unreadable_record_is_a_reason_and_not_an_error(tmp_path, text):
    path = tmp_path / "_build_record.json"
    path.write_text(text)
    record = build_record(path)
    assert not record.native_cpu
    assert "unreadable" in record.reason
