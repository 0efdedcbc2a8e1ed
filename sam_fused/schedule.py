"""What changes over a run: when SAM is on, and how large rho is. Beside LR schedulers, and stepped like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor, no_grad

from .optim import SAM

MOMENTUM = ("shared", "fresh")


class SwitchSchedule:
    """Switches SAM on late, off again, or on for every k-th step only [2410.10373].

    Position t counts the calls of ``step()``: once per optimizer step or once per epoch, as with LR schedulers. SAM is on while
    ``start <= t < stop`` and ``(t - start) % every == 0``; else ``optimizer.enabled`` is False and every form of a step is the
    base optimizer's, with one evaluation of the closure.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> switch = SwitchSchedule(optimizer, start=0.75, total=100)  # the last quarter of 100 epochs
        >>> for epoch in range(100):
        ...     pass  # train an epoch
        ...     switch.step()

    Args:
        optimizer: the ``SAM`` whose ``enabled`` is driven.
        start: the first position with SAM: a whole number, or a fraction of ``total``.
        stop: the first position without it again, a whole number or a fraction of ``total``; None: never.
        every: SAM on at ``start`` and at every ``every``-th position after it.
        total: how many positions the run has, where ``start`` or ``stop`` is a fraction.
        momentum: ``"shared"`` goes on with the base optimizer's state at the switch; ``"fresh"`` clears it when ``start`` is
            reached, as two optimizers over the same weights would have it (the authors' protocol).

    Raises:
        TypeError: the optimizer is not ours.
        ValueError: a position that is none, a fraction without a total, a start that is not before its stop.
    """

    def __init__(
        self,
        optimizer: SAM,
        *,
        start: float = 0,
        stop: float | None = None,
        every: int = 1,
        total: int | None = None,
        momentum: str = "shared",
    ) -> None:
        _check_optimizer(optimizer, "SwitchSchedule")
        if total is not None:
            _check_whole(total, "total", 1)
        _check_whole(every, "every", 1)
        if momentum not in MOMENTUM:
            raise ValueError(
                f"momentum: expected 'shared' or 'fresh', got {momentum!r}: use 'shared', as one optimizer has it."
            )
        self.optimizer, self.every, self.total, self.momentum = optimizer, every, total, momentum
        self.start = _position(start, "start", total)
        self.stop = None if stop is None else _position(stop, "stop", total)
        if self.stop is not None and self.start >= self.stop:
            raise ValueError(f"SwitchSchedule: expected a start before the stop, got {start} and {stop}: make start smaller.")
        if total is not None and self.start > total:
            raise ValueError(f"SwitchSchedule: expected a start within the run of {total}, got {start}: make it smaller.")
        self.position = 0
        self._apply()

    def is_on_at(self, position: int) -> bool:
        """Whether SAM is on at that position."""
        after = position - self.start
        return after >= 0 and (self.stop is None or position < self.stop) and after % self.every == 0

    def step(self) -> None:
        """The next position: once per optimizer step, or once per epoch."""
        self.position += 1
        if self.momentum == "fresh" and self.position == self.start:
            self.optimizer.state.clear()
        self._apply()

    def _apply(self) -> None:
        self.optimizer.enabled = self.is_on_at(self.position)

    def state_dict(self) -> dict[str, Any]:
        """The position; the rest is what the constructor is told."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved position. The optimizer's own state is loaded by itself."""
        self.position = state_dict["position"]
        self._apply()


class RhoScheduler:
    """Scales each group's rho: ``rho_t = rho_0 factor(t)``, t counting the calls of ``step()``.

    Example:
        >>> import torch
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.05, lr=0.1)
        >>> scheduler = RhoScheduler.cosine(optimizer, total=100, final=0.1, warmup=5)
        >>> scheduler.step()

    Groups that are added later keep the rho that they bring. A rho that is a tensor is written in place, where a captured graph
    reads it.

    Args:
        optimizer: the ``SAM`` whose groups' rho is scaled; the present values are rho_0.
        factor: of a position; finite and >= 0.

    Raises:
        TypeError: the optimizer is not ours.
        ValueError: a factor that is negative or not finite; no rho has been changed then.
    """

    def __init__(self, optimizer: SAM, factor: Callable[[int], float]) -> None:
        _check_optimizer(optimizer, "RhoScheduler")
        self.optimizer, self.position = optimizer, 0
        self._factor = factor
        self._key = optimizer._names["rho"]
        self.base_rhos = [_as_float(group[self._key]) for group in optimizer.param_groups]
        self._apply()

    # ---- the usual ones ----------------------------------------------------------------------------------------------

    @classmethod
    def constant(cls, optimizer: SAM, *, warmup: int = 0) -> RhoScheduler:
        """rho_0, after a linear warm-up from 0 over ``warmup`` positions."""
        return cls(optimizer, _warmed_up(lambda _: 1.0, warmup))

    @classmethod
    def linear(cls, optimizer: SAM, *, total: int, final: float = 0.0, warmup: int = 0) -> RhoScheduler:
        """From rho_0 to ``final`` rho_0 at position ``total``, and constant after; before that a linear warm-up from 0."""
        progress = _progress(total, warmup, final)
        return cls(optimizer, _warmed_up(lambda t: 1 + (final - 1) * progress(t), warmup))

    @classmethod
    def cosine(cls, optimizer: SAM, *, total: int, final: float = 0.0, warmup: int = 0) -> RhoScheduler:
        """As ``linear``, along half a cosine: ``final + (1 - final) (1 + cos(pi p)) / 2``."""
        progress = _progress(total, warmup, final)
        return cls(optimizer, _warmed_up(lambda t: final + (1 - final) * (1 + math.cos(math.pi * progress(t))) / 2, warmup))

    @staticmethod
    def proportional_to_lr(optimizer: SAM) -> RhoScheduler:
        """``rho_t = rho_0 lr_t / lr_0`` in each group: its ``step()`` comes after the LR scheduler's. A learning rate on a
        device is waited for."""
        return _ProportionalToLR(optimizer)

    # ---- positions ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The next position: once per optimizer step, or once per epoch."""
        self.position += 1
        try:
            self._apply()
        except ValueError:
            self.position -= 1
            raise

    def factors(self) -> list[float]:
        """Each group's factor at the present position."""
        return [float(self._factor(self.position))] * len(self.base_rhos)

    def _apply(self) -> None:
        factors = self.factors()
        for factor in factors:
            if not math.isfinite(factor) or factor < 0:
                raise ValueError(
                    f"RhoScheduler: expected a finite factor >= 0, got {factor} at position {self.position}: mend the function."
                )
        for group, rho, factor in zip(self.optimizer.param_groups, self.base_rhos, factors, strict=False):
            if isinstance(group[self._key], Tensor):
                with no_grad():
                    group[self._key].fill_(rho * factor)
            else:
                group[self._key] = rho * factor

    def state_dict(self) -> dict[str, Any]:
        """The position and each group's rho_0; the function is what the constructor is told."""
        return {"position": self.position, "base_rhos": list(self.base_rhos)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved position, and sets each group's rho."""
        self.position, self.base_rhos = state_dict["position"], list(state_dict["base_rhos"])
        self._apply()


class _ProportionalToLR(RhoScheduler):
    def __init__(self, optimizer: SAM) -> None:
        _check_optimizer(optimizer, "RhoScheduler")
        self.base_lrs = self._lrs(optimizer)
        if not all(self.base_lrs):
            raise ValueError(
                f"proportional_to_lr: expected learning rates above 0, got {self.base_lrs}: construct it before a warm-up has "
                "set them to 0."
            )
        super().__init__(optimizer, lambda _: 1.0)

    @staticmethod
    def _lrs(optimizer: SAM) -> list[float]:
        return [_as_float(group["lr"]) for group in optimizer.param_groups]

    def factors(self) -> list[float]:
        return [lr / base for lr, base in zip(self._lrs(self.optimizer), self.base_lrs, strict=False)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_lrs = list(state_dict["base_lrs"])
        super().load_state_dict(state_dict)


# ---- positions and arguments -------------------------------------------------------------------------------------------


def _warmed_up(factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """``factor`` from position ``warmup`` on, and a line from 0 to its value there before."""
    _check_whole(warmup, "warmup", 0)
    return lambda t: factor(t) if t >= warmup else factor(warmup) * t / warmup


def _progress(total: int, warmup: int, final: float) -> Callable[[int], float]:
    """How much of the way from ``warmup`` to ``total`` a position has behind it, from 0 to 1."""
    _check_whole(total, "total", 1)
    _check_whole(warmup, "warmup", 0)
    if not math.isfinite(final) or final < 0:
        raise ValueError(f"final: expected a finite share of rho, >= 0, got {final!r}: use for example 0.1.")
    if warmup >= total:
        raise ValueError(f"warmup: expected less than the total of {total}, got {warmup}: make it smaller.")
    return lambda t: min(max(t - warmup, 0) / (total - warmup), 1.0)


def _as_float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _check_optimizer(optimizer: Any, name: str) -> None:
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"{name}: expected a sam_fused.SAM or MicroBatchSAM, got {type(optimizer).__name__}: pass the optimizer itself."
        )


def _check_whole(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}: use for example {max(least, 10)}.")


def _position(value: Any, name: str, total: int | None) -> int:
    """A position as it is, or a fraction's of the total: 0.75 of 10 is 8, the first position at or behind it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name}: expected a position, a whole number >= 0, or a fraction between 0 and 1, got {value!r}: 0.75 is the last "
            "quarter."
        )
    if total is None:
        raise ValueError(f"{name}: expected a total beside a fraction, got {value!r} alone: pass total= in calls of step().")
    return math.ceil(float(value) * total - 1e-9)  # 0.55 * 100 is a little more than 55
