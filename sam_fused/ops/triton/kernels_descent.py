# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""The kernels of the last pass: restore and base optimizer in one; built as those of ``kernels_ascent``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dtypes import CODES
from .element import (
    ACCUMULATOR,
    BACKUP,
    CHUNK_SIZE,
    DTYPES,
    FIRST_STEP,
    GROUP,
    LANES,
    NUMEL,
    ROW,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    STEP_DTYPE_SHIFT,
    WEIGHT,
    adam_moments,
    adam_weight,
    as_mask,
    block_at,
    copy,
    gradient,
    is_set,
    narrowed,
    power,
    read,
    read_if,
    rest_mask,
    row_of,
    scalar_or_one,
    sgd_direction,
    sgd_momentum,
    sgd_weight,
    square_root,
    whole_blocks,
    widened,
    write_if,
)

FLOAT64 = tl.constexpr(CODES[torch.float64])

# Every argument that is no constant of the compilation.
NOT_SPECIALIZED = (
    *("table", "first_chunk", "grads", "hyper", "share", "inv_scale", "found_inf", "clip", "ticket"),
    *("row", "rows", "chunk", "all_rows"),
)

# ---- what the last program of a launch does --------------------------------------------------------------------------------


@triton.jit
def is_last(ticket):
    """Whether all other programs of this launch have passed here, with all that they read before; resets the ticket then."""
    tl.debug_barrier()  # every warp's reads come before the one atomic
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _clear_first_steps(table, all_rows):
    for row in range(0, all_rows, LANES):
        rows = row + tl.arange(0, LANES)
        tl.store(table + rows * ROW + FIRST_STEP, tl.zeros([LANES], tl.int64), mask=rows < all_rows)


@triton.jit
def _advance_steps(table, all_rows):
    for row in range(0, all_rows, LANES):
        rows = row + tl.arange(0, LANES)
        there = rows < all_rows
        dtypes = tl.load(table + rows * ROW + DTYPES, mask=there, other=0)
        steps = tl.load(table + rows * ROW + STEP, mask=there, other=0)
        wide = ((dtypes >> STEP_DTYPE_SHIFT) & 0xFF) == FLOAT64
        pointers = steps.to(tl.pointer_type(tl.float64))
        tl.store(pointers, tl.load(pointers, mask=there & wide, other=0.0) + 1, mask=there & wide)
        pointers = steps.to(tl.pointer_type(tl.float32))
        narrow = there & (wide == 0)
        tl.store(pointers, tl.load(pointers, mask=narrow, other=0.0) + 1, mask=narrow)


@triton.jit
def _step_of(entry):
    """A row's step count, in fp64."""
    address = tl.load(entry + STEP)
    wide = ((tl.load(entry + DTYPES) >> STEP_DTYPE_SHIFT) & 0xFF) == FLOAT64
    if wide:
        step = tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        step = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return step


@triton.jit
def sign_of(maximize):
    return tl.where(maximize != 0, tl.full((), -1.0, tl.float64), tl.full((), 1.0, tl.float64))


