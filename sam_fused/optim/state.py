"""The step's state machine: which move is allowed when, and what the other ones are answered.

A step goes clean -> perturbed -> clean. Calling ``first_step`` twice would bake the first perturbation into the weights for
ever, saving a checkpoint in between would save perturbed weights: illegal moves raise and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from .watch import GradientWatch


class State(Enum):
    CLEAN = "clean"  # nothing was perturbed since the last step
    PERTURBED = "perturbed"  # after first_step()
    INSIDE = "inside"  # in a perturbed() block, or in the second pass of step(closure)
    READY = "ready"  # perturbed() was left: weights are clean, the gradients are the second pass's
    ACCUMULATED = "accumulated"  # between two micro-batches: weights are clean, the gradients so far are in the accumulators
    COMPLETE = "complete"  # after the last micro_batch() block: weights are clean, the batch's gradient is added up


class Move(Enum):
    FIRST_STEP = "first_step()"
    SECOND_STEP = "second_step()"
    STEP = "step()"
    STEP_CLOSURE = "step(closure)"
    PERTURBED = "perturbed()"
    MICRO_BATCH = "micro_batch()"
    RESTORE = "restore()"
    STATE_DICT = "state_dict()"
    LOAD_STATE_DICT = "load_state_dict()"
    ZERO_GRAD = "zero_grad()"
    ADD_PARAM_GROUP = "add_param_group()"
    RELEASE_BUFFERS = "release_buffers()"
    SET_NUM_MICRO_BATCHES = "setting num_micro_batches"


_LEAVE = "leave the perturbed() block (or the closure) first"
_FINISH = "call second_step() or step() first, or restore() to give the step up"
_STEP = "call step() first, or restore() to give the step up"
_COMPLETE = "run the other micro-batches, whose weights sum to 1, and step() first, or restore() to give the step up"


def _refused_when(**remedies: str) -> dict[State, str | None]:
    return {state: remedies.get(state.name) for state in State}


def _refused_in_a_step() -> dict[State, str | None]:
    return _refused_when(PERTURBED=_FINISH, INSIDE=_LEAVE, ACCUMULATED=_COMPLETE, COMPLETE=_STEP)


# Every cell: None is allowed, text is the remedy.
TABLE: dict[Move, dict[State, str | None]] = {
    Move.FIRST_STEP: _refused_in_a_step(),
    Move.SECOND_STEP: _refused_when(
        CLEAN="call first_step() after the first backward",
        READY="call step() after a perturbed() block",
        INSIDE=_LEAVE,
        ACCUMULATED=_COMPLETE,
        COMPLETE=_STEP,
    ),
    Move.STEP: _refused_when(
        CLEAN="pass a closure, call first_step() or use a perturbed() or micro_batch() block before it, or set enabled = False "
        "for a base step",
        INSIDE=_LEAVE,
        ACCUMULATED=_COMPLETE,
    ),
    Move.STEP_CLOSURE: _refused_in_a_step(),
    Move.PERTURBED: _refused_in_a_step(),
    Move.MICRO_BATCH: _refused_when(PERTURBED=_FINISH, INSIDE=_LEAVE, READY=_STEP, COMPLETE=_STEP),
    Move.RESTORE: _refused_when(INSIDE=_LEAVE),
    Move.STATE_DICT: _refused_in_a_step(),
    Move.LOAD_STATE_DICT: _refused_in_a_step(),
    Move.ZERO_GRAD: _refused_when(),
    Move.ADD_PARAM_GROUP: _refused_in_a_step(),
    Move.RELEASE_BUFFERS: _refused_in_a_step(),
    Move.SET_NUM_MICRO_BATCHES: _refused_in_a_step(),
}

_WHERE = {
    State.CLEAN: "nothing was perturbed since the last step",
    State.READY: "a perturbed() block was left and its step has not been taken",
    State.ACCUMULATED: "micro-batches have been added up and their step has not been taken",
    State.COMPLETE: "a batch's micro-batches have been added up and their step has not been taken",
    State.PERTURBED: "the weights are perturbed",
    State.INSIDE: "the weights are perturbed",
}


SETTINGS = (
    "enabled",
    "p",
    "normalize",
    "backend",
    "track_perturbation",
    "max_grad_norm",
    "same_dropout",
    "capturable",
    "model",
    "num_micro_batches",
)


@dataclass
class Control:
    """Everything about a step that must outlive a method call, in one object held by reference: wrappers that copy an
    optimizer's attributes (Lightning's does) then still share it."""

    enabled: bool = True
    p: float = 2  # the norm that bounds the perturbation
    normalize: bool = True
    backend: str | None = None
    track_perturbation: bool = False
    max_grad_norm: float | Tensor | None = None
    same_dropout: bool = False
    capturable: bool = False
    model: Any = None
    num_micro_batches: int = 1
    evaluating: bool = False  # a closure is running
    state: State = State.CLEAN
    clean_loss: Any = None
    perturbed_loss: Any = None
    perturbation: Any = None
    grad_norm: Tensor | None = None  # of the last step's gradient, before it was clipped
    overflows: Tensor | None = None  # first passes whose norm was not finite, counted where the norm is
    gradients: GradientWatch = field(default_factory=GradientWatch)
    # What surrounds the second pass: the model's running statistics, the first pass's random numbers.
    statistics: Any = None
    randomness: Any = None
    scale_unknown: bool = False  # an ascent of this step depends on the gradients' size, and nobody told their loss scale
    warned: bool = False  # that there was no gradient at all

    def settings(self) -> dict[str, Any]:
        """What the constructor was told and may have been changed since: all that outlives a pickle."""
        return {name: getattr(self, name) for name in SETTINGS}

    def differing(self) -> dict[str, Any]:
        """The settings that are not as they are when nothing is said; of a model, whose it is."""
        changed = {name: value for name, value in self.settings().items() if value is not getattr(Control, name)}
        return {name: type(value).__name__ if name == "model" else value for name, value in changed.items()}

    def readings(self) -> dict[str, Any]:
        """What a step leaves to be read."""
        return {name: getattr(self, name) for name in ("clean_loss", "perturbed_loss", "grad_norm")}

    def set_readings(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def require(self, move: Move) -> None:
        """Raises RuntimeError, in one sentence, if ``move`` is not allowed now."""
        if self.evaluating:
            raise RuntimeError(
                f"step(closure): expected a closure that only evaluates, got {move.value} in one: leave perturbing and "
                "stepping to step(closure), or run both passes by hand."
            )
        remedy = TABLE[move][self.state]
        if remedy is not None:
            raise RuntimeError(f"{move.value} is not possible while {_WHERE[self.state]}: {remedy}.")
