"""element.h against exact fractions: every operation rounded once, to nearest, ties to even, and every fma fused."""

import ctypes
from fractions import Fraction

import numpy as np
import pytest

FORMATS = {np.float32: (24, -149, ctypes.c_float, "float"), np.float64: (53, -1074, ctypes.c_double, "double")}
TYPES = pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: d.__name__)


def rounded(exact, dtype):
    """The nearest number of ``dtype``, ties to even; exact for results in range."""
    if exact == 0:
        return Fraction(0)
    bits, smallest, _, _ = FORMATS[dtype]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, smallest)
    return round(exact / unit) * unit  # Python rounds a Fraction's ties to even


class Rounded:
    """Arithmetic that rounds after each operation."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, exact):
        return rounded(exact, self.dtype)

    def fma(self, a, b, c):
        return self(a * b + c)

    def mul(self, a, b):
        return self(a * b)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def awkward(dtype, count=600):
    """Weights and gradients whose product, with c, cancels, ties or vanishes; and plain ones."""
    random = np.random.default_rng(11)
    c = dtype(0.3)
    g = random.standard_normal(count).astype(dtype)
    w = random.standard_normal(count).astype(dtype)
    third = count // 3
    # Cancelling: the product rounded away from, so that only a fused operation keeps what is left of it.
    w[:third] = -(c * g[:third])
    # Small beside large, and down among the subnormals.
    w[third : third + 50] *= dtype(2.0) ** dtype(40)
    tiny = dtype(2.0) ** (-140 if dtype is np.float32 else -1060)
    w[third + 50 : third + 100] *= tiny
    g[third + 50 : third + 100] *= tiny
    w[third + 100 : third + 105] = 0
    return w, g, c


def exact(array):
    return [Fraction(float(x)) for x in array]


def assert_equal(got, wanted):
    assert [Fraction(float(x)) for x in got] == wanted


@TYPES
@pytest.mark.parametrize("adaptive", [0, 1])
def test_perturb(plan_and_element, dtype, adaptive):
    w, g, c = awkward(dtype)
    out = np.empty_like(w)
    _, _, c_type, name = FORMATS[dtype]
    getattr(plan_and_element, f"perturb_{name}")(
        ctypes.c_int64(w.size), pointer(w), pointer(g), c_type(c), adaptive, pointer(out)
    )
    r, k = Rounded(dtype), Fraction(float(c))
    direction = [r.mul(a, r.mul(a, b)) if adaptive else b for a, b in zip(exact(w), exact(g), strict=True)]
    assert_equal(out, [r.fma(k, d, a) for d, a in zip(direction, exact(w), strict=True)])


SGD = {
    "plain": ((-0.1, 0, 1, 0, 1), 0),
    "weight_decay": ((-0.1, 0, 1, 0.01, 1), 0),
    "momentum": ((-0.1, 0.9, 1, 0, 1), 0),
    "dampening": ((-0.1, 0.9, 0.7, 0.01, 1), 0),
    "nesterov": ((-0.1, 0.9, 1, 0.01, 1), 1),
    "scaled": ((-0.1, 0.9, 1, 0.01, -0.37), 0),
    "first": ((-0.1, 0.9, 0.7, 0.01, 1), 4),
    "first nesterov": ((-0.1, 0.9, 1, 0, 1), 5),
}


@TYPES
@pytest.mark.parametrize("constants, flags", SGD.values(), ids=SGD)
def test_sgd(plan_and_element, dtype, constants, flags):
    w, g, _ = awkward(dtype)
    v = np.random.default_rng(12).standard_normal(w.size).astype(dtype)
    out, before, k = np.empty_like(w), v.copy(), np.array(constants, dtype=dtype)
    getattr(plan_and_element, f"sgd_{FORMATS[dtype][3]}")(
        ctypes.c_int64(w.size), pointer(w), pointer(g), pointer(k), flags, pointer(v), pointer(out)
    )
    r = Rounded(dtype)
    negative_lr, momentum, keep, decay, factor = exact(k)
    wanted_w, wanted_v = [], []
    for a, b, buffer in zip(exact(w), exact(g), exact(before), strict=True):
        b = r.mul(b, factor)
        d = r.fma(decay, a, b) if decay else b
        update = d
        if momentum:
            buffer = d if flags & 4 else r.fma(keep, d, r.mul(momentum, buffer))
            update = r.fma(momentum, buffer, d) if flags & 1 else buffer
        wanted_v.append(buffer)
        wanted_w.append(r.fma(negative_lr, update, a))
    assert_equal(out, wanted_w)
    assert_equal(v, wanted_v)


# flags, grad_factor
ADAM = {"adam": (0, 1), "adamw": (1, 1), "adam scaled": (0, -0.7), "adam amsgrad": (4, 1), "adamw amsgrad": (5, 1)}


@TYPES
@pytest.mark.parametrize("flags, factor", ADAM.values(), ids=ADAM)
def test_adam(plan_and_element, dtype, flags, factor):
    random = np.random.default_rng(13)
    w, g, m = (random.standard_normal(400).astype(dtype) for _ in range(3))
    v, largest = (random.random(400).astype(dtype) for _ in range(2))
    k = np.array([0.1, 0.999, 0.001, 1e-8, 0.1, 0.999 if flags & 1 else 1, -0.02, 0.3, factor], dtype=dtype)
    out, before = np.empty_like(w), [exact(x) for x in (m, v, largest)]
    getattr(plan_and_element, f"adam_{FORMATS[dtype][3]}")(
        ctypes.c_int64(w.size),
        pointer(w),
        pointer(g),
        pointer(k),
        flags,
        pointer(m),
        pointer(v),
        pointer(largest),
        pointer(out),
    )
    r = Rounded(dtype)
    rest1, beta2, rest2, eps, decay, shrink, negative_step, bias2_sqrt, factor = exact(k)
    wanted = [[], [], [], []]
    for a, b, m0, v0, x0 in zip(exact(w), exact(g), *before, strict=True):
        b = r.mul(b, factor)
        if flags & 1:
            a = r.mul(a, shrink)
        else:
            b = r.fma(decay, a, b)
        m1 = r.fma(rest1, r(b - m0), m0)
        v1 = r.fma(r.mul(rest2, b), b, r.mul(beta2, v0))
        x1 = max(x0, v1) if flags & 4 else x0
        # numpy's square root is IEEE's: correctly rounded.
        root = Fraction(float(np.sqrt(dtype(float(x1 if flags & 4 else v1)))))
        denominator = r(r(root / bias2_sqrt) + eps)
        for found, value in zip(wanted, (r(a + r(r.mul(negative_step, m1) / denominator)), m1, v1, x1), strict=True):
            found.append(value)
    for got, value in zip((out, m, v, largest), wanted, strict=True):
        assert_equal(got, value)


@TYPES
def test_amsgrad_keeps_nan(plan_and_element, dtype):
    """As torch.maximum does, on either side."""
    nan = np.array([np.nan, 1.0], dtype=dtype)
    w, g, m = np.ones(2, dtype), np.array([1.0, np.nan], dtype), np.zeros(2, dtype)
    v, out, k = np.ones(2, dtype), np.empty(2, dtype), np.array([0.1, 0.9, 0.1, 0, 0, 1, -0.1, 1, 1], dtype)
    getattr(plan_and_element, f"adam_{FORMATS[dtype][3]}")(
        ctypes.c_int64(2), pointer(w), pointer(g), pointer(k), 4, pointer(m), pointer(v), pointer(nan), pointer(out)
    )
    assert np.isnan(nan).all() and np.isnan(out).all()


@TYPES
def test_a_factor_of_one_changes_no_gradient(plan_and_element, dtype):
    """So that nothing has to ask whether there is a loss scale: infinities, signed zeros and subnormals stay what they are."""
    g = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max], dtype)
    w, v, out = np.zeros_like(g), np.empty_like(g), np.empty_like(g)
    k = np.array([-0.1, 0.9, 1, 0, 1], dtype)
    getattr(plan_and_element, f"sgd_{FORMATS[dtype][3]}")(
        ctypes.c_int64(g.size), pointer(w), pointer(g), pointer(k), 4, pointer(v), pointer(out)
    )
    assert np.array_equal(v, g, equal_nan=True) and np.array_equal(np.signbit(v[:6]), np.signbit(g[:6]))
