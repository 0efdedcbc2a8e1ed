"""The launches: ``ops/door.py``'s operations, a launch for each signature of dtypes that a set has (nearly always one).

A step of a set of one dtype is four launches, however many tensors it has: the chunks' sums of squares, their sum, the
perturbation, the last pass. So is a micro-batch, which ends with an accumulation instead. Nothing is autotuned: the kernels
work in place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import captures, schema
from ..door import Door
from ..dtypes import arithmetic_dtype
from .table import DeviceTable, Run
from .transfer import may_wait

_WARPS = 8

# What a thread reads of each role at a time: two 128-bit accesses of the widest, so that what is on the way suffices to keep
# the memory busy. The last pass holds everything in registers in the arithmetic's type, which counts as a role there: with 16
# halves of each, Adam took 200 registers, and a multiprocessor held one program. Accumulators are of that type, and with them
# Adam takes up to 128: two programs, as without.
_BYTES_PER_THREAD = 32

_SLOTS_AT_A_TIME = 1024


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """The only place that launches a kernel of an operation. Contraction is off: what is fused is written so."""
    kernel[(programs,)](*arguments, **constants, num_warps=_WARPS, num_stages=1, enable_fp_fusion=False)


@cache
def _constants(names: str, dtypes: tuple[torch.dtype, ...], arithmetic: torch.dtype, holds_t: bool = False) -> dict[str, Any]:
    """What a kernel is compiled for: a dtype for each of ``names``, the type T of arithmetic on ``arithmetic``, the block.

    ``holds_t``: T counts as a role.
    """
    import triton.language as tl

    of = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    constants = {name: of[dtype] for name, dtype in zip(names, dtypes, strict=True)}
    constants["T"] = of[arithmetic_dtype(arithmetic)]
    held = (*dtypes, arithmetic_dtype(arithmetic)) if holds_t else dtypes
    constants["BLOCK"] = _WARPS * 32 * (_BYTES_PER_THREAD // max(dtype.itemsize for dtype in held))
    return constants


@cache
def _bits(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {2: tl.int16, 4: tl.int32, 8: tl.int64}[dtype.itemsize]


def _restore(pointers: tuple[Tensor, Tensor], run: Run, weight: torch.dtype) -> None:
    from .kernels_ascent import restore

    block = _constants("W", (weight,), weight)["BLOCK"]
    _launch(restore, run.chunks, *pointers, *run.place, BITS=_bits(weight), BLOCK=block)


def _on_device(hyper: Tensor, columns: tuple[str, ...], table: DeviceTable, **used_by: str) -> Tensor:
    """The table of hyper-parameters on the device; checked, because kernels read what it says without asking again.

    ``used_by``: for a role, the column that is not 0 where a group uses it.
    """
    if hyper.dim() != 2 or hyper.size(1) != len(columns) or hyper.size(0) < table.groups or hyper.dtype != torch.float64:
        raise ValueError(
            f"hyper: expected a float64 table [{table.groups} or more, {len(columns)}] of {', '.join(columns)}, "
            f"got {hyper.dtype} {tuple(hyper.size())}: build it with torch.tensor([[...]], dtype=torch.float64)."
        )
    # A table on the device would have to be waited for.
    if hyper.device.type == "cpu" and not table.has_seen(hyper):
        for role, column in used_by.items():
            index = table.lacking(role, hyper[:, columns.index(column)].tolist())
            if index is not None:
                raise ValueError(
                    f"tensor {index}: expected optimizer state like the parameter because its group has {column}, got none: "
                    "pass it."
                )
    return table.hyper(hyper.contiguous())


class TritonDoor:
    """``ops/door.py``'s protocol. What is kept between calls is kept in the table, which must be given."""

    def table(self, rows: Tensor, device: torch.device) -> DeviceTable:
        return DeviceTable(rows, device)

    def grad_norm_(
        self,
        rows: Tensor,
        grads: Tensor,
        norm: Tensor,
        found_inf: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        overflows: Tensor | None,
        table: DeviceTable,
    ) -> None:
        from .kernels_ascent import finish_norm, sum_of_squares

        table.check_accumulators("grad", weight is not None)
        with table.on_device():
            pointers, slots, addresses = table.pointers(), table.slots(), table.grads(grads)
            wide = (0, 0)
            for run in table.runs("grad", "weight") if table.is_scaled else table.runs("grad"):
                grad, param = run.dtypes[0], run.dtypes[-1]
                if grad == torch.float64:  # neighbours: the table is sorted by the gradients' dtypes first
                    wide = (wide[0] if wide[1] else run.chunk, run.chunk + run.chunks)
                arguments = (*pointers, addresses, slots, weight, inv_scale, *run.place, table.chunks)
                constants = _constants("GW", (grad, param), grad, holds_t=weight is not None)
                _launch(sum_of_squares, run.chunks, *arguments, **constants, SCALED=table.is_scaled)
            _launch(finish_norm, 1, slots, norm, found_inf, overflows, table.chunks, *wide, LANES=_SLOTS_AT_A_TIME)

    def perturb_(
        self,
        rows: Tensor,
        grads: Tensor,
        norm: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        backup_exists: bool,
        inv_scale: Tensor | None,
        table: DeviceTable,
    ) -> None:
        """Whatever is thrown, the launches that took place are undone: the weights are then clean, and the cell says so."""
        from .kernels_ascent import perturb

        with table.on_device():
            factors = _on_device(hyper, schema.PERTURB_COLUMNS, table)
            pointers, addresses = table.pointers(), table.grads(grads)
            runs = table.runs("grad", "weight")
            marks, number = table.marks(len(runs)), table.next_number()
            try:
                for index, run in enumerate(runs):
                    grad, weight = run.dtypes
                    arguments = (*pointers, addresses, norm, factors, inv_scale, marks[index:], number, *run.place)
                    constants = _constants("WG", (weight, grad), weight)
                    _launch(perturb, run.chunks, *arguments, **constants, BITS=_bits(weight), KEEP=not backup_exists)
                perturbed.fill_(1)
            except BaseException:
                # An interrupt may come after a launch and before anything here could note it: the device knows. (A capture that
                # fails has launched nothing.)
                if not captures.is_capturing(table.device):
                    with may_wait(table.device):
                        seen = marks.tolist()
                    for run, mark in zip(runs, seen, strict=True):
                        if mark == number:
                            _restore(pointers, run, run.dtypes[1])
                    perturbed.fill_(0)
                raise

    def restore_(self, rows: Tensor, perturbed: Tensor, table: DeviceTable) -> None:
        with table.on_device():
            pointers = table.pointers()
            for run in table.runs("weight"):
                _restore(pointers, run, run.dtypes[0])
        perturbed.fill_(0)

    def restore_accumulate_(
        self, rows: Tensor, grads: Tensor, weight: Tensor, perturbed: Tensor, fresh: bool, table: DeviceTable
    ) -> None:
        from .kernels_ascent import restore_accumulate

        table.check_accumulators("weight", True)
        with table.on_device():
            operands = (*table.pointers(), table.grads(grads), weight)
            for run in table.runs("grad", "weight"):
                grad, param = run.dtypes
                constants = _constants("G", (grad,), param, holds_t=True)
                _launch(restore_accumulate, run.chunks, *operands, *run.place, **constants, BITS=_bits(param), FRESH=fresh)
        perturbed.fill_(0)

    def restore_sgd_(
        self,
        rows: Tensor,
        grads: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        table: DeviceTable,
    ) -> None:
        from .kernels_descent import restore_sgd

        table.check_accumulators("weight", weight is not None)
        with table.on_device():
            factors = _on_device(hyper, schema.SGD_COLUMNS, table, state0="momentum")
            operands = (*table.pointers(), table.grads(grads), factors, weight, inv_scale, found_inf, clip, table.ticket())
            runs = table.runs("grad", "weight", "state0")
            for run in runs:
                grad, param, state = run.dtypes
                ending = table.rows if table.has_first_steps and run is runs[-1] else 0
                constants = _constants("WGS", (param, grad, state), param, holds_t=True)
                _launch(restore_sgd, run.chunks, *operands, *run.place, ending, **constants, BITS=_bits(param))
            if found_inf is None:
                table.first_steps_taken()
        perturbed.fill_(0)

    def restore_adamw_(
        self,
        rows: Tensor,
        grads: Tensor,
        hyper: Tensor,
        perturbed: Tensor,
        weight: Tensor | None,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        table: DeviceTable,
    ) -> None:
        from .kernels_descent import advance_steps, restore_adamw

        table.check_accumulators("weight", weight is not None)
        with table.on_device():
            factors = _on_device(hyper, schema.ADAM_COLUMNS, table, state2="amsgrad")
            operands = (*table.pointers(), table.grads(grads), factors, weight, inv_scale, found_inf, clip, table.ticket())
            runs = table.runs("grad", "weight", "state0", "state1", "state2")
            for run in runs:
                grad, param, *state = run.dtypes
                advancing = table.rows if run is runs[-1] else 0
                constants = _constants("WGMVX", (param, grad, *state), param, holds_t=True)
                _launch(restore_adamw, run.chunks, *operands, *run.place, advancing, **constants, BITS=_bits(param))
            if not runs and table.rows:
                _launch(advance_steps, 1, operands[0], found_inf, table.rows)
        perturbed.fill_(0)


DOOR: Door = TritonDoor()
