"""Whether Triton can serve a device, what importing the backend costs, and the table: what needs no kernel."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sam_fused.ops import captures
from sam_fused.ops.dtypes import CODES
from sam_fused.ops.rows import CHUNK, build_rows
from sam_fused.ops.triton import availability, reason_not, transfer
from sam_fused.ops.triton.table import DeviceTable

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_for_the_first_time(monkeypatch):
    monkeypatch.setattr(availability, "_found", {})


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton 3.8 and one card on which launches work, as far as the question goes; and how often it launched."""
    launches = []
    triton = SimpleNamespace(__version__="3.8.0", knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(availability, "_launched", lambda device: launches.append(device))
    return SimpleNamespace(triton=triton, launches=launches)


def test_one_launch_for_each_device(machine):
    for device in (CUDA, CUDA, torch.device("cuda"), torch.device("cuda", 1)):
        assert reason_not(device) is None
    assert machine.launches == [CUDA, torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.9.9+git0123", True),
        ("3.10.0", False),
        ("4.0.0", False),
        ("2.9", False),
        ("x", False),
    ],
)
def test_versions(version, served, machine):
    machine.triton.__version__ = version
    reason = reason_not(CUDA)
    assert (reason is None) == served and bool(machine.launches) == served
    if reason is not None:
        assert version in reason and "expected 3.6 to 3.9" in reason and "pip install 'triton>=3.6,<3.10'" in reason


