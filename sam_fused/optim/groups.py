"""Parameter groups: our keys beside the base optimizer's, never over them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .definitions import DEFINITIONS

# What SAM keeps in each parameter group, with its default.
DEFAULTS: dict[str, Any] = {
    "rho": 0.05,
    "adaptive": False,
    "perturb": True,
    "perturb_eps": 1e-12,
    "eta": 0.0,
    "weight_decay_in_ascent": False,
}

PREFIX = "sam_"

# What the constructor takes for all groups together: in a group of its own it would be nobody's, and say nothing.
NOT_OF_A_GROUP = (
    "p",
    "normalize",
    "max_grad_norm",
    "model",
    "same_dropout",
    "backend",
    "track_perturbation",
    "num_micro_batches",
)


def key_names(base_keys: set[str]) -> dict[str, str]:
    """The name each of our keys has in a group: itself, or ``sam_<name>`` where the base optimizer owns that name.

    Adadelta has a ``rho`` (a decay rate); SAM's then is ``sam_rho``, so that neither overwrites the other.
    """
    return {name: PREFIX + name if name in base_keys else name for name in DEFAULTS}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def refuse_settings(group: dict[str, Any], base_keys: Iterable[str], names: dict[str, str], index: int) -> None:
    """Refuses keys of a new group that look like ours and are read by nobody."""
    owned = set(base_keys) | set(names.values())
    for key in NOT_OF_A_GROUP:
        if key in group and key not in owned:
            raise ValueError(
                f"{key} of parameter group {index}: expected one {key} for all groups, got {group[key]!r} in a group: pass "
                f"{key}= to the constructor."
            )
    for name in names:
        if PREFIX + name in group and PREFIX + name not in owned:
            raise ValueError(
                f"{PREFIX + name} of parameter group {index}: expected {name} because the base optimizer has no {name} of its "
                f"own, got {PREFIX + name}={group[PREFIX + name]!r}: call it {name}."
            )


def check_group(group: dict[str, Any], names: dict[str, str], index: int) -> None:
    """Refuses hyper-parameters that mean nothing, in one sentence."""
    for name in ("rho", "perturb_eps"):
        value = group[names[name]]
        if isinstance(value, Tensor):
            value = value.detach()  # a learned one: reading it is no part of a graph
        if not _is_number(value) or not math.isfinite(value) or value < 0:
            raise ValueError(
                f"{names[name]} of parameter group {index}: expected a finite number >= 0, got {value!r}: "
                f"use for example {DEFAULTS[name]}."
            )
    eta = group[names["eta"]]
    if isinstance(eta, bool) or not isinstance(eta, Real) or not math.isfinite(eta) or eta < 0:
        raise ValueError(
            f"{names['eta']} of parameter group {index}: expected a finite number >= 0, got {eta!r}: use 0, or 0.01 as the "
            "authors of ASAM do."
        )
    adaptive = group[names["adaptive"]]
    if adaptive == "layerwise" and eta != 0:
        raise ValueError(
            f"{names['eta']} of parameter group {index}: expected 0 with adaptive='layerwise', whose T is a tensor's norm, got "
            f"{eta!r}: leave it out, or use adaptive='all' or 'weights'."
        )
    if not isinstance(adaptive, bool) and adaptive not in DEFINITIONS:
        raise ValueError(
            f"{names['adaptive']} of parameter group {index}: expected True, False or one of {', '.join(DEFINITIONS)}, got "
            f"{adaptive!r}: True is 'all', T = |w| on all parameters."
        )
    for name, meaning in (
        ("perturb", "False leaves a group out of the ascent"),
        ("weight_decay_in_ascent", "True perturbs along the gradient of the loss with the base optimizer's weight decay in it"),
    ):
        if not isinstance(group[names[name]], bool):
            raise ValueError(
                f"{names[name]} of parameter group {index}: expected True or False, got {group[names[name]]!r}: {meaning}."
            )
    if group[names["weight_decay_in_ascent"]] and "weight_decay" not in group:
        raise ValueError(
            f"{names['weight_decay_in_ascent']} of parameter group {index}: expected a base optimizer with weight_decay, got "
            "one without: leave it out, or add the decay to the loss."
        )


def fill(base: Optimizer, names: dict[str, str], values: dict[str, Any], since: int = 0) -> None:
    """Gives every group from ``since`` on the keys it has not."""
    for index, group in enumerate(base.param_groups[since:], start=since):
        for name, key in names.items():
            group.setdefault(key, values[name])
        check_group(group, names, index)


class Filler:
    """Keeps our keys in groups that reach the base optimizer without passing through SAM: a plain checkpoint loaded into
    either, a group added to the base alone."""

    def __init__(self, names: dict[str, str], values: dict[str, Any]) -> None:
        self._names = names
        self._values = values
        self._kept: list[dict[str, Any]] = []

    def remember(self, base: Optimizer, state_dict: dict[str, Any]) -> None:
        self._kept = [{key: group[key] for key in self._names.values() if key in group} for group in base.param_groups]

    def fill(self, base: Optimizer) -> None:
        """Gives groups the keys that they lack: those they had before a load, else the constructor's."""
        last = next(iter(self._names.values()))
        if not self._kept and all(last in group for group in base.param_groups):
            return
        for group, kept in zip(base.param_groups, self._kept, strict=False):
            for key, value in kept.items():
                group.setdefault(key, value)
        self._kept = []
        fill(base, self._names, self._values)
