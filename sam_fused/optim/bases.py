"""Base optimizers with a fused last pass: which ones, what their hyper-parameters and state are called.

A base optimizer runs fused if it is exactly SGD, Adam or AdamW and nobody is watching its own ``step``: hooks on it,
``differentiable``, a patched ``step`` all mean that the weights are restored and its own ``step`` is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sam_fused.ops import captures
from sam_fused.ops.hyper import Value, is_known, number
from sam_fused.ops.prepared import TensorSet


@dataclass(frozen=True)
class FusedBase:
    """How one family of base optimizers is run by the op layer."""

    hyper: Callable[[dict[str, Any]], list[Value]]
    state_keys: Callable[[dict[str, Any]], tuple[str, ...]]
    all_state_keys: tuple[str, ...]
    has_step_count: bool
    run: Callable[..., None]


def _sgd_hyper(group: dict[str, Any]) -> list[Value]:
    values = (
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        group["nesterov"],
        group["maximize"],
    )
    return [number(value) for value in values]


def _adam_hyper(group: dict[str, Any]) -> list[Value]:
    beta1, beta2 = group["betas"]
    values = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["decoupled_weight_decay"])
    return [number(value) for value in (*values, group["amsgrad"], group["maximize"])]


_SGD = FusedBase(
    hyper=_sgd_hyper,
    state_keys=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    all_state_keys=("momentum_buffer",),
    has_step_count=False,
    run=TensorSet.restore_sgd_,
)
_ADAM = FusedBase(
    hyper=_adam_hyper,
    state_keys=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
    all_state_keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    has_step_count=True,
    run=TensorSet.restore_adamw_,
)
_FAMILIES: dict[type[Optimizer], FusedBase] = {SGD: _SGD, Adam: _ADAM, AdamW: _ADAM}


def _is_scheduler_wrapper(base: Optimizer) -> bool:
    """Whether the instance's ``step`` is the class's own behind the counter that LR schedulers put there."""
    step = base.__dict__["step"]
    return getattr(step, "_wrapped_by_lr_sched", False) and getattr(step, "__wrapped__", None) is type(base).step


def fused_base(base: Optimizer) -> FusedBase | None:
    """The fused form of ``base``, or None if its own ``step`` must run."""
    family = _FAMILIES.get(type(base))
    if family is None or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    if "step" in base.__dict__ and not _is_scheduler_wrapper(base):
        return None
    for group in base.param_groups:
        if group.get("differentiable") or not is_known(group.get("momentum")):
            return None
    return family


class FusedState:
    """The base optimizer's state of some parameters, as the lists that the op layer takes.

    What is missing is created here, entered into ``base.state`` by ``commit``, and taken out again if the step does not happen.
    Step counts live on their parameter's device, as with torch's own ``fused=True``: there the kernel can read them, and leave
    them alone when the device finds that a step is to be skipped.
    """

    def __init__(self, family: FusedBase, base: Optimizer, params: list[Tensor], groups: list[dict[str, Any]]) -> None:
        self._family = family
        self._base = base
        self._params = params
        self._keys = [family.state_keys(group) for group in groups]
        self.first: list[int] = []
        self.columns: list[list[Tensor]] = [[] for _ in family.all_state_keys]
        self.steps: list[Tensor] = []
        self._missing: list[tuple[Tensor, str, Tensor]] = []
        self._moved: list[tuple[Tensor, Tensor, Tensor]] = []  # step counts: the parameter's, there, and as it was
        self._seen: tuple[Any, list[Any]] | None = None
        self._watched: list[Any] = []
        unused = {device: torch.empty(0, dtype=torch.float32, device=device) for device in {p.device for p in params}}
        for param, keys in zip(params, self._keys, strict=True):
            state = base.state.get(param, {})
            created = False
            for column, key in zip(self.columns, family.all_state_keys, strict=True):
                if key not in keys:
                    column.append(unused[param.device])
                    continue
                value = state.get(key)
                if value is None:
                    value = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
                    self._missing.append((param, key, value))
                    created = True
                column.append(value)
            self.first.append(int(created))
            if family.has_step_count:
                step = state.get("step")
                if step is None:
                    wide = _wide_default() and param.is_cpu
                    step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=param.device)
                    self._missing.append((param, "step", step))
                elif step.device != param.device:
                    here, step = step, step.to(param.device)
                    self._moved.append((param, step, here))
                self.steps.append(step)
        # A column that no group uses is passed as an empty list.
        self.columns = [c if any(t is not unused.get(t.device) for t in c) else [] for c in self.columns]
        self._refuse_to_be_captured()

    def _refuse_to_be_captured(self) -> None:
        """State that a graph creates would be created again by each of its replays."""
        new = [*(value for _, _, value in self._missing), *(there for _, there, _ in self._moved)]
        if any(map(captures.is_capturing, {tensor.device for tensor in new})):
            raise RuntimeError(
                "step(): expected the base optimizer's state to exist before a CUDA graph captures a step, got a first step: "
                "take one step before the capture."
            )

    def commit(self) -> None:
        """Enters what was missing into the base optimizer's state."""
        for param, key, value in self._missing:
            self._base.state[param][key] = value
        for param, there, _ in self._moved:
            self._base.state[param]["step"] = there

    def withdraw(self) -> None:
        """Takes it out again: the step was not taken."""
        for param, key, _ in self._missing:
            if self._base.state[param].pop(key, None) is not None and not self._base.state[param]:
                del self._base.state[param]
        for param, _, here in self._moved:
            self._base.state[param]["step"] = here

    def settle(self) -> None:
        """The step was taken."""
        self._missing.clear()
        self._moved.clear()
        if not self._seen:
            self._remember()

    def _remember(self) -> None:
        state = self._base.state
        self._seen = (state, list(state.values()))
        held = [state.get(param) or {} for param in self._params]
        users = [[d for d, keys in zip(held, self._keys, strict=True) if key in keys] for key in self._family.all_state_keys]
        used = [
            [t for t, keys in zip(column, self._keys, strict=False) if key in keys]
            for column, key in zip(self.columns, self._family.all_state_keys, strict=True)
        ]
        self._watched = [
            *zip(map(itemgetter, self._family.all_state_keys), users, used, strict=True),
            (itemgetter("step"), held if self.steps else [], self.steps),
        ]

    def is_current(self) -> bool:
        """Whether ``base.state`` still holds exactly these tensors (loading a checkpoint replaces them).

        Looked up through the dict's values: a lookup by parameter calls ``Tensor.__hash__``, which is Python.
        """
        if not self._seen:
            return False
        state, values = self._seen
        if self._base.state is not state or len(state) != len(values) or not all(map(is_, state.values(), values)):
            return False
        try:
            return all(all(map(is_, map(get, dicts), tensors)) for get, dicts, tensors in self._watched)
        except KeyError:
            return False


def _wide_default() -> bool:
    return torch.get_default_dtype() == torch.float64
