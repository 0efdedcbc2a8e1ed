"""The Triton kernels compiled ahead of time for the cards of four generations: widths, roundings, registers.

Without TRITON_INTERPRET, which would leave nothing to compile.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.triton import transfer
from tests.kernels.triton_compiler import CAPABILITIES, Kernel, compile_for, empty_like, fresh_caches  # noqa: F401
from tests.kernels.triton_doors import CPU, by_lists, by_rows
from tests.ops.cases import Case, Entry
from tests.ops.runner import make_lists

THREADS = 256
ACCESS = 16  # bytes

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Weights and gradients, optimizer state: the same throughout, and half weights with wide state.
SIGNATURES = {"fp32": (F32, F32), "fp64": (F64, F64), "bf16": (BF16, BF16), "fp16": (F16, F16), "bf16+fp32": (BF16, F32)}

WEIGHT = {"weight": 0.25}
ACCUMULATE = Case("accumulate", "restore_accumulate_", scalars=WEIGHT)
FRESH = Case("accumulate-fresh", "restore_accumulate_", scalars=WEIGHT, fresh=True)

EVERYTHING = {"inv_scale": 0.5, "found_inf": 0.0, "clip": 0.5}
SGD = Case("sgd", "restore_sgd_", ((0.1, 0.9, 0.3, 0.01, 1, 0), (0.1, 0, 0, 0, 0, 0)), first=(0, 1), scalars=EVERYTHING)
ADAM = Case(
    "adam",
    "restore_adamw_",
    ((0.01, 0.9, 0.999, 1e-8, 0.1, 0, 1, 0), (0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0)),
    steps=(4.0,),
    scalars=EVERYTHING,
)
SGD_ACCUMULATED = replace(SGD, name="sgd-accumulated", scalars=EVERYTHING | WEIGHT)
ADAM_ACCUMULATED = replace(ADAM, name="adam-accumulated", scalars=EVERYTHING | WEIGHT)
OPERATIONS = (
    Case("norm", "grad_norm", scalars={"inv_scale": 0.5}),
    Case("norm-adaptive", "grad_norm", scaling=(1, 0)),
    Case("norm-accumulated", "grad_norm", scaling=(1, 0), scalars=WEIGHT),
    Case("perturb", "perturb_", ((0.05, 1e-12),), scaling=(0, 1), scalars={"inv_scale": 0.5}),
    Case("perturb-backup_exists", "perturb_", ((0.05, 1e-12),), backup_exists=True),
    Case("restore", "restore_"),
    ACCUMULATE,
    FRESH,
    SGD,
    SGD_ACCUMULATED,
    ADAM,
    ADAM_ACCUMULATED,
)

# For each kernel, in whole blocks: the roles (weights, gradients, accumulators, state) that the operation reads and writes, and
# that the copy moves, which restores or stands in where nothing moves or a step is skipped; fused multiply-adds of one element,
# but for those of a norm's squares; addresses that the operation and the copy take.
#                            reads  writes  copy  fma  addresses
PLAN = {
    "norm": ("g", "", "", 0, 1),
    "norm-adaptive": ("gw", "", "", 0, 2),
    "norm-accumulated": ("gwa", "", "", 1, 3),
    "perturb": ("wg", "ww", "w", 1, 5),
    "perturb-backup_exists": ("wg", "w", "w", 1, 5),
    "restore": ("", "", "w", 0, 2),
    "accumulate": ("ga", "a", "w", 1, 4),
    "accumulate-fresh": ("g", "a", "w", 0, 4),
    "sgd": ("wgs", "sw", "w", 4, 6),
    "sgd-accumulated": ("wgas", "sw", "w", 5, 7),
    "adam": ("wgsss", "sssw", "w", 3, 8),
    "adam-accumulated": ("wgasss", "sssw", "w", 4, 9),
}


def sizes(signature) -> dict[str, int]:
    """The roles' elements, in bytes."""
    weight, state = signature
    return {"w": weight.itemsize, "g": weight.itemsize, "a": arithmetic_dtype(weight).itemsize, "s": state.itemsize}


ENTRIES = (Entry((17,)), Entry((0,)), Entry((40000,)))


def lists_for(case, signature, entries=ENTRIES):
    weight, state = signature
    lists = make_lists(entries, [weight], case)
    for role in ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        setattr(lists, role, empty_like(getattr(lists, role), state))
    return lists


