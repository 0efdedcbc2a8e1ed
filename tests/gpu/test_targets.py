"""The benchmark's verdicts: from the numbers, never about a row that was not measured."""

import argparse
import csv

import pytest
from rich.console import Console

from benchmarks import gpu
from benchmarks.gpu import GPU_SETS, file_name
from benchmarks.gpu_report import KernelRow, StepRow, targets, write_csv
from benchmarks.report import REQUIRED
from benchmarks.variants import BASELINES

OURS = ("ours_native", "ours_triton")


def kernel(percent=None, set_name="resnet50", op="perturb_"):
    return KernelRow(set_name, "fp32", "native", op, 161, 25_557_032, 409_000_000, percent_of_copy=percent)


def step(variant, set_name="resnet50", **figures):
    return StepRow(set_name, "fp32", "sgd", variant, variant, 161, 25_557_032, **figures)


def verdicts(*rows):
    kernels = [row for row in rows if isinstance(row, KernelRow)]
    steps = [row for row in rows if isinstance(row, StepRow)]
    return {target.what.rsplit(": ")[-1]: target.verdict for target in targets(kernels, steps, OURS)}


@pytest.mark.parametrize(("found", "verdict"), [(90.0, "reached"), (89.99, "not reached"), (None, "not measured")])
def test_bandwidth(found, verdict):
    assert verdicts(kernel(found)) == {"% of copy": verdict}


def test_bandwidth_is_asked_of_large_sets_and_of_what_a_step_launches():
    assert verdicts(kernel(10.0, "tiny"), kernel(10.0, op="restore_")) == {}


def test_launches_and_host_time():
    few = step("ours_native", kernels=3, copies=0, host_ms=0.15)
    assert verdicts(few) == {"launches": "reached", "host ms": "reached"}
    # A copy keeps a graph from being what it seems as much as a kernel does.
    many = step("ours_triton", kernels=4, copies=1, host_ms=0.21)
    assert verdicts(many) == {"launches": "not reached", "host ms": "not reached"}
    assert set(verdicts(step("ours_native")).values()) == {"not measured"}


@pytest.mark.parametrize(
    ("variant", "set_name", "ratio", "verdict"),
    [
        ("naive", "tiny", 10.0, "reached"),
        ("naive", "lora", 9.9, "not reached"),
        ("naive", "gpt_1b", 2.0, "reached"),
        ("torch_compile", "tiny", 1.19, "not reached"),
        ("torch_compile", "gpt_1b", None, "not measured"),
    ],
)
def test_ratios(variant, set_name, ratio, verdict):
    assert list(verdicts(step(variant, set_name, ratio_to_ours=ratio)).values()) == [verdict]


def test_baselines_have_no_launches_to_keep():
    assert verdicts(step("naive", kernels=900, copies=2, host_ms=5.0)) == {}


def test_the_sets_are_the_cpus_and_a_billion():
    assert set(GPU_SETS) == {*REQUIRED, "gpt_1b"}


def test_csv_holds_every_row(tmp_path):
    write_csv(tmp_path / "rows.csv", [kernel(91.0)], [step("naive", reason="not measured: 0 s were left")])
    with (tmp_path / "rows.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["kind"], first["op"], first["percent_of_copy"]) == ("operation", "perturb_", "91.0")
    assert (second["kind"], second["variant"], second["median_ms"]) == ("step", "naive", "")
    assert second["reason"] == "not measured: 0 s were left"


def test_file_names():
    assert file_name("NVIDIA H100 80GB HBM3").startswith("nvidia-h100-80gb-hbm3-20")


def test_every_form_of_a_baseline_has_a_row_of_its_own():
    """A baseline is as good as its best form, and which one that is a GPU decides."""
    options = argparse.Namespace(rehearse=True, quick=True, sets=None, seconds=1.0)
    rows = [(name, title) for name, title, _, _ in gpu.Run(options, Console())._wanted(BASELINES, ours=False)]
    assert len(rows) == len(set(rows)) == sum(len(variant.forms) for variant in BASELINES) > len(BASELINES)
