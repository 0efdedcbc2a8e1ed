"""What each operation means, in numpy's long double, with a bound on what rounding may do to it.

Independent of ``sam_fused.ops.reference``. A ``Bounded`` is a value and how far a computation that rounds each of its steps
may be from it: a running error analysis, so that no tolerance is a guess. The bound is of the size of one unit in the last
place of the result wherever nothing cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .cases import STORAGE_OF, Case, Storage

Array = np.ndarray


def exact(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().contiguous().cpu().numpy()).astype(np.longdouble)


def unit(values: Array, storage: Storage) -> Array:
    """One unit in the last place of ``storage`` at each value."""
    _, exponents = np.frexp(np.abs(values))
    return np.ldexp(np.longdouble(1), np.maximum(exponents - storage.bits, storage.smallest))


@dataclass(frozen=True)
class Rounding:
    """How a backend rounds between two operations: relative, and absolute below the smallest normal number."""

    relative: float
    absolute: float

    @staticmethod
    def of(storage: Storage, units: float) -> Rounding:
        return Rounding(units * storage.roundoff, 2.0**storage.smallest)

    def __call__(self, value: Array, error: Array | float) -> Bounded:
        # Where nothing is inexact nothing may be off: zero stays zero.
        return Bounded(value, error + np.where(value == 0, 0, self.relative * np.abs(value) + self.absolute), self)


@dataclass(frozen=True)
class Bounded:
    value: Array
    error: Array | float
    rounding: Rounding

    def __add__(self, other: Bounded) -> Bounded:
        return self.rounding(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self.rounding(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self.rounding(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        smallest = np.maximum(np.abs(other.value) - other.error, np.finfo(np.longdouble).tiny)
        value = self.value / other.value
        return self.rounding(value, (self.error + np.abs(value) * other.error) / smallest)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error, self.rounding)

    def fma(self, factor: Bounded, addend: Bounded) -> Bounded:
        """``self * factor + addend`` with one rounding."""
        error = np.abs(self.value) * factor.error + np.abs(factor.value) * self.error + self.error * factor.error
        return self.rounding(self.value * factor.value + addend.value, error + addend.error)

    def sqrt(self) -> Bounded:
        value = np.sqrt(self.value)
        return self.rounding(value, np.sqrt(self.value + self.error) - value)


def maximum(first: Bounded, second: Bounded) -> Bounded:
    return Bounded(np.maximum(first.value, second.value), np.maximum(first.error, second.error), first.rounding)


@dataclass(frozen=True)
class Expected:
    """A result before the one rounding on the store. ``error`` 0 and a value of the storage type means: bit for bit."""

    value: Array
    error: Array | float

    @staticmethod
    def of(result: Bounded) -> Expected:
        return Expected(result.value, result.error)

    def allowed(self, storage: Storage) -> Array:
        """How far a result may be: the bound, and half a unit for the store."""
        # The bound may lie across a power of two, where the unit doubles.
        return self.error + 0.5 * unit(np.abs(self.value) + self.error, storage)

    def ratios(self, got: Tensor) -> Array:
        """The distance of each element from what is right, in units of what is allowed: above 1 is wrong.

        Where ``got`` is longer, what is right repeats.
        """
        found = exact(got).reshape(-1)
        value = np.resize(self.value, found.shape)
        if isinstance(self.error, float) and self.error == 0:
            return np.where(found == value, 0.0, np.inf)
        allowed = np.resize(self.allowed(STORAGE_OF[got.dtype]), found.shape)
        return np.where(np.isfinite(found), np.abs(found - value) / allowed, np.inf).astype(np.float64)


def constant(value: float, rounding: Rounding) -> Bounded:
    """A hyper-parameter, computed in fp64 and rounded once."""
    return rounding(np.longdouble(value), 0.0)


def held(tensor: Tensor, rounding: Rounding) -> Bounded:
    return Bounded(exact(tensor), 0.0, rounding)


def scalar_of(case: Case, name: str) -> float:
    """A scalar as the operations get it, an fp32 tensor; 1 where there is none."""
    return float(np.float32(case.scalars.get(name, 1.0)))


def norm(grads: list[Tensor], params: list[Tensor], accumulators: list[Tensor], scaling: list[int], case: Case) -> float:
    total = np.longdouble(0)
    for index, grad in enumerate(grads):
        value = exact(grad)
        if accumulators:
            value = exact(accumulators[index]) + np.longdouble(scalar_of(case, "weight")) * value
        value = value * np.longdouble(scalar_of(case, "inv_scale"))
        if scaling and scaling[index]:
            value = value * exact(params[index])
        total += np.sum(value * value)
    return float(np.sqrt(total))


def accumulated(grad: Tensor, accumulator: Tensor | None, case: Case, rounding: Rounding) -> Bounded:
    value = held(grad, rounding)
    if "weight" not in case.scalars:
        return value
    weight = constant(scalar_of(case, "weight"), rounding)
    if case.fresh or accumulator is None:
        return weight * value
    return weight.fma(value, held(accumulator, rounding))


def _scaled(grad: Bounded, case: Case, maximize: float, rounding: Rounding) -> Bounded:
    value = grad
    factors = [case.scalars[name] for name in ("inv_scale", "clip") if name in case.scalars]
    if factors:
        # One product, twice rounded at most: some backends keep the factors apart.
        value = value * (
            constant(float(np.prod([np.float32(f) for f in factors], dtype=np.float64)), rounding) * constant(1, rounding)
        )
    return -value if maximize else value


def perturbed(w: Tensor, g: Tensor, case: Case, row: tuple[float, ...], adaptive: int, rounding: Rounding) -> Expected:
    rho, perturb_eps = row
    c = rho / (case.norm + perturb_eps) * float(np.float32(case.scalars.get("inv_scale", 1.0)))
    if c == 0:
        return Expected(exact(w), 0.0)
    clean, direction = held(w, rounding), held(g, rounding)
    if adaptive:
        direction = clean * (clean * direction)
    # Rounded on the store, which Expected counts: so no rounding of the sum here.
    moved = constant(c, rounding) * direction
    exactly = moved.value + clean.value
    return Expected(exactly, moved.error + rounding.relative * np.abs(exactly))


@dataclass(frozen=True)
class SgdResult:
    w: Expected
    v: Expected | None


def sgd(
    w: Tensor, g: Bounded, v: Tensor | None, case: Case, row: tuple[float, ...], first: int, rounding: Rounding
) -> SgdResult:
    lr, momentum, dampening, weight_decay, nesterov, maximize = row
    clean = held(w, rounding)
    d = _scaled(g, case, maximize, rounding)
    if weight_decay:
        d = constant(weight_decay, rounding).fma(clean, d)
    update, buffer = d, None
    if momentum:
        assert v is not None
        mu = constant(momentum, rounding)
        buffer = d if first else constant(1 - dampening, rounding).fma(d, mu * held(v, rounding))
        update = mu.fma(buffer, d) if nesterov else buffer
    return SgdResult(Expected.of(constant(-lr, rounding).fma(update, clean)), None if buffer is None else Expected.of(buffer))


@dataclass(frozen=True)
class AdamResult:
    w: Expected
    m: Expected
    v: Expected
    largest: Expected | None


def adam(
    w: Tensor,
    g: Bounded,
    m: Tensor,
    v: Tensor,
    largest: Tensor,
    step: float,
    case: Case,
    row: tuple[float, ...],
    rounding: Rounding,
) -> AdamResult:
    lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = row
    clean = held(w, rounding)
    gradient = _scaled(g, case, maximize, rounding)
    if weight_decay and decoupled:
        clean = clean * constant(1 - lr * weight_decay, rounding)
    elif weight_decay:
        gradient = constant(weight_decay, rounding).fma(clean, gradient)
    first = held(m, rounding)
    first = constant(1 - beta1, rounding).fma(gradient - first, first)
    second = (constant(1 - beta2, rounding) * gradient).fma(gradient, constant(beta2, rounding) * held(v, rounding))
    used = maximum(held(largest, rounding), second) if amsgrad else second
    denominator = used.sqrt() / constant((1 - beta2**step) ** 0.5, rounding) + constant(eps, rounding)
    stepped = clean + constant(-lr / (1 - beta1**step), rounding) * first / denominator
    return AdamResult(Expected.of(stepped), Expected.of(first), Expected.of(second), Expected.of(used) if amsgrad else None)