@pytest.fixture(params=CAPABILITIES, ids=lambda c: f"sm_{c}")
def capability(request):
    return request.param


@pytest.fixture(params=OPERATIONS, ids=str)
def operation(request):
    return request.param


@pytest.fixture(params=SIGNATURES)
def signature(request):
    return SIGNATURES[request.param]


KERNELS: dict[tuple, Kernel] = {}


@pytest.fixture
def kernel(capability, operation, signature, compile_for) -> Kernel:  # noqa: F811
    """The operation's kernel, compiled once for all tests."""
    key = (capability, operation.name, signature)
    if key not in KERNELS:
        KERNELS[key] = compile_for(capability, lambda: by_lists(operation, lists_for(operation, signature)))[0]
    return KERNELS[key]


def test_widths(kernel, operation, signature):
    """Whole blocks move 16 bytes at a time, for every role, and nothing else does: what a mask cuts may end anywhere."""
    reads, writes, copy, _, addresses = PLAN[operation.name]
    block = kernel.constants["BLOCK"]
    accesses = {role: block * size / THREADS / ACCESS for role, size in sizes(signature).items()}
    assert all(number >= 1 and number == int(number) for number in accesses.values())
    wide = r"\.global(\.\w+)*\.(v4\.b32|v2\.b64)"
    assert kernel.count("ld" + wide) == sum(accesses[role] for role in reads + copy)
    assert kernel.count("st" + wide) == sum(accesses[role] for role in writes + copy)
    for mine, machines in (("ld", "LDG"), ("st", "STG")):  # the assembler may have unrolled a loop
        found = sum(number for name, number in kernel.sass.items() if re.match(rf"{machines}\.E(\.\w+)*\.128", name))
        assert found >= kernel.count(mine + wide)
    # What is said to be aligned has been looked at; the rest, by element, has not.
    aligned = re.findall(r"tt\.int_to_ptr .*tt\.divisibility = dense<16>", kernel.ttgir)
    scalar = re.findall(r"tt\.int_to_ptr .* : i64 -> ", kernel.ttgir)
    steps = 2 if operation.op == "restore_adamw_" else 0  # fp32 or fp64
    assert len(aligned) == addresses and len(scalar) == 2 * len(aligned) + steps


def test_nothing_spills(kernel):
    """And two programs fit a multiprocessor."""
    assert not kernel.spills()
    assert kernel.resources["REG"] <= 65536 // (2 * THREADS)


def test_values_stay_in_their_threads(kernel, operation, signature):
    """No value goes through shared memory; but where widths are mixed, Triton deals wide results out again for each store."""
    size = sizes(signature)
    stored_wider = sum(size[role] > size["w"] for role in PLAN[operation.name][1])
    assert kernel.ttgir.count("ttg.convert_layout") == stored_wider


def test_roundings(kernel, operation, signature):
    """What is fused is what is written as fma, to the instruction; quotients and roots are correctly rounded."""
    assert kernel.kernel.metadata.enable_fp_fusion is False
    arithmetic = signature[0] == F64
    is_adam = operation.op == "restore_adamw_"
    # A thread's elements of a whole block, and of the half block that the rest goes in.
    elements = kernel.constants.get("BLOCK", 0) // THREADS * 3 // 2
    written = elements * PLAN[operation.name][3]
    powers = 4 if is_adam else 0  # two products of two doubles for each of two powers, in loops
    squares = elements if operation.op == "grad_norm" and not arithmetic else 0  # of fp64 values they are products
    in_fp32 = kernel.count(r"fma\.rn\.f32") + 2 * kernel.count(r"fma\.rn\.f32x2")
    in_fp64 = kernel.count(r"fma\.rn\.f64")
    assert (in_fp32, in_fp64) == ((0, written + powers) if arithmetic else (written, powers + squares))
    assert not kernel.count(r".*\.(approx|full|ftz)(\..*)?")
    roots = elements if is_adam else 0
    fp = "f64" if arithmetic else "f32"
    once = {"f64": 1 if is_adam else 0, "f32": 0}[fp]  # of a bias correction, in fp64
    assert kernel.count(rf"sqrt\.rn\.{fp}") == roots + once
    once = {"f64": 1 if is_adam or operation.op == "perturb_" else 0, "f32": 0}[fp]
    assert kernel.count(rf"div\.rn\.{fp}") == 2 * roots + once


