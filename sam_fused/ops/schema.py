"""Every operation once: its schema, what it writes, how many elements it reads and writes; formulas are in ``functional``.

All operations take lists of tensors (one entry per parameter, all on one device) and scalars as tensors, never wait for the
device, and treat element i of every list as one parameter. Each has one overload per backend,
``torch.ops.sam_fused.<op>.<backend>``; the functions of ``sam_fused.ops`` choose the backend, check the arguments and make the
mutation visible to autograd.

Operands that repeat:

``hyper``
    float64 table ``[groups, columns]``, on the CPU or on the parameters' device: the hyper-parameters of each parameter group.
``groups``
    the row of ``hyper`` for each tensor; empty means row 0 for all.
``scaling``
    the ascent's scaling T of each tensor: 0 for T = 1, 1 for T = ``|w|`` (ASAM, 2102.11600, with eta = 0); empty means 0.
``accumulators``, ``weight``
    the gradient is ``accumulator + weight * gradient``: the last micro-batch's beside those of the others. One accumulator
    per parameter, laid out as it, in the dtype of the arithmetic (fp32, fp64 for fp64), and a scalar tensor; both or neither.
``inv_scale``, ``clip``
    scalar tensors that multiply the gradient: the inverse loss scale, the clipping factor.
``found_inf``
    scalar tensor; where it is not 0 the last pass restores the weights and leaves the optimizer's state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "foreach", "native", "triton")

PERTURB_COLUMNS = ("rho", "perturb_eps")
SGD_COLUMNS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize")


@dataclass(frozen=True)
class Op:
    """One operation. ``accesses`` is (reads, writes) in elements per parameter, as the native backend does it."""

    name: str
    signature: str
    fake: Callable[..., Any]
    mutates: tuple[str, ...]
    accesses: tuple[int, int]

    def complete(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with an empty list for each list left out: a schema cannot have an empty tensor list as a default."""
        lists = (name for name in _LIST_ARGUMENTS if f" {name}" in self.signature and name not in arguments)
        return {**arguments, **{name: [] for name in lists}}


_LIST_ARGUMENTS = ("params", "scaling", "groups", "first", "accumulators", "momentum_buffers", "max_exp_avg_sqs")


def _no_result(*args: Any, **kwargs: Any) -> None:
    return None


def _grad_norm_fake(grads: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    wide = any(grad.dtype == torch.float64 for grad in grads)
    norm = grads[0].new_empty((), dtype=torch.float64 if wide else torch.float32)
    return norm, grads[0].new_empty((), dtype=torch.float32)


_LAST_PASS = "Tensor[] accumulators, Tensor? weight=None, Tensor? inv_scale=None, Tensor? found_inf=None, Tensor? clip=None"

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "grad_norm",
            "(Tensor[] grads, Tensor[] params, int[] scaling, Tensor[] accumulators, Tensor? weight=None, "
            "Tensor? inv_scale=None) -> (Tensor, Tensor)",
            _grad_norm_fake,
            (),
            (1, 0),
        ),
        Op(
            "perturb_",
            "(Tensor(a!)[] params, Tensor(b!)[] backups, Tensor[] grads, Tensor norm, Tensor hyper, int[] groups, "
            "int[] scaling, bool backup_exists=False, Tensor? inv_scale=None) -> ()",
            _no_result,
            ("params", "backups"),
            (2, 2),
        ),
        Op("restore_", "(Tensor(a!)[] params, Tensor[] backups) -> ()", _no_result, ("params",), (1, 1)),
        Op(
            "restore_accumulate_",
            "(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] accumulators, Tensor weight, "
            "bool fresh=False) -> ()",
            _no_result,
            ("params", "accumulators"),
            (3, 2),
        ),
        Op(
            "restore_sgd_",
            "(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor hyper, "
            f"int[] groups, int[] first, {_LAST_PASS}) -> ()",
            _no_result,
            ("params", "momentum_buffers"),
            (3, 2),
        ),
        Op(
            "restore_adamw_",
            "(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
            f"Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor hyper, int[] groups, {_LAST_PASS}) -> ()",
            _no_result,
            ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
            (4, 3),
        ),
    )
}

# The second door, native only: rows and gradient addresses instead of lists. Never traced, so no fake kernels. On a device,
# `table` is what device_table made of the rows.
_PREPARED_LAST_PASS = (
    "(Tensor rows, Tensor grads, Tensor hyper, Tensor(a!) perturbed, Tensor? weight=None, Tensor? inv_scale=None, "
    "Tensor? found_inf=None, Tensor? clip=None, Tensor? table=None) -> ()"
)
PREPARED: dict[str, str] = {
    "prepared_grad_norm_": "(Tensor rows, Tensor grads, Tensor(a!) norm, Tensor(b!) found_inf, Tensor? weight=None, "
    "Tensor? inv_scale=None, Tensor(c!)? overflows=None, Tensor? table=None) -> ()",
    "prepared_perturb_": "(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor(a!) perturbed, "
    "bool backup_exists=False, Tensor? inv_scale=None, Tensor? table=None) -> ()",
    "prepared_restore_": "(Tensor rows, Tensor(a!) perturbed, Tensor? table=None) -> ()",
    "prepared_restore_accumulate_": "(Tensor rows, Tensor grads, Tensor weight, Tensor(a!) perturbed, bool fresh=False, "
    "Tensor? table=None) -> ()",
    "prepared_restore_sgd_": _PREPARED_LAST_PASS,
    "prepared_restore_adamw_": _PREPARED_LAST_PASS,
    "device_table": "(Tensor rows, Tensor like) -> Tensor",
    "cuda_architectures": "() -> str",
    "cpu_capability": "() -> int",
    "row_words": "() -> int",
}

# Held for the life of the process: dropping a Library removes what it registered.
LIBRARY = torch.library.Library("sam_fused", "DEF")

for _op in OPS.values():
    for _backend in BACKENDS:
        LIBRARY.define(f"{_op.name}.{_backend}{_op.signature}")
        torch.library.register_fake(f"sam_fused::{_op.name}.{_backend}", _op.fake, lib=LIBRARY)
for _name, _signature in PREPARED.items():
    LIBRARY.define(f"{_name}{_signature}")


def overload(op: str, backend: str) -> Callable[..., Any]:
    """``torch.ops.sam_fused.<op>.<backend>``."""
    return getattr(getattr(torch.ops.sam_fused, op), backend)  # type: ignore[no-any-return]


def register_python_backend(backend: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Binds a backend written in Python to its overloads, on every device."""
    for name in OPS:
        LIBRARY.impl(f"{name}.{backend}", kernels[name], "CompositeExplicitAutograd")
