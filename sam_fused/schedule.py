"""What changes over a run: when SAM is on, and how large rho is. Beside LR schedulers, and stepped like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from torch import Tensor, no_grad

from .optim import SAM

MOMENTUM = ("shared", "fresh")


class SwitchSchedule:
    """Switches SAM on late, off again, or on for every k-th step only [2410.10373].

    Position t counts the calls of ``step()``: once per optimizer step or once per epoch, as with LR schedulers. SAM is on while
    ``start <= t < stop`` and ``(t - start) % every == 0``; else ``optimizer.enabled`` is False and every form of a step is the
    base optimizer's, with one evaluation of the closure: of each micro-batch where a batch is cut into several.

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
        start: the first position with SAM: a whole number, or a fraction of ``total``; ``total`` itself and 1.0: never.
        stop: the first position without it again, a whole number or a fraction of ``total``; None: never.
        every: SAM on at ``start`` and at every ``every``-th position after it.
        total: how many positions the run has, where ``start`` or ``stop`` is a fraction.
        momentum: ``"shared"`` goes on with the base optimizer's state at the switch; ``"fresh"`` clears it in the ``step()``
            that reaches ``start``, as two optimizers over the same weights would have it (the authors' protocol).

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
            total = _whole(total, "total", 1)
        every = _whole(every, "every", 1)
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
        """Goes on from a saved position. The optimizer's own state is loaded by itself.

        Raises:
            ValueError: there is no position in it. Nothing has been changed then.
        """
        self.position = _saved_position(state_dict, "SwitchSchedule")
        self._apply()

    def __repr__(self) -> str:
        end = "" if self.stop is None else f", stop={self.stop}"
        rest = f", every={self.every}, momentum={self.momentum!r}"
        return f"SwitchSchedule(start={self.start}{end}{rest}), {'on' if self.optimizer.enabled else 'off'} at {self.position}"


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
        ValueError: a factor that is negative or not finite; one tensor that is the rho of groups whose rhos part. No rho has
            been changed then.
    """

    def __init__(self, optimizer: SAM, factor: Callable[[int], float]) -> None:
        _check_optimizer(optimizer, "RhoScheduler")
        if not callable(factor):
            raise TypeError(
                f"factor: expected a function of the position, got {type(factor).__name__}: pass for example lambda t: 0.99**t."
            )
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
        device is waited for.

        lr_0 is the learning rate that an LR scheduler was given, whatever a warm-up has made of it by now: the group's
        ``max_lr`` (OneCycleLR's, CyclicLR's), else its ``initial_lr``, else its ``lr``. Construct it after the LR scheduler.
        """
        return _ProportionalToLR(optimizer)

    # ---- positions ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The next position: once per optimizer step, or once per epoch."""
        self._go_to(self.position + 1)

    def _go_to(self, position: int) -> None:
        before, self.position = self.position, position
        try:
            self._apply()
        except BaseException:  # the function is the caller's
            self.position = before
            raise

    def factors(self) -> list[float]:
        """Each group's factor at the present position."""
        return [self._factor(self.position)] * len(self.base_rhos)

    def _apply(self) -> None:
        factors = self.factors()
        for factor in factors:
            if not _is_factor(factor):
                raise ValueError(
                    f"RhoScheduler: expected a finite factor >= 0, got {factor!r} at position {self.position}: mend the "
                    "function."
                )
        # A number of Python's, whatever the function returns: a checkpoint's groups hold no others.
        rhos = [rho * float(factor) for rho, factor in zip(self.base_rhos, factors, strict=True)]
        groups = list(zip(self.optimizer.param_groups, rhos, strict=False))
        shared: dict[int, float] = {}
        for group, rho in groups:
            value = group[self._key]
            if isinstance(value, Tensor) and shared.setdefault(id(value), rho) != rho:
                raise ValueError(
                    f"RhoScheduler: expected a {self._key} of its own for each group, got one tensor for rhos "
                    f"{shared[id(value)]:g} and {rho:g}: give the groups tensors of their own, or plain numbers."
                )
        for group, rho in groups:
            if isinstance(group[self._key], Tensor):
                with no_grad():
                    group[self._key].fill_(rho)
            else:
                group[self._key] = rho

    def state_dict(self) -> dict[str, Any]:
        """The position and each group's rho_0; the function is what the constructor is told."""
        return {"position": self.position, "base_rhos": list(self.base_rhos)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved position, and sets each group's rho.

        Raises:
            ValueError: it is of more groups than there are, or a factor is none. Nothing has been changed then.
        """
        position, groups = _saved_position(state_dict, "RhoScheduler"), len(self.optimizer.param_groups)
        rhos = _saved_numbers(state_dict, "base_rhos")
        if len(rhos) > groups:
            raise ValueError(
                f"RhoScheduler: expected the state of at most {groups} parameter groups, got one of {len(rhos)}: load it for "
                "an optimizer with the groups that it was saved with."
            )
        before, self.base_rhos = self.base_rhos, rhos
        try:
            self._go_to(position)
        except BaseException:
            self.base_rhos = before
            raise

    def __repr__(self) -> str:
        rhos = ", ".join(f"{_as_float(group[self._key]):g}" for group in self.optimizer.param_groups)
        return f"{type(self).__name__.strip('_')}: rho {rhos} at {self.position}"


class _ProportionalToLR(RhoScheduler):
    def __init__(self, optimizer: SAM) -> None:
        _check_optimizer(optimizer, "RhoScheduler")
        self.base_lrs = [_as_float(self._full_lr(group)) for group in optimizer.param_groups]
        if not all(self.base_lrs):
            raise ValueError(
                f"proportional_to_lr: expected learning rates above 0, got {self.base_lrs}: construct it after the LR "
                "scheduler, which keeps what a warm-up from 0 leads to as initial_lr."
            )
        super().__init__(optimizer, lambda _: 1.0)

    @staticmethod
    def _full_lr(group: dict[str, Any]) -> float | Tensor:
        value: float | Tensor = group.get("max_lr", group.get("initial_lr", group["lr"]))
        return value

    def factors(self) -> list[float]:
        groups = self.optimizer.param_groups
        return [_as_float(group["lr"]) / base for group, base in zip(groups, self.base_lrs, strict=False)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        lrs, rhos = _saved_numbers(state_dict, "base_lrs"), _saved_numbers(state_dict, "base_rhos")
        if len(lrs) != len(rhos) or not all(lrs):
            raise ValueError(
                f"RhoScheduler: expected a base_lrs above 0 for each of {len(rhos)} groups, got {lrs}: load what its own "
                "state_dict() returned."
            )
        before, self.base_lrs = self.base_lrs, lrs
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.base_lrs = before
            raise


# ---- positions and arguments -------------------------------------------------------------------------------------------


def _warmed_up(factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """``factor`` from position ``warmup`` on, and a line from 0 to its value there before."""
    warmup = _whole(warmup, "warmup", 0)
    return lambda t: factor(t) if t >= warmup else factor(warmup) * t / warmup


def _progress(total: int, warmup: int, final: float) -> Callable[[int], float]:
    """How much of the way from ``warmup`` to ``total`` a position has behind it, from 0 to 1."""
    total, warmup = _whole(total, "total", 1), _whole(warmup, "warmup", 0)
    if not _is_factor(final):
        raise ValueError(f"final: expected a finite share of rho, >= 0, got {final!r}: use for example 0.1.")
    if warmup >= total:
        raise ValueError(f"warmup: expected less than the total of {total}, got {warmup}: make it smaller.")
    return lambda t: min(max(t - warmup, 0) / (total - warmup), 1.0)


def _is_factor(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def _as_float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _check_optimizer(optimizer: Any, name: str) -> None:
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"{name}: expected a sam_fused.SAM or MicroBatchSAM, got {type(optimizer).__name__}: pass the optimizer itself."
        )


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}: use for example {max(least, 1)}.")
    return int(value)


def _saved_position(state_dict: Any, name: str) -> int:
    position = state_dict.get("position") if isinstance(state_dict, dict) else None
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise ValueError(
            f"{name}: expected the state_dict of one, with a position >= 0, got {position!r} for it: load what its own "
            "state_dict() returned."
        )
    return position


def _saved_numbers(state_dict: Any, key: str) -> list[float]:
    numbers = state_dict.get(key) if isinstance(state_dict, dict) else None
    if not isinstance(numbers, list) or not all(isinstance(n, float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError(
            f"RhoScheduler: expected the state_dict of one, with {key}, numbers >= 0, got {numbers!r} for them: load what its "
            "own state_dict() returned."
        )
    return list(numbers)


def _position(value: Any, name: str, total: int | None) -> int:
    """A position as it is, or a fraction's of the total: 0.75 of 10 is 8, the first position at or behind it."""
    if not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name}: expected a position, a whole number >= 0, or a fraction between 0 and 1, got {value!r}: 0.75 is the last "
            "quarter."
        )
    if total is None:
        raise ValueError(f"{name}: expected a total beside a fraction, got {value!r} alone: pass total= in calls of step().")
    product = float(value) * total
    return math.ceil(product - 1e-12 * product)  # 0.55 * 100 is a little more than 55
