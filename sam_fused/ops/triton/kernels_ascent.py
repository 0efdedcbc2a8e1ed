# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""The kernels of the first pass, and the restores without a base step. A program works on one chunk of one tensor, in blocks.

Every kernel gets the table of rows, the rows' first chunks, and a range of rows of one signature: the storage dtypes, which are
constants of the compilation, as is ``T``, the arithmetic's type. What differs within a set (weight decay, momentum, adaptive,
...) is read from memory and is the same for a whole program: it selects, or masks a whole block. Such a mask keeps accesses
128 bits wide, which one that cuts a block does not; so whole blocks and the rest are two loops.

No argument is specialised on its value: a size that happens to be 1 or a multiple of 16 would mean another compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .element import (
    ACCUMULATOR,
    BACKUP,
    CHUNK_SIZE,
    GROUP,
    NUMEL,
    ROW,
    SCALING,
    WEIGHT,
    as_mask,
    block_at,
    copy,
    gradient,
    is_finite,
    narrowed,
    perturbed,
    read,
    read_if,
    rest_mask,
    row_of,
    scalar_or_one,
    square_root,
    whole_blocks,
    widened,
)

# ---- the norm ------------------------------------------------------------------------------------------------------------


@triton.jit
def _values(roles, element, mask, constants, G, W, T, SCALED: tl.constexpr, ACCUMULATES, BLOCK):
    """The values whose squares are summed, in fp64: T g inv_scale. Scaled before squaring, in the gradient's arithmetic."""
    grad, weight, accumulator = roles
    adaptive, share, inv_scale = constants
    g = gradient(grad, accumulator, element, mask, share, G, T, ACCUMULATES, BLOCK) * inv_scale
    x = g.to(tl.float64)
    if SCALED:
        w = widened(read_if(adaptive, block_at(weight, element, mask, W, BLOCK), mask), T).to(tl.float64)
        x = tl.where(adaptive, w * x, x)
    return x


@triton.jit
def _no_squares(BLOCK: tl.constexpr):
    """Accumulators, one in each lane: of x 2^600, x and x 2^-600."""
    return tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)


@triton.jit
def _plus_squares(small, middle, big, x, WIDE: tl.constexpr):
    """Adds squares: of fp32 values they are exact in fp64; of fp64 ones beyond 2^+-400 are kept scaled by 2^-+600."""
    if WIDE:
        size = tl.abs(x)
        is_big = size > 2.0**400
        is_small = size < 2.0**-400
        scaled = x * tl.where(is_big, tl.full((), 2.0**-600, tl.float64), tl.full((), 2.0**600, tl.float64))
        square = scaled * scaled
        big += tl.where(is_big, square, 0.0)
        small += tl.where(is_small, square, 0.0)
        middle += tl.where(is_big | is_small, 0.0, x * x)  # NaN too
    else:
        middle = tl.fma(x, x, middle)
    return small, middle, big


