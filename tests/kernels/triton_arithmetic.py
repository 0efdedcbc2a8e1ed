"""Triton's interpreter, mended: so that results are held to the bits that the compiled kernels are meant to give, and sooner.

Up to Triton 3.8 its fused multiply-add rounds twice, and up to 3.9 an fp32 value becomes bf16 by cutting off its lower half.
Without these the tests would need a tolerance that also hides a multiply-add written where it should not be. And it believes
whatever a kernel says of an address, which a card would read 16 bytes from.
"""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs Triton")
tl = triton.language
interpreter = importlib.import_module("triton.runtime.interpreter")
InterpretedFunction, InterpreterBuilder = interpreter.InterpretedFunction, interpreter.InterpreterBuilder
element = importlib.import_module("sam_fused.ops.triton.element")
power, row_of = element.power, element.row_of

Array = np.ndarray


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b`` as its rounding and what that left out [Knuth]."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """``a b`` as its rounding and what that left out [Dekker]; for fp64 factors below 2^995."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x: Array) -> tuple[Array, Array]:
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high


def _sum_to_odd(a: Array, b: Array) -> Array:
    """``a + b`` rounded to whichever neighbour has an odd significand: a second rounding to fewer bits is then harmless."""
    total, left = _two_sum(a, b)
    even = (total.view(np.int64) & 1) == 0
    return np.where((left != 0) & even & np.isfinite(left), np.nextafter(total, np.where(left > 0, np.inf, -np.inf)), total)


def fused(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` rounded once, for fp32 and fp64 [Boldo and Melquiond 2008]."""
    with np.errstate(all="ignore"):
        plain = x * y + z
        if z.dtype == np.float32:
            once = _sum_to_odd(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)).astype(np.float32)
        else:
            high, low = _two_product(x, y)
            first, rest = _two_sum(z, low)
            total, left = _two_sum(high, first)
            once = total + _sum_to_odd(rest, left)
        return np.where(np.isfinite(plain) & np.isfinite(once), once, plain).astype(z.dtype)


def to_bfloat16(values: Array) -> Array:
    """fp32 to the bits of bf16: to nearest, ties to even; a NaN stays one, and quiet."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


_cast = InterpreterBuilder.cast_impl


def _create_fma(self, x, y, z):
    return interpreter.TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)


def _cast_impl(self, source, to):
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return interpreter.TensorHandle(to_bfloat16(source.data), tl.bfloat16)
    return _cast(self, source, to)


def _set_attribute(self, name, values):
    if name == "tt.divisibility":
        assert not any((self.data % value).any() for value in values), f"an address that is said to be a multiple of {values}"
    self.attr[name] = values


_call = InterpretedFunction.__call__


def _call_device_function(self, *args, **kwargs):
    # Every call of a function in a kernel makes Triton replace all of `tl`, which takes longer than what the function does.
    # The kernel's own launch has done it for functions that know no other module of Triton's.
    if self.fn.__globals__.get("tl") is tl:
        return self.rewrite()(*args, **kwargs)
    return _call(self, *args, **kwargs)


def mend(monkeypatch) -> None:
    monkeypatch.setattr(InterpretedFunction, "__call__", _call_device_function)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", _create_fma)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_impl)
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", _set_attribute)


@triton.jit
def write_power(to, base, exponent):
    tl.store(to, power(tl.load(base), exponent))


@triton.jit
def write_row(to, chunk, first_chunk, row, rows):
    tl.store(to, row_of(chunk, first_chunk, row, rows))