# ---- SGD -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _sgd_block(roles, element, mask, constants, options, W, G, S, T, ACCUMULATES, BLOCK):
    weight, backup, grad, accumulator, state = roles
    share, grad_factor, weight_decay, momentum, one_minus_dampening, negative_lr = constants
    has_weight_decay, has_momentum, running, nesterov = options
    w = widened(read(block_at(backup, element, mask, W, BLOCK), mask), T)
    g = gradient(grad, accumulator, element, mask, share, G, T, ACCUMULATES, BLOCK)
    buffers = block_at(state, element, mask, S, BLOCK)
    v = widened(read_if(running, buffers, mask), T)
    d = sgd_direction(w, g, grad_factor, weight_decay, has_weight_decay)
    v = tl.where(running, sgd_momentum(d, v, momentum, one_minus_dampening), d)
    write_if(has_momentum, buffers, narrowed(v, S), mask)
    w = sgd_weight(w, d, v, negative_lr, momentum, nesterov)
    tl.store(block_at(weight, element, mask, W, BLOCK), narrowed(w, W), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def restore_sgd(
    table,
    first_chunk,
    grads,
    hyper,  # fp64 [groups, 6]: lr, momentum, dampening, weight_decay, nesterov, maximize
    share,  # what this micro-batch's gradient is weighted with, beside accumulators; None without
    inv_scale,
    found_inf,
    clip,
    ticket,
    row: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    all_rows: tl.int64,  # whose first steps end with this launch: those of the whole set, or none
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    end = tl.minimum(tl.load(entry + NUMEL), begin + CHUNK_SIZE)
    weight = tl.load(entry + WEIGHT)
    backup = tl.load(entry + BACKUP)
    state = tl.load(entry + STATE0)
    grad = tl.load(grads + row)
    ACCUMULATES: tl.constexpr = share is not None
    accumulator = tl.load(entry + ACCUMULATOR) if ACCUMULATES else grad
    first = tl.load(entry + FIRST_STEP) != 0
    skip = is_set(found_inf)
    if all_rows > 0:
        last = is_last(ticket)
        if last & (skip == 0):
            _clear_first_steps(table, all_rows)

    group = hyper + tl.load(entry + GROUP) * 6
    momentum = tl.load(group + 1)
    weight_decay = tl.load(group + 3)
    has_momentum = as_mask(momentum != 0)
    running = has_momentum & as_mask(first == 0)
    nesterov = has_momentum & as_mask(tl.load(group + 4) != 0)
    options = (as_mask(weight_decay != 0), has_momentum, running, nesterov)
    constants = (
        scalar_or_one(share).to(T),
        (scalar_or_one(inv_scale) * scalar_or_one(clip) * sign_of(tl.load(group + 5))).to(T),
        weight_decay.to(T),
        momentum.to(T),
        (1.0 - tl.load(group + 2)).to(T),
        (tl.load(group) * -1.0).to(T),
    )
    if skip:
        copy(weight, backup, begin, end, BITS, BLOCK)
    else:
        roles = (weight, backup, grad, accumulator, state)
        used = weight | backup | grad | accumulator | tl.where(has_momentum, state, 0)
        whole = begin + whole_blocks(end - begin, used, BLOCK)
        for element in range(begin, whole, BLOCK):
            _sgd_block(roles, element, None, constants, options, W, G, S, T, ACCUMULATES, BLOCK)
        for element in range(whole, end, BLOCK // 2):
            mask = rest_mask(element, end, BLOCK)
            _sgd_block(roles, element, mask, constants, options, W, G, S, T, ACCUMULATES, BLOCK // 2)


# ---- Adam and AdamW --------------------------------------------------------------------------------------------------------


@triton.jit
def _adam_block(roles, element, mask, constants, options, W, G, M, V, X, T, ACCUMULATES, BLOCK):
    weight, backup, grad, accumulator, exp_avg, exp_avg_sq, max_exp_avg_sq = roles
    share, factors = constants
    grad_factor, weight_decay, one_minus_beta1, beta2, one_minus_beta2, decay_factor, negative_step_size, bias2_sqrt, eps = (
        factors
    )
    coupled, amsgrad = options
    firsts = block_at(exp_avg, element, mask, M, BLOCK)
    seconds = block_at(exp_avg_sq, element, mask, V, BLOCK)
    maxima = block_at(max_exp_avg_sq, element, mask, X, BLOCK)
    w = widened(read(block_at(backup, element, mask, W, BLOCK), mask), T)
    g = gradient(grad, accumulator, element, mask, share, G, T, ACCUMULATES, BLOCK)
    m = widened(read(firsts, mask), T)
    v = widened(read(seconds, mask), T)
    largest = widened(read_if(amsgrad, maxima, mask), T)
    m, v = adam_moments(w, g, m, v, grad_factor, weight_decay, coupled, one_minus_beta1, beta2, one_minus_beta2)
    largest = tl.where((v > largest) | (v != v), v, largest)  # a NaN on either side stays one
    write_if(amsgrad, maxima, narrowed(largest, X), mask)
    tl.store(firsts, narrowed(m, M), mask=mask)
    tl.store(seconds, narrowed(v, V), mask=mask)
    second = tl.where(amsgrad, largest, v)
    w = adam_weight(w, m, second, decay_factor, negative_step_size, bias2_sqrt, eps)
    tl.store(block_at(weight, element, mask, W, BLOCK), narrowed(w, W), mask=mask)


@triton.jit
def _adam_constants(group, step, grad_factor, T: tl.constexpr):
    """What a step multiplies with, computed in fp64 and rounded once; whether weight decay is coupled; whether amsgrad."""
    lr = tl.load(group)
    beta1 = tl.load(group + 1)
    beta2 = tl.load(group + 2)
    weight_decay = tl.load(group + 4)
    decoupled = as_mask(tl.load(group + 5) != 0)
    taken = step.to(tl.int64)
    bias1 = 1.0 - power(beta1, taken)
    bias2 = 1.0 - power(beta2, taken)
    constants = (
        grad_factor.to(T),
        weight_decay.to(T),
        (1.0 - beta1).to(T),
        beta2.to(T),
        (1.0 - beta2).to(T),
        tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(T),
        (lr * -1.0 / bias1).to(T),
        square_root(bias2).to(T),
        tl.load(group + 3).to(T),
    )
    return constants, (as_mask(weight_decay != 0) & as_mask(decoupled == 0), as_mask(tl.load(group + 6) != 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def restore_adamw(
    table,
    first_chunk,
    grads,
    hyper,  # fp64 [groups, 8]: lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize
    share,  # what this micro-batch's gradient is weighted with, beside accumulators; None without
    inv_scale,
    found_inf,
    clip,
    ticket,
    row: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    all_rows: tl.int64,  # whose steps advance with this launch: those of the whole set, or none
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = is_set(found_inf)
    chunk += tl.program_id(0)
    row = row_of(chunk, first_chunk, row, rows)
    begin = (chunk - tl.load(first_chunk + row)) * CHUNK_SIZE
    entry = table + row * ROW
    end = tl.minimum(tl.load(entry + NUMEL), begin + CHUNK_SIZE)
    weight = tl.load(entry + WEIGHT)
    backup = tl.load(entry + BACKUP)
    exp_avg = tl.load(entry + STATE0)
    exp_avg_sq = tl.load(entry + STATE1)
    max_exp_avg_sq = tl.load(entry + STATE2)
    grad = tl.load(grads + row)
    ACCUMULATES: tl.constexpr = share is not None
    accumulator = tl.load(entry + ACCUMULATOR) if ACCUMULATES else grad
    step = 1 + _step_of(entry)
    if all_rows > 0:
        last = is_last(ticket)
        if last & (skip == 0):
            _advance_steps(table, all_rows)

    if skip:
        copy(weight, backup, begin, end, BITS, BLOCK)
    else:
        group = hyper + tl.load(entry + GROUP) * 8
        grad_factor = scalar_or_one(inv_scale) * scalar_or_one(clip) * sign_of(tl.load(group + 7))
        factors, options = _adam_constants(group, step, grad_factor, T)
        constants = (scalar_or_one(share).to(T), factors)
        roles = (weight, backup, grad, accumulator, exp_avg, exp_avg_sq, max_exp_avg_sq)
        used = weight | backup | grad | accumulator | exp_avg | exp_avg_sq | tl.where(options[1], max_exp_avg_sq, 0)
        whole = begin + whole_blocks(end - begin, used, BLOCK)
        for element in range(begin, whole, BLOCK):
            _adam_block(roles, element, None, constants, options, W, G, M, V, X, T, ACCUMULATES, BLOCK)
        for element in range(whole, end, BLOCK // 2):
            mask = rest_mask(element, end, BLOCK)
            _adam_block(roles, element, mask, constants, options, W, G, M, V, X, T, ACCUMULATES, BLOCK // 2)


@triton.jit(do_not_specialize=["table", "found_inf", "all_rows"])
def advance_steps(table, found_inf, all_rows: tl.int64):
    """One program, for a set of nothing but empty tensors: their steps advance all the same."""
    if is_set(found_inf) == 0:
        _advance_steps(table, all_rows)
