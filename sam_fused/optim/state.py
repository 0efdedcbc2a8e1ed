"""The step's state machine: which move is allowed when, and what the other ones are answered.

A step goes clean -> perturbed -> clean. Calling ``first_step`` twice would bake the first perturbation into the weights for
ever, saving a checkpoint in between would save perturbed weights: illegal moves raise and change nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any

from torch import Tensor

_version_of = attrgetter("_version")


class State(Enum):
    CLEAN = "clean"  # nothing was perturbed since the last step
    PERTURBED = "perturbed"  # after first_step()
    INSIDE = "inside"  # in a perturbed() block, or in the second pass of step(closure)
    READY = "ready"  # perturbed() was left: weights are clean, the gradients are the second pass's


class Move(Enum):
    FIRST_STEP = "first_step()"
    SECOND_STEP = "second_step()"
    STEP = "step()"
    STEP_CLOSURE = "step(closure)"
    PERTURBED = "perturbed()"
    RESTORE = "restore()"
    STATE_DICT = "state_dict()"
    LOAD_STATE_DICT = "load_state_dict()"
    ZERO_GRAD = "zero_grad()"
    ADD_PARAM_GROUP = "add_param_group()"
    RELEASE_BUFFERS = "release_buffers()"


_LEAVE = "leave the perturbed() block (or the closure) first"
_FINISH = "call second_step() or step() first, or restore() to give the step up"

# Every cell: None is allowed, text is the remedy that follows "expected ..., got ...".
TABLE: dict[Move, dict[State, str | None]] = {
    Move.FIRST_STEP: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.SECOND_STEP: {
        State.CLEAN: "call first_step() after the first backward",
        State.READY: "call step() after a perturbed() block",
        State.PERTURBED: None,
        State.INSIDE: _LEAVE,
    },
    Move.STEP: {
        State.CLEAN: "pass a closure, use perturbed() or first_step() before it, or set enabled = False for a base step",
        State.READY: None,
        State.PERTURBED: None,
        State.INSIDE: _LEAVE,
    },
    Move.STEP_CLOSURE: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.PERTURBED: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.RESTORE: {State.CLEAN: None, State.READY: None, State.PERTURBED: None, State.INSIDE: _LEAVE},
    Move.STATE_DICT: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.LOAD_STATE_DICT: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.ZERO_GRAD: {State.CLEAN: None, State.READY: None, State.PERTURBED: None, State.INSIDE: None},
    Move.ADD_PARAM_GROUP: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
    Move.RELEASE_BUFFERS: {State.CLEAN: None, State.READY: None, State.PERTURBED: _FINISH, State.INSIDE: _LEAVE},
}

_WHERE = {
    State.CLEAN: "nothing was perturbed since the last step",
    State.READY: "a perturbed() block was left and its step has not been taken",
    State.PERTURBED: "the weights are perturbed",
    State.INSIDE: "the weights are perturbed",
}


@dataclass
class Control:
    """Everything about a step that must outlive a method call, in one object held by reference: wrappers that copy an
    optimizer's attributes (Lightning's does) then still share it."""

    enabled: bool = True
    backend: str | None = None
    track_perturbation: bool = False
    state: State = State.CLEAN
    clean_loss: Any = None
    perturbed_loss: Any = None
    perturbation: Any = None
    # The gradients that the last step left on the parameters. Weak: they must not keep a gradient alive.
    left: list[weakref.ref[Tensor] | None] = field(default_factory=list)
    left_versions: list[int] = field(default_factory=list)
    # Whether anybody has asked SAM for its parameter groups since the second pass began, as GradScaler.unscale_ does.
    groups_read: bool = False
    warned: bool = False  # that there was no gradient at all

    def remember(self, grads: list[Tensor | None]) -> None:
        """These gradients may be cleared by the next step: nothing is lost with them."""
        try:
            self.left = list(map(weakref.ref, grads))  # type: ignore[arg-type]
            self.left_versions = list(map(_version_of, grads))
        except TypeError:  # None has no weak reference
            self.left = [None if grad is None else weakref.ref(grad) for grad in grads]
            self.left_versions = [0 if grad is None else grad._version for grad in grads]

    def require(self, move: Move) -> None:
        """Raises RuntimeError, in one sentence, if ``move`` is not allowed now."""
        remedy = TABLE[move][self.state]
        if remedy is not None:
            raise RuntimeError(f"{move.value} is not possible while {_WHERE[self.state]}: {remedy}.")
