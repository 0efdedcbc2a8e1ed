"""What the right kernels of kernels.cu give, whatever the order. A sanitized process runs these checks too."""

import ctypes
import itertools

import numpy as np

from tests.kernels.build_emulated import ORDERS, Emulated

LANES = np.arange(32)


def p(array):
    """Its address, for ctypes."""
    return ctypes.c_void_p(array.ctypes.data)


def check_block_sums(kernels):
    """Whole numbers: a lane or a warp that is missing shows."""
    for blocks, threads in ((1, 32), (3, 64), (2, 512), (1, 1024)):
        x = np.arange(1, blocks * threads + 1, dtype=np.float32) % 1009
        out = np.zeros_like(x)
        assert kernels.block_sums(blocks, threads, p(x), p(out)), kernels.message
        assert np.array_equal(out, np.repeat(x.reshape(blocks, threads).sum(axis=1), threads))


def check_grid_sum(kernels):
    """Who is last does not matter: the slots are added in a fixed order. Rounded sums, so another order would show."""
    random = np.random.default_rng(3)
    x = random.standard_normal(70 * 64).astype(np.float32) * np.logspace(-3, 3, 70 * 64).astype(np.float32)
    slots, ticket, out = np.full(70, np.nan, np.float32), np.zeros(1, np.uint32), np.full(1, np.nan, np.float32)
    for _ in range(2):  # the ticket is ready for another launch
        assert kernels.grid_sum(70, 64, p(x), p(slots), p(ticket), p(out)), kernels.message
        assert ticket[0] == 0

    def tree(values):
        """As warp_sum and block_sum add, of 64 values."""
        warps = values.reshape(2, 32)
        for width in (16, 8, 4, 2, 1):
            warps = warps[:, :width] + warps[:, width : 2 * width]
        return warps[0, 0] + warps[1, 0]

    totals = np.array([tree(block) for block in x.reshape(70, 64)])
    assert np.array_equal(slots, totals)
    mine = np.pad(totals, (0, 128 - 70)).reshape(2, 64)
    assert out[0] == tree(mine[0] + mine[1])


def check_shuffles(kernels):
    """The lane that each kind reads, as the CUDA programming guide has it."""
    lanes = np.tile(LANES, 2)
    for width, amount in itertools.product((1, 2, 4, 8, 16, 32), (0, 1, 2, 5, 8, 16, 31)):
        out = np.full((4, 64), -1, np.int32)
        assert kernels.shuffles(64, amount, width, p(out)), kernels.message
        first = lanes // width * width
        down, up, other = lanes + amount, lanes - amount, lanes ^ amount
        assert np.array_equal(out[0], first + amount % width)
        assert np.array_equal(out[1], np.where(up >= first, up, lanes))
        assert np.array_equal(out[2], np.where(down < first + width, down, lanes))
        assert np.array_equal(out[3], np.where(other < first + width, other, lanes))


TYPES = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "unsigned": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
}


def check_types(kernels):
    """Every byte of every type travels, and NaNs keep their payload."""
    for name, dtype in TYPES.items():
        x = np.random.default_rng(4).integers(0, 256, 32 * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
        out = np.zeros_like(x)
        assert getattr(kernels, f"exchange_{name}")(p(x), p(out)), kernels.message
        assert out.tobytes() == x[LANES ^ 1].tobytes(), name


def check_votes(kernels):
    some = np.arange(96) % 7 == 3
    for holds in (some, np.zeros(96, bool), np.ones(96, bool), np.arange(96) == 95):
        x = np.where(holds, -5, 0).astype(np.int32)  # any value that is not zero holds
        out = np.full((6, 96), 9, np.uint32)
        assert kernels.votes(96, p(x), p(out)), kernels.message
        warps = holds.reshape(3, 32)
        by_warp = (warps @ (1 << LANES), warps.any(axis=1), warps.all(axis=1))
        wanted = [np.full(96, holds.sum()), np.full(96, holds.any()), np.full(96, holds.all())]
        wanted += [np.repeat(values, 32) for values in by_warp]
        assert np.array_equal(out, np.array(wanted))


def check_halves(kernels):
    """Lanes of one warp may meet in groups, and a block may end in half a warp."""
    out = np.full(80, -1, np.int32)
    assert kernels.halves(80, p(out)), kernels.message
    assert np.array_equal(out, [20 + (20 ^ 15)] * 64 + [5] * 16)


def check_places(kernels):
    for grid, block in (((5, 1, 1), (64, 1, 1)), ((2, 3, 4), (4, 3, 5)), ((1, 2, 1), (1, 2, 33))):
        grid_words, block_words = np.array(grid, np.uint32), np.array(block, np.uint32)
        out = np.full((np.prod(grid), np.prod(block), 2, 3), 99, np.uint32)
        assert kernels.places(p(grid_words), p(block_words), p(out)), kernels.message
        for which, size in ((0, grid), (1, block)):
            z, y, x = np.unravel_index(np.arange(np.prod(size)), size[::-1])
            wanted = np.stack([x, y, z], axis=1)
            wanted = wanted[:, None] if which == 0 else wanted[None]
            assert np.array_equal(out[:, :, which], np.broadcast_to(wanted, out[:, :, which].shape))


def check_by_value(kernels):
    """32,752 bytes and a pointer, a copy for each thread."""
    table, out = np.random.default_rng(5).integers(0, 2**62, 4094), np.zeros(4094, np.int64)
    assert kernels.by_value(p(table), p(out)), kernels.message
    assert np.array_equal(out, table)


def check_packs(kernels):
    memory = np.arange(2 * 64 * 4 + 4, dtype=np.float32)
    start = -memory.ctypes.data % 16 // 4
    x = memory[start : start + 512]
    target = np.zeros_like(memory)
    out = target[-target.ctypes.data % 16 // 4 :][:512]
    assert kernels.packs(64, p(x), p(out)), kernels.message
    assert np.array_equal(out, x)


RIGHT = (
    check_block_sums,
    check_grid_sum,
    check_shuffles,
    check_types,
    check_votes,
    check_halves,
    check_places,
    check_by_value,
    check_packs,
)


def check_everything(path):
    """In a process of its own; also after launches that were given up in the middle of their kernels."""
    library = Emulated(path)
    for threads, blocks in itertools.product(ORDERS, ORDERS):
        library.set_orders(threads, blocks, 17)
        assert not library.early_return(64) and not library.barrier_in_two_branches(512)
        for check in RIGHT:
            check(library)
    print("all right")