@triton.jit(
    do_not_specialize=[
        *("table", "first_chunk", "grads", "slots", "share", "inv_scale"),
        *("row", "rows", "chunk", "all_chunks"),
    ]
)
def sum_of_squares(
    table,
    first_chunk,
    grads,
    slots,  # fp64 [3, all_chunks]: of x 2^600, x, x 2^-600
    share,  # what this micro-batch's gradient is weighted with, beside accumulators; None without
    inv_scale,
    row: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    all_chunks: tl.int64,
    G: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    SCALED: tl.constexpr,  # whether any tensor of the set is adaptive
    BLOCK: tl.constexpr,
):
    """Each chunk's sum of squares into its own slot."""
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    numel = tl.load(entry + NUMEL)
    grad = tl.load(grads + row)
    weight = tl.load(entry + WEIGHT) if SCALED else grad
    ACCUMULATES: tl.constexpr = share is not None
    accumulator = tl.load(entry + ACCUMULATOR) if ACCUMULATES else grad
    adaptive = as_mask(tl.load(entry + SCALING) == 1)
    roles = (grad, weight, accumulator)
    constants = (adaptive, scalar_or_one(share).to(T), scalar_or_one(inv_scale).to(T))
    WIDE: tl.constexpr = G.primitive_bitwidth == 64

    end = tl.minimum(numel, begin + CHUNK_SIZE)
    whole = begin + whole_blocks(end - begin, grad | accumulator | tl.where(adaptive, weight, grad), BLOCK)
    small, middle, big = _no_squares(BLOCK)
    for element in range(begin, whole, BLOCK):
        x = _values(roles, element, None, constants, G, W, T, SCALED, ACCUMULATES, BLOCK)
        small, middle, big = _plus_squares(small, middle, big, x, WIDE)
    rest_small, rest_middle, rest_big = _no_squares(BLOCK // 2)
    for element in range(whole, end, BLOCK // 2):
        mask = rest_mask(element, end, BLOCK)
        x = _values(roles, element, mask, constants, G, W, T, SCALED, ACCUMULATES, BLOCK // 2)
        rest_small, rest_middle, rest_big = _plus_squares(rest_small, rest_middle, rest_big, x, WIDE)
    tl.store(slots + all_chunks + chunk, tl.sum(middle) + tl.sum(rest_middle))
    if WIDE:
        tl.store(slots + chunk, tl.sum(small) + tl.sum(rest_small))
        tl.store(slots + 2 * all_chunks + chunk, tl.sum(big) + tl.sum(rest_big))


@triton.jit
def _norm_of(small, middle, big):
    """The root of three sums whose scales are 2^600, 1 and 2^-600; a smaller one matters only if the next is empty or close."""
    one = tl.full((), 1.0, tl.float64)
    up = tl.full((), 2.0**600, tl.float64)
    down = tl.full((), 2.0**-600, tl.float64)
    low = tl.where(middle != 0, middle + small * down * down, small)
    low_scale = tl.where(middle != 0, one, down)
    return square_root(tl.where(big != 0, big + middle * down * down, low)) * tl.where(big != 0, up, low_scale)


@triton.jit
def _slot_sum(slots, begin, end, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    for start in range(begin, end, LANES):
        sums += tl.load(slots + start + lanes, mask=start + lanes < end, other=0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["slots", "norm", "found_inf", "overflows", "chunks", "wide_begin", "wide_end"])
def finish_norm(
    slots,
    norm,
    found_inf,
    overflows,
    chunks: tl.int64,
    wide_begin: tl.int64,  # the chunks of fp64 gradients, which alone have three slots
    wide_end: tl.int64,
    LANES: tl.constexpr,
):
    """One program: the slots, in fixed order, become the norm; where that, as it is stored, is not finite, the flag becomes 1.0
    and ``overflows`` one more."""
    small = _slot_sum(slots, wide_begin, wide_end, LANES)
    middle = _slot_sum(slots + chunks, 0, chunks, LANES)
    big = _slot_sum(slots + 2 * chunks, wide_begin, wide_end, LANES)
    length = _norm_of(small, middle, big).to(norm.dtype.element_ty)
    tl.store(norm, length)
    finite = is_finite(length)
    tl.store(found_inf, tl.where(finite, 0.0, 1.0))
    if overflows is not None:
        tl.store(overflows, tl.load(overflows) + tl.where(finite, 0, 1))


# ---- perturb, restore, accumulate ------------------------------------------------------------------------------------------


@triton.jit
def _perturb_block(weight, backup, grad, element, mask, c, adaptive, KEEP: tl.constexpr, W, G, T, BLOCK):
    """``KEEP``: the clean weight goes into the backup; otherwise it comes from there."""
    weights = block_at(weight, element, mask, W, BLOCK)
    backups = block_at(backup, element, mask, W, BLOCK)
    g = widened(read(block_at(grad, element, mask, G, BLOCK), mask), T)
    clean = read(weights if KEEP else backups, mask)
    if KEEP:
        tl.store(backups, clean, mask=mask)
    tl.store(weights, narrowed(perturbed(widened(clean, T), g, c, adaptive), W), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("table", "first_chunk", "grads", "norm", "hyper", "inv_scale"),
        *("mark", "number", "row", "rows", "chunk"),
    ]
)
def perturb(
    table,
    first_chunk,
    grads,
    norm,
    hyper,  # fp64 [groups, 2]: rho, perturb_eps
    inv_scale,
    mark,  # gets `number`: this launch took place
    number: tl.int64,
    row: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(mark, number)
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    end = tl.minimum(tl.load(entry + NUMEL), begin + CHUNK_SIZE)
    weight = tl.load(entry + WEIGHT)
    backup = tl.load(entry + BACKUP)
    grad = tl.load(grads + row)
    adaptive = as_mask(tl.load(entry + SCALING) == 1)

    group = hyper + tl.load(entry + GROUP) * 2
    length = tl.load(norm).to(tl.float64)
    c = (tl.load(group) / (length + tl.load(group + 1)) * scalar_or_one(inv_scale)).to(T)
    if is_finite(length) & (length != 0) & is_finite(c) & (c != 0):
        whole = begin + whole_blocks(end - begin, weight | backup | grad, BLOCK)
        for element in range(begin, whole, BLOCK):
            _perturb_block(weight, backup, grad, element, None, c, adaptive, KEEP, W, G, T, BLOCK)
        for element in range(whole, end, BLOCK // 2):
            mask = rest_mask(element, end, BLOCK)
            _perturb_block(weight, backup, grad, element, mask, c, adaptive, KEEP, W, G, T, BLOCK // 2)
    elif KEEP:  # a copy, not a product with zero: fma(0, inf, w) is NaN
        copy(backup, weight, begin, end, BITS, BLOCK)
    else:
        copy(weight, backup, begin, end, BITS, BLOCK)


@triton.jit(do_not_specialize=["table", "first_chunk", "row", "rows", "chunk"])
def restore(table, first_chunk, row: tl.int64, rows: tl.int64, chunk: tl.int64, BITS: tl.constexpr, BLOCK: tl.constexpr):
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    end = tl.minimum(tl.load(entry + NUMEL), begin + CHUNK_SIZE)
    copy(tl.load(entry + WEIGHT), tl.load(entry + BACKUP), begin, end, BITS, BLOCK)


@triton.jit
def _accumulate_block(grad, accumulator, element, mask, share, FRESH: tl.constexpr, G, T, BLOCK):
    total = gradient(grad, accumulator, element, mask, share, G, T, not FRESH, BLOCK)
    tl.store(block_at(accumulator, element, mask, T, BLOCK), share * total if FRESH else total, mask=mask)


@triton.jit(do_not_specialize=["table", "first_chunk", "grads", "share", "row", "rows", "chunk"])
def restore_accumulate(
    table,
    first_chunk,
    grads,
    share,  # what this micro-batch's gradient is weighted with
    row: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    G: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    FRESH: tl.constexpr,  # accumulators are written and not read: they may hold anything
    BLOCK: tl.constexpr,
):
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    end = tl.minimum(tl.load(entry + NUMEL), begin + CHUNK_SIZE)
    copy(tl.load(entry + WEIGHT), tl.load(entry + BACKUP), begin, end, BITS, BLOCK)
    grad = tl.load(grads + row)
    accumulator = tl.load(entry + ACCUMULATOR)
    factor = tl.load(share).to(T)
    whole = begin + whole_blocks(end - begin, grad | accumulator, BLOCK)
    for element in range(begin, whole, BLOCK):
        _accumulate_block(grad, accumulator, element, None, factor, FRESH, G, T, BLOCK)
    for element in range(whole, end, BLOCK // 2):
        mask = rest_mask(element, end, BLOCK)
        _accumulate_block(grad, accumulator, element, mask, factor, FRESH, G, T, BLOCK // 2)