@pytest.mark.parametrize("operation", [ACCUMULATE, FRESH, SGD, SGD_ACCUMULATED], ids=str, indirect=True)
def test_the_assembler_fuses_nothing_either(kernel, operation, signature):
    """PTX's mul and add may be contracted when they are assembled. (Quotients have fused ones of their own.)"""
    name, other = (r"DFMA(\.|$)", r"FFMA2?(\.|$)") if signature[0] == F64 else (r"FFMA2?(\.|$)", r"DFMA(\.|$)")
    fused = {n: count * (2 if n.startswith("FFMA2") else 1) for n, count in kernel.sass.items()}
    written = kernel.constants["BLOCK"] // THREADS * 3 // 2 * PLAN[operation.name][3]
    assert sum(n for key, n in fused.items() if re.match(name, key)) == written
    assert not any(re.match(other, key) for key in fused)


@pytest.mark.parametrize("operation", [SGD, SGD_ACCUMULATED, ADAM, ADAM_ACCUMULATED], ids=str, indirect=True)
@pytest.mark.parametrize("signature", ["fp32"], indirect=True)
def test_everything_is_read_before_the_ticket_is_taken(kernel):
    """One atomic, with acquire and release, after a barrier that no load of a step count can be behind."""
    ticket = r"atom\.global\.gpu\.acq_rel\.add\.u32"
    assert kernel.count(r"atom\..*") == kernel.count(ticket) == 1
    before, after = re.split(ticket, kernel.ptx)
    assert before.rindex("bar.sync") > before.rindex("ld.global")
    assert "bar.sync" in after


def test_elements_are_counted_in_64_bits(kernel, operation):
    loops = re.findall(r"scf\.for .*? : (i\d+)", kernel.ttgir)
    assert len(loops) >= 2 and set(loops) == {"i64"}
    for address in re.findall(r"tt\.int_to_ptr %\S+(?: \{[^}]*\})? : (i\d+)", kernel.ttgir):
        assert address == "i64"


@pytest.mark.parametrize("run", [by_lists, by_rows], ids=["lists", "rows"])
def test_sizes_and_alignments_need_no_further_compilation(run, operation, compile_for):  # noqa: F811
    """Neither a count of 1 or 16, nor an operand at an odd address: a model's second step must not wait for a compiler."""
    distinct = set()
    for entries in ((Entry((1,)),), (Entry((16,)),) * 16, (Entry((32768,)),) * 3, (Entry((17,), "offset"),) * 257):
        lists = lists_for(operation, SIGNATURES["fp32"], entries)
        kernels = compile_for(90, lambda lists=lists: run(operation, lists))
        distinct |= {id(kernel.kernel) for kernel in kernels}
        names = {kernel.name for kernel in kernels}
    assert len(distinct) == len(names) == (2 if operation.op == "grad_norm" else 1)


def test_words_need_no_further_compilation(compile_for):  # noqa: F811
    from sam_fused.ops.triton.kernels_transfer import write_words

    fresh_caches(write_words)
    kernels = []
    for words in ([0] * 64, [1] * 64, [16, -1, 2**62, -(2**63)] * 50):
        values = torch.tensor(words, dtype=torch.int64)
        kernels += compile_for(90, lambda values=values: transfer.by_value(values, CPU))
    assert len(kernels) == 6 and len({id(kernel.kernel) for kernel in kernels}) == 1
    assert kernels[0].count(r"st\.global.*b64") == 64


@pytest.mark.parametrize("run", [by_lists, by_rows], ids=["lists", "rows"])
def test_the_sum_of_the_slots(run, capability, compile_for):  # noqa: F811
    """Overflows are counted where there is a counter: rows have one here."""
    finish = compile_for(capability, lambda: run(OPERATIONS[0], lists_for(OPERATIONS[0], SIGNATURES["fp32"])))[1]
    assert finish.count(r"st\.global(\.\w+)*\.b64") == (run is by_rows)
    assert finish.name == "finish_norm" and not finish.spills()
    assert finish.count(r"sqrt\.rn\.f64") == 1 and not finish.count(r"fma\..*|.*\.(approx|full|ftz)(\..*)?")


def test_a_set_of_empty_tensors(capability, compile_for):  # noqa: F811
    lists = lists_for(ADAM, SIGNATURES["fp32"], (Entry((0,)), Entry((3, 0))))
    (kernel,) = compile_for(capability, lambda: by_lists(ADAM, lists))
    assert kernel.name == "advance_steps" and not kernel.spills()
