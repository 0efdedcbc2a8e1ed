"""The CPU kernels on single chunks, every compilation in one process: conversions, streaming, borders, the same bits."""

import ctypes
import itertools
import os

import numpy as np
import pytest
import torch

ROLES = ("weight", "backup", "grad", "state0", "state1", "state2", "step", "accumulator")
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
HALVES = (torch.float16, torch.bfloat16)
SGD = (-0.1, 0.9, 0.7, 0.01, -0.5)
ADAM = (0.1, 0.999, 0.001, 1e-8, 0.1, 0.999, -0.02, 0.3, 0.7)


def row_of(scaling=0, first=0, **tensors):
    """A TensorRow, as ops/prepared.py writes it."""
    dtypes, addresses = 0, [0] * 8
    for role, tensor in tensors.items():
        dtypes |= CODES[tensor.dtype] << 8 * ROLES.index(role)
        addresses[ROLES.index(role)] = tensor.data_ptr()
    words = [tensors["weight"].numel(), 0, scaling, first, dtypes, *addresses]
    return (ctypes.c_int64 * 13)(*words)


def run(table, kernel, row, begin, count, *, stream=0):
    """Returns the three sums of ``sum_of_squares``; the others return nothing."""
    place = (row, ctypes.c_int64(begin), ctypes.c_int64(count))
    if kernel == "sum_of_squares":
        out = (ctypes.c_double * 3)()
        table.sum_of_squares(*place, ctypes.c_double(1.0), out)
        return tuple(out)
    if kernel in ("perturb", "perturb_again"):
        table.perturb(*place, ctypes.c_double(0.3), 1, int(kernel != "perturb"), stream)
    elif kernel == "restore":
        table.restore(*place, stream)
    elif kernel == "sgd":
        table.sgd(*place, (ctypes.c_double * 5)(*SGD), 1, stream)
    else:
        table.adam(*place, (ctypes.c_double * 9)(*ADAM), 1, int(kernel == "amsgrad"), stream)
    return None


WRITES = {
    "perturb": ("weight", "backup"),
    "perturb_again": ("weight",),
    "restore": ("weight",),
    "sgd": ("weight", "state0"),
    "adam": ("weight", "state0", "state1"),
    "amsgrad": ("weight", "state0", "state1", "state2"),
}
GUARD = 40


def tensors_for(weight, other, size, offset=0, seed=0):
    """All roles, each inside a block with a guard on either side. Includes what arithmetic does not like."""
    generator = torch.Generator().manual_seed(seed)
    blocks, found = [], {}
    for role in ROLES[:6]:
        dtype = weight if role in ("weight", "backup") else other
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        if role in ("state1", "state2"):
            values = values.abs()
        if role in ("weight", "backup", "grad") and size > 20:
            specials = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-310, 6e-8, 65504.0, 3e38]
            values[3:13] = torch.tensor(specials, dtype=torch.float64)
        block = torch.full((size + 2 * GUARD,), 7.0, dtype=dtype)
        found[role] = block[GUARD + offset : GUARD + offset + size]
        found[role].copy_(values.to(dtype))
        blocks.append((block, found[role]))
    return found, blocks


def bits(tensor):
    """With every NaN the same: which payload an operation on two of them keeps is the machine's choice."""
    tensor = tensor.clone()
    tensor[tensor.isnan()] = torch.nan
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def guards_hold(blocks):
    for block, view in blocks:
        view.fill_(7.0)
        if not bool((block == 7).all()):
            return False
    return True


# ---- conversions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_survives_restore_and_arithmetic(tables, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    nan = every.isnan()
    for name, table in tables.items():
        for stream in (0, 1):
            weight, grad = torch.zeros(2**16, dtype=dtype), torch.full((2**16,), -0.0, dtype=dtype)
            row = row_of(weight=weight, backup=every, grad=grad)
            run(table, "restore", row, 0, 2**16, stream=stream)
            assert torch.equal(weight.view(torch.int16), every.view(torch.int16)), name
            # w + c * -0.0 is w for every w, negative zero included: what is left is widening and narrowing.
            run(table, "perturb_again", row, 0, 2**16, stream=stream)
            assert torch.equal(weight.view(torch.int16)[~nan], every.view(torch.int16)[~nan]), name
            assert torch.equal(weight.isnan(), nan), name


