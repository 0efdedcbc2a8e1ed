# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""What the kernels are made of: finding a chunk, reading and writing a block, and the arithmetic of one element.

The arithmetic is that of ``csrc/element.h`` and its bits: contraction is off at every launch, so a multiply-add that is one
rounding is written ``tl.fma``; Triton's ``/`` and ``tl.sqrt`` are approximate in fp32, so quotients and roots have functions
here. Negation is a product with -1: Triton's unary minus is ``0 - x``, which loses the sign of zero. Values are converted to
the arithmetic's type right after they are read, because Triton would otherwise compute in the halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import CHUNK, COLUMNS, FIRST, ROLES, ROW_WORDS, column_of

ROW = tl.constexpr(ROW_WORDS)
NUMEL = tl.constexpr(COLUMNS.index("numel"))
GROUP = tl.constexpr(COLUMNS.index("group"))
SCALING = tl.constexpr(COLUMNS.index("scaling"))
FIRST_STEP = tl.constexpr(FIRST)
DTYPES = tl.constexpr(COLUMNS.index("dtypes"))
WEIGHT = tl.constexpr(column_of("weight"))
BACKUP = tl.constexpr(column_of("backup"))
STATE0 = tl.constexpr(column_of("state0"))
STATE1 = tl.constexpr(column_of("state1"))
STATE2 = tl.constexpr(column_of("state2"))
STEP = tl.constexpr(column_of("step"))
ACCUMULATOR = tl.constexpr(column_of("accumulator"))
STEP_DTYPE_SHIFT = tl.constexpr(8 * ROLES.index("step"))
CHUNK_SIZE = tl.constexpr(CHUNK)

# Prefix sums looked at in one go: two rounds find a chunk among 65,536 tensors.
LANES = tl.constexpr(256)

# ---- which tensor, which elements ---------------------------------------------------------------------------------------


@triton.jit
def row_of(chunk, first_chunk, row, rows):
    """The row, of ``rows`` from ``row`` on, that owns ``chunk``: the last one whose first chunk is not after it."""
    lanes = tl.arange(0, LANES)
    while rows > 1:
        stride = (rows + LANES - 1) // LANES
        probes = lanes * stride
        starts = tl.load(first_chunk + row + probes, mask=probes < rows, other=0x7FFFFFFFFFFFFFFF)
        passed = (tl.sum((starts <= chunk).to(tl.int32)) - 1) * stride
        row += passed
        rows = tl.minimum(stride, rows - passed)
    return row


