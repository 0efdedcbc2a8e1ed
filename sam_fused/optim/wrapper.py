"""What torch.optim expects of any optimizer, for one that stands around another: groups, state, checkpoints, pickling."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from . import checkpoints, groups
from .arguments import check_params
from .ascent import Ascent
from .definitions import scaling_of
from .descent import Descent
from .state import Control, Move, State


class Wrapper(Optimizer):
    """An optimizer around ``base_optimizer``, whose groups and state are its own. It takes no steps: ``SAM`` does."""

    base_optimizer: Optimizer
    _control: Control
    _names: dict[str, str]

    def _attach(self, base: Optimizer, names: dict[str, str], values: dict[str, Any], control: Control) -> None:
        # Through __dict__: `state` and `param_groups` are properties that read the base's, and Optimizer.__init__ is not
        # called because it would make a second set of both.
        self.__dict__.update(base_optimizer=base, _names=names, _control=control)
        self._fill = groups.Filler(names, values)
        base.register_load_state_dict_pre_hook(self._fill.remember)
        base.register_load_state_dict_post_hook(self._fill.fill)
        self._ascent = Ascent(control, names)
        self._descent = Descent(control)
        defaults = {**base.defaults, **{names[name]: value for name, value in values.items()}}
        Optimizer.__setstate__(self, {"defaults": defaults})
        self._warned_capturable_if_run_uncaptured = True

    # ---- what is shared with the base optimizer ----------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        if self._control.state is not State.CLEAN:
            self._control.gradients.note_reader(self.base_optimizer.param_groups)
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    def _params(self) -> list[Tensor]:
        """The parameters of all groups; to be read, not kept: of a single group it is the group's own list."""
        own = self.base_optimizer.param_groups
        return own[0]["params"] if len(own) == 1 else list(chain.from_iterable([group["params"] for group in own]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, in every state."""
        were_read = self._control.gradients.were_read
        super().zero_grad(set_to_none)
        self._control.gradients.were_read = were_read

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both optimizers; SAM's missing keys take their constructor values.

        Raises:
            RuntimeError: a step has begun: the weights are perturbed, or micro-batches have been added up.
        """
        self._control.require(Move.ADD_PARAM_GROUP)
        base, known = self.base_optimizer, len(self.base_optimizer.param_groups)
        values = {name: self.defaults[key] for name, key in self._names.items()}
        candidate = {**base.defaults, **{key: values[name] for name, key in self._names.items()}, **param_group}
        groups.refuse_settings(param_group, base.defaults, self._names, known)
        groups.check_group(candidate, self._names, known)
        base.add_param_group(param_group)
        try:
            check_params(base.param_groups[-1]["params"])
            scaling_of(base.param_groups[-1], candidate[self._names["adaptive"]], self._control.model)
        except (TypeError, ValueError):
            base.param_groups.pop()
            raise
        groups.fill(base, self._names, values, since=known)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, SAM's group keys in its groups; nothing of the perturbation.

        Raises:
            RuntimeError: a step has begun: the weights are perturbed, or micro-batches have been added up.
        """
        self._control.require(Move.STATE_DICT)
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result: dict[str, Any] = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, result) or result
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of SAM or of a plain base optimizer; keys of ours that it lacks keep their present values.

        One of the popular SAM class holds no state of its base optimizer: its groups are loaded, momentum and moments start
        afresh, and a warning says so.

        Raises:
            RuntimeError: a step has begun: the weights are perturbed, or micro-batches have been added up.
        """
        self._control.require(Move.LOAD_STATE_DICT)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self.base_optimizer.load_state_dict(checkpoints.without_foreign_state(state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def release_buffers(self) -> None:
        """Frees the backups (once the parameters' size) and accumulators; the next step allocates them again.

        Raises:
            RuntimeError: a step has begun: the weights are perturbed, or micro-batches have been added up.
        """
        self._control.require(Move.RELEASE_BUFFERS)
        self._ascent.release()
        self._descent.release()

    @property
    def buffer_bytes(self) -> int:
        """Bytes held by backups and accumulators."""
        return self._ascent.buffer_bytes

    def __getstate__(self) -> dict[str, Any]:
        self._control.require(Move.STATE_DICT)
        own = {name: self.defaults[key] for name, key in self._names.items()}
        settings = self._control.settings()
        return {"base_optimizer": self.base_optimizer, "names": self._names, "values": own, "settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # Optimizer.load_state_dict's way of setting groups and state
            self.base_optimizer.__setstate__(state)
            return
        self._attach(state["base_optimizer"], state["names"], state["values"], Control(**state["settings"]))

    def __repr__(self) -> str:
        own, base = type(self).__name__, type(self.base_optimizer).__name__
        told = ", ".join(f"{name}={value!r}" for name, value in self._control.differing().items())
        groups = super().__repr__().replace(f"{own} (", f"{base} (", 1)
        return f"{own}({told}) around {groups}" if told else f"{own} around {groups}"