def _floats_around(dtype):
    """Every finite half, the midpoint above it, and the fp32 numbers on either side of both; then anything at all."""
    magnitudes = torch.arange(0, 0x7C00 if dtype is torch.float16 else 0x7F80, dtype=torch.int32).to(torch.int16).view(dtype)
    below, above = magnitudes[:-1].double(), magnitudes[1:].double()
    largest = magnitudes[-1:].double()
    past_the_end = largest + (largest - magnitudes[-2:-1].double()) / 2
    points = torch.cat([below, (below + above) / 2, largest, past_the_end]).float()
    around = torch.cat([points.view(torch.int32) + step for step in (-1, 0, 1)]).view(torch.float32)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32)
    return torch.cat(
        [around, -around, random, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, 3.4e38, 1e-45])]
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_narrowing_rounds_as_torch_does(tables, dtype):
    values = _floats_around(dtype)
    wanted = values.to(dtype)
    for name, table in tables.items():
        # A momentum buffer of half precision that is created takes d, which without decay and scaling is the fp32 gradient.
        weight, buffer = torch.zeros(values.numel(), dtype=dtype), torch.zeros(values.numel(), dtype=dtype)
        row = row_of(weight=weight, backup=weight, grad=values, state0=buffer, first=1)
        constants = (ctypes.c_double * 5)(-0.1, 0.9, 1, 0, 1)
        for begin, count in ((0, values.numel() - 3), (values.numel() - 3, 3)):
            table.sgd(row, ctypes.c_int64(begin), ctypes.c_int64(count), constants, 0, 0)
        differ = bits(buffer) != bits(wanted)
        assert not bool(differ.any()), f"{name}: {values[differ][:3].tolist()} became {buffer[differ][:3].tolist()}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_widening_is_exact(tables, dtype):
    """Into fp32 and fp64 arithmetic, body and tail."""
    every = torch.arange(-(2**15), 2**15 - 5, dtype=torch.int32).to(torch.int16).view(dtype)
    for wide in (torch.float32, torch.float64):
        for name, table in tables.items():
            buffer = torch.zeros(every.numel(), dtype=wide)
            weight = torch.zeros(every.numel(), dtype=wide)
            row = row_of(weight=weight, backup=weight, grad=every, state0=buffer, first=1)
            table.sgd(row, ctypes.c_int64(0), ctypes.c_int64(every.numel()), (ctypes.c_double * 5)(0, 0.9, 1, 0, 1), 0, 0)
            assert torch.equal(bits(buffer), bits(every.to(wide))), name


# ---- the same bits --------------------------------------------------------------------------------------------------------

SIZES = (1, 7, 8, 9, 31, 33, 511, 513, 1500)


@pytest.mark.parametrize("kernel", ["sum_of_squares", *WRITES])
def test_every_compilation_gives_the_same_bits(tables, kernel):
    for weight in CODES:
        for other in CODES:
            for size in SIZES:
                for adaptive in (0, 1) if kernel in ("sum_of_squares", "perturb") else (0,):
                    found = {}
                    for name, table in tables.items():
                        tensors, blocks = tensors_for(weight, other, size, offset=size % 3)
                        if kernel == "sum_of_squares":
                            tensors["grad"].nan_to_num_(0.5, 3.0, -3.0)
                            tensors["weight"].nan_to_num_(0.5, 3.0, -3.0)
                        result = run(table, kernel, row_of(scaling=adaptive, **tensors), 0, size)
                        written = [bits(tensors[role]).tolist() for role in WRITES.get(kernel, ())]
                        found[name] = (result, written)
                        assert guards_hold(blocks), (name, kernel, weight, other, size)
                    first = found.pop("default")
                    assert all(value == first for value in found.values()), (kernel, weight, other, size, adaptive)