@triton.jit
def whole_blocks(count, addresses, BLOCK: tl.constexpr):
    """How many of ``count`` elements lie in blocks that can be read 16 bytes at a time; ``addresses`` are or-ed together."""
    return tl.where((addresses & 15) == 0, count // BLOCK * BLOCK, 0)


@triton.jit
def rest_mask(element, end, BLOCK: tl.constexpr):
    """Of the next half block, the elements before ``end``.

    The rest goes in half blocks, because Triton lays out blocks of one shape alike: these are read element by element, which
    is fast with neighbours in neighbouring threads, and the whole ones with neighbours in one thread.
    """
    return element + tl.arange(0, BLOCK // 2) < end


# ---- reading and writing a block -----------------------------------------------------------------------------------------
#
# A block without a mask is whole and aligned. Where one role is not wanted, an option masks the whole block: that is the same
# for all threads, and leaves accesses as wide as they are.


@triton.jit
def block_at(address, element, mask, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to ``BLOCK`` elements from ``element`` on."""
    start = (address + element * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if mask is None:
        start = tl.multiple_of(start, 16)
    return start + tl.arange(0, BLOCK)


@triton.jit
def read(pointers, mask):
    """The stored values; 0 where masked."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def read_if(wanted, pointers, mask):
    if mask is None:
        return tl.load(pointers, mask=wanted, other=0.0)
    else:
        return tl.load(pointers, mask=mask & wanted, other=0.0)


@triton.jit
def write_if(wanted, pointers, values, mask):
    tl.store(pointers, values, mask=wanted if mask is None else mask & wanted)


@triton.jit
def widened(values, T: tl.constexpr):
    """Values of any storage dtype in the arithmetic's type."""
    if values.dtype.primitive_bitwidth == 16:
        return values.to(tl.float32).to(T)
    else:
        return values.to(T)


@triton.jit
def narrowed(values, DTYPE: tl.constexpr):
    """Values in a storage dtype, rounded to nearest; fp64 becomes a half by way of fp32, as on the CPU."""
    if DTYPE.primitive_bitwidth == 16:
        return values.to(tl.float32).to(DTYPE)
    else:
        return values.to(DTYPE)


@triton.jit
def gradient(grad, accumulator, element, mask, share, G, T, ACCUMULATES: tl.constexpr, BLOCK):
    """The block's gradient in the arithmetic's type; with accumulators, what they hold plus the weighted gradient."""
    g = widened(read(block_at(grad, element, mask, G, BLOCK), mask), T)
    if ACCUMULATES:
        g = accumulated(read(block_at(accumulator, element, mask, T, BLOCK), mask), g, share)
    return g


@triton.jit
def copy(to, source, begin, end, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies elements as the integers that their bits are, so that a NaN keeps its payload."""
    if to != source:
        whole = begin + whole_blocks(end - begin, to | source, BLOCK)
        for element in range(begin, whole, BLOCK):
            values = tl.load(block_at(source, element, None, BITS, BLOCK))
            tl.store(block_at(to, element, None, BITS, BLOCK), values)
        for element in range(whole, end, BLOCK // 2):
            mask = rest_mask(element, end, BLOCK)
            values = tl.load(block_at(source, element, mask, BITS, BLOCK // 2), mask=mask)
            tl.store(block_at(to, element, mask, BITS, BLOCK // 2), values, mask=mask)


# ---- the arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def quotient(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def scalar_or_one(scalar):
    """A 0-dim tensor's value in fp64, 1 where there is none."""
    if scalar is None:
        return tl.full((), 1.0, tl.float64)
    else:
        return tl.load(scalar).to(tl.float64)


@triton.jit
def is_set(flag):
    """Whether a 0-dim tensor is there and not 0. NaN is not 0."""
    if flag is None:
        return tl.full((), 0, tl.int1)
    else:
        return tl.load(flag) != 0


@triton.jit
def as_mask(condition):
    """A scalar condition that can be part of a mask.

    Compiled, it is that already; in the interpreter a comparison has the type of what was compared, and spread over a block it
    would be numbers.
    """
    return tl.where(condition, tl.full((), 1, tl.int1), tl.full((), 0, tl.int1))


@triton.jit
def double_product(a_high, a_low, b_high, b_low):
    """``(a_high + a_low) (b_high + b_low)`` as a sum of two fp64 numbers."""
    product = a_high * b_high
    error = tl.fma(a_high, b_high, product * -1.0)
    error = error + (a_high * b_low + a_low * b_high)
    high = product + error
    return high, error - (high - product)


@triton.jit
def power(base, exponent):
    """``base^exponent`` in fp64 for an integer ``exponent`` >= 0; ``power`` of ``csrc/element.h``.

    Binary powering on pairs of fp64 numbers: no library's ``pow``, which differ, and right to the last bit nearly always.
    """
    high = tl.full((), 1.0, tl.float64)
    low = tl.full((), 0.0, tl.float64)
    base_low = tl.full((), 0.0, tl.float64)
    while exponent > 0:
        taken_high, taken_low = double_product(high, low, base, base_low)
        odd = (exponent & 1) != 0
        high = tl.where(odd, taken_high, high)
        low = tl.where(odd, taken_low, low)
        base, base_low = double_product(base, base_low, base, base_low)
        exponent = exponent >> 1
    return high


@triton.jit
def accumulated(total, g, share):
    return tl.fma(share, g, total)


@triton.jit
def perturbed(w, g, c, adaptive):
    """``w + c g``; with T = ``|w|`` ``w + c w (w g)``."""
    return tl.fma(c, tl.where(adaptive, w * (w * g), g), w)


@triton.jit
def sgd_direction(w, g, grad_factor, weight_decay, has_weight_decay):
    g = g * grad_factor
    return tl.where(has_weight_decay, tl.fma(weight_decay, w, g), g)


@triton.jit
def sgd_momentum(d, v, momentum, one_minus_dampening):
    return tl.fma(one_minus_dampening, d, momentum * v)


@triton.jit
def sgd_weight(w, d, v, negative_lr, momentum, nesterov):
    """``v`` is the new momentum, or ``d`` where there is none."""
    return tl.fma(negative_lr, tl.where(nesterov, tl.fma(momentum, v, d), v), w)


@triton.jit
def adam_moments(w, g, m, v, grad_factor, weight_decay, coupled, one_minus_beta1, beta2, one_minus_beta2):
    """The gradient's two running averages."""
    g = g * grad_factor
    g = tl.where(coupled, tl.fma(weight_decay, w, g), g)
    m = tl.fma(one_minus_beta1, g - m, m)
    v = tl.fma(one_minus_beta2 * g, g, beta2 * v)
    return m, v


@triton.jit
def adam_weight(w, m, second, decay_factor, negative_step_size, bias2_sqrt, eps):
    denominator = quotient(square_root(second), bias2_sqrt) + eps
    return w * decay_factor + quotient(negative_step_size * m, denominator)