def test_no_triton(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in reason_not(CUDA) and "pip install" in reason_not(CUDA)


def test_a_triton_that_cannot_be_imported(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises
    assert "cannot be imported (" in reason_not(CUDA) and "pip install" in reason_not(CUDA)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices(device, machine):
    assert f"not {device}" in reason_not(torch.device(device)) and not machine.launches


def test_rocm(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    assert "ROCm" in reason_not(CUDA) and "foreach" in reason_not(CUDA)


def test_no_card(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in reason_not(CUDA) and reason_not(torch.device("cuda")) is not None


def test_interpreted(machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason_not(CPU) is None
    assert "TRITON_INTERPRET" in reason_not(CUDA) and not machine.launches


def test_during_a_capture_nothing_is_launched_and_nothing_remembered(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "capture" in reason_not(CUDA) and not machine.launches
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert reason_not(CUDA) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert reason_not(CUDA) is None and len(machine.launches) == 1


def test_a_launch_that_fails_is_remembered_with_its_first_line(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(availability, "_found", {})
    monkeypatch.setattr(availability, "_without_launching", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    attempts = []

    def fail(*args, **kwargs):
        attempts.append(args)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nSecond line")

    monkeypatch.setattr(availability, "by_value", fail)
    monkeypatch.setattr(availability, "may_wait", lambda device: torch.no_grad())
    reason = reason_not(CUDA)
    assert "RuntimeError: Failed to find C compiler" in reason and "Second line" not in reason
    assert "gcc or clang" in reason and "Python.h" in reason
    assert reason_not(CUDA) == reason and len(attempts) == 1


def test_imports_without_triton():
    """Neither installed nor wanted: the package imports, and says so."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from sam_fused.ops.triton import DOOR, KERNELS, reason_not
assert "not installed" in reason_not(torch.device("cuda", 0)), reason_not(torch.device("cuda", 0))
assert sorted(KERNELS) == ["grad_norm", "perturb_", "restore_", "restore_accumulate_", "restore_adamw_", "restore_sgd_"]
assert not [name for name in sys.modules if "kernels_" in name and "sam_fused" in name]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# ---- the table ---------------------------------------------------------------------------------------------------------------


def rows_of(*tensors: tuple[int, torch.dtype, torch.dtype], **options) -> torch.Tensor:
    weights = [torch.empty(numel, dtype=weight) for numel, weight, _ in tensors]
    return build_rows(
        {"weight": weights}, [numel for numel, _, _ in tensors], grad_dtypes=[grad for _, _, grad in tensors], **options
    )


def test_runs_of_one_signature():
    """Sorted by the gradients' dtype, then the weights', stable, empty ones last: what an operation reads lies together."""
    f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
    rows = rows_of(
        (CHUNK + 1, bf16, bf16), (3, f32, f32), (0, f32, f32), (CHUNK, bf16, f32), (5, f64, f64), (2 * CHUNK, f32, f32)
    )
    sets = DeviceTable(rows, CPU)
    assert [(run.dtypes, *run.place, run.chunks) for run in sets.runs("grad", "weight")] == [
        ((f32, f32), 0, 2, 0, 3),
        ((f32, bf16), 2, 1, 3, 1),
        ((f64, f64), 3, 1, 4, 1),
        ((bf16, bf16), 4, 1, 5, 2),
    ]
    assert [(run.dtypes, *run.place, run.chunks) for run in sets.runs("grad")] == [
        ((f32,), 0, 3, 0, 4),
        ((f64,), 3, 1, 4, 1),
        ((bf16,), 4, 1, 5, 2),
    ]
    addresses = torch.arange(6) * 100
    assert sets.grads(addresses).tolist() == [100, 500, 300, 400, 0, 200]
    words, first_chunk = sets.pointers()
    assert first_chunk.tolist() == [0, 1, 3, 4, 5, 7, 7]
    assert words[: 6 * rows.size(1)].view(6, -1)[:, 0].tolist() == [3, 2 * CHUNK, CHUNK, 5, CHUNK + 1, 0]


def test_a_role_that_is_not_there_costs_no_launch():
    """Half weights of which every second has no momentum: the empty tensor in its place is fp32."""
    weights = [torch.empty(4, dtype=torch.bfloat16) for _ in range(4)]
    buffers = [torch.empty(4 * (i % 2), dtype=torch.bfloat16 if i % 2 else torch.float32) for i in range(4)]
    rows = build_rows({"weight": weights, "state0": buffers}, [4] * 4, grad_dtypes=[torch.bfloat16] * 4)
    (run,) = DeviceTable(rows, CPU).runs("grad", "weight", "state0")
    assert run.dtypes == (torch.bfloat16,) * 3 and run.rows == 4


def test_accumulators_where_there_is_a_weight_in_the_dtype_of_the_arithmetic():
    """That of the gradient for its norm, of the weight elsewhere; of empty tensors nothing is asked."""
    f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16

    def table_of(*accumulators: torch.dtype | None, grad: torch.dtype) -> DeviceTable:
        tensors = {
            "weight": [torch.empty(size, dtype=bf16) for size in (4, 0, 4)],
            "accumulator": [torch.empty(0) if dtype is None else torch.empty(4, dtype=dtype) for dtype in accumulators],
        }
        return DeviceTable(build_rows(tensors, [4, 0, 4], grad_dtypes=[grad] * 3), CPU)

    fitting = table_of(f32, None, f32, grad=f64)
    for _ in range(2):
        fitting.check_accumulators("weight", True)
        with pytest.raises(ValueError, match=rf"expected {f64} for tensor 0 because there is a weight, got {f32}:"):
            fitting.check_accumulators("grad", True)
        with pytest.raises(ValueError, match=rf"expected none for tensor 0 because there is no weight, got {f32}:"):
            fitting.check_accumulators("weight", False)
    for second, got in ((None, "none"), (bf16, bf16), (f64, f64)):
        with pytest.raises(ValueError, match=rf"expected {f32} for tensor 2 because there is a weight, got {got}:"):
            table_of(f32, None, second, grad=bf16).check_accumulators("grad", True)
    table_of(None, None, None, grad=bf16).check_accumulators("weight", False)


def test_every_dtype_has_a_code_that_comes_back():
    for dtype in CODES:
        (run,) = DeviceTable(rows_of((1, dtype, dtype)), CPU).runs("weight", "grad")
        assert run.dtypes == (dtype, dtype)


# ---- captures: what a graph reads is its own, or kept for ever ---------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch):
    """A switch that says whether a capture is going on. Memory stays on the CPU."""
    state = SimpleNamespace(on=False)
    monkeypatch.setattr(captures, "is_capturing", lambda device: state.on)
    state.kept = {}
    with captures.kept_in(state.kept):
        yield state


def test_what_a_capture_makes_is_not_kept(capturing):
    """A graph fills it when it is replayed, and not before."""
    sets = DeviceTable(rows_of((5, torch.float32, torch.float32)), CPU)
    hyper, addresses = torch.ones(1, 2, dtype=torch.float64), torch.tensor([77])
    capturing.on = True
    made = [sets.pointers()[0], sets.slots(), sets.ticket(), sets.hyper(hyper), sets.grads(addresses)]
    capturing.on = False
    again = [sets.pointers()[0], sets.slots(), sets.ticket(), sets.hyper(hyper), sets.grads(addresses)]
    assert not any(a is b for a, b in zip(made, again, strict=True)) and not capturing.kept
    kept = [sets.pointers()[0], sets.slots(), sets.ticket(), sets.hyper(hyper), sets.grads(addresses)]
    assert all(a is b for a, b in zip(again, kept, strict=True))


def test_what_a_capture_reads_outlives_its_set(capturing):
    sets = DeviceTable(rows_of((5, torch.float32, torch.float32)), CPU)
    hyper, addresses = torch.ones(1, 2, dtype=torch.float64), torch.tensor([77])
    before = [sets.pointers()[0], sets.slots(), sets.ticket(), sets.hyper(hyper)]
    kept_addresses = sets.grads(addresses)
    capturing.on = True
    during = [sets.pointers()[0], sets.slots(), sets.ticket(), sets.hyper(hyper)]
    assert all(a is b for a, b in zip(before, during, strict=True))
    assert list(capturing.kept) == [id(tensor) for tensor in before]
    # The addresses may be dropped for newer ones at any time, so a graph has its own.
    assert sets.grads(addresses) is not kept_addresses


def test_a_first_step_cannot_be_captured_unprepared(capturing):
    """Every replay would bring ``first`` back."""
    sets = DeviceTable(rows_of((5, torch.float32, torch.float32), first=[1]), CPU)
    capturing.on = True
    with pytest.raises(RuntimeError, match="one step before capturing"):
        sets.pointers()
    capturing.on = False
    sets.pointers()
    capturing.on = True
    sets.pointers()
    sets.first_steps_taken()
    assert sets.has_first_steps  # the graph has not run yet
    capturing.on = False
    sets.first_steps_taken()
    assert not sets.has_first_steps


def test_uploads_go_by_value_in_a_capture(monkeypatch):
    """And pinned, asynchronously, otherwise."""
    by_value = []
    words = torch.arange(3)
    monkeypatch.setattr(transfer, "by_value", lambda words, device: by_value.append((words, device)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    transfer.to_device(words, CUDA)
    assert by_value == [(words, CUDA)]
    there = transfer.to_device(words, CPU)
    assert torch.equal(there, words) and there.data_ptr() != words.data_ptr() and len(by_value) == 1