@pytest.mark.parametrize("kernel", WRITES)
def test_streaming_and_cutting_change_nothing(tables, kernel):
    """Streamed or not, whole or in ragged pieces out of order, at any alignment: the same bits, and nothing beside them."""
    size = 1300
    cuts = [0, 1, 8, 40, 41, 552, 1064, 1291, size]
    pieces = list(itertools.pairwise(cuts))
    for name, table in tables.items():
        for weight, other in ((w, o) for w in CODES for o in (torch.float32, w)):
            wanted, _ = tensors_for(weight, other, size)
            run(table, kernel, row_of(**wanted), 0, size)
            for offset in (0, 1, 5, 31):
                tensors, blocks = tensors_for(weight, other, size, offset=offset)
                row = row_of(**tensors)
                order = np.random.default_rng(offset).permutation(len(pieces))
                for index in order if offset else [None]:
                    begin, end = (0, size) if index is None else pieces[index]
                    run(table, kernel, row, begin, end - begin, stream=1)
                for role in WRITES[kernel]:
                    assert torch.equal(bits(tensors[role]), bits(wanted[role])), (name, kernel, weight, other, offset, role)
                assert guards_hold(blocks), (name, kernel, weight, other, offset)


def test_what_does_not_move_is_copied(tables):
    """A zero coefficient with an infinite gradient: the weight's bits stay, and a backup that does not exist gets them."""
    for table in tables.values():
        for dtype in CODES:
            for backup_exists in (0, 1):
                tensors, _ = tensors_for(dtype, dtype, 100)
                tensors["grad"].fill_(torch.inf)
                before = {role: tensors[role].clone() for role in ("weight", "backup")}
                row = row_of(**tensors)
                table.perturb(row, ctypes.c_int64(0), ctypes.c_int64(100), ctypes.c_double(0.0), 0, backup_exists, 0)
                assert torch.equal(bits(tensors["weight"]), bits(before["weight"]))
                assert torch.equal(bits(tensors["backup"]), bits(before["backup" if backup_exists else "weight"]))


# ---- the sum of squares -----------------------------------------------------------------------------------------------------


def test_sums_of_squares_are_exact_where_they_can_be(tables):
    """Whole numbers: any wrong lane, tail or order that drops an element shows."""
    for size in (*SIZES, 32768):
        values = torch.arange(1, size + 1) % 1000 + 1
        wanted = float((values.double() ** 2).sum())
        for dtype in (torch.float32, torch.float64):
            for table in tables.values():
                grad = values.to(dtype)
                small, middle, big = run(table, "sum_of_squares", row_of(weight=grad, grad=grad), 0, size)
                assert (small, middle, big) == (0, wanted, 0)


def test_three_accumulators_of_fp64(tables):
    """Beyond 2^400 and below 2^-400, squares are kept scaled by 2^-600 and 2^600."""
    grad = torch.tensor([2.0**401, 2.0**400, 1.0, 2.0**-400, 2.0**-401], dtype=torch.float64)
    wanted = ((2.0**-401 * 2.0**600) ** 2, 2.0**800, (2.0**401 * 2.0**-600) ** 2)
    for table in tables.values():
        assert run(table, "sum_of_squares", row_of(weight=grad, grad=grad), 0, 5) == wanted


# ---- choosing ------------------------------------------------------------------------------------------------------------


def test_without_multiversioning_there_is_one_compilation(plain):
    library, tables = plain
    assert list(tables) == ["plain default"] and library.chosen_name() == b"default"


def test_with_it_the_widest_that_runs_is_chosen(multiversion):
    library, tables = multiversion
    names = [table.name for table in tables.values()]
    assert names[0] == "default"
    if "SAM_FUSED_CPU_CAPABILITY" not in os.environ:
        assert library.chosen_name().decode() == names[-1]
