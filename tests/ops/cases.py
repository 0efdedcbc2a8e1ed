"""The one table of dtypes with their tolerances, the one list of shapes and layouts, the one list of cases per operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """A storage dtype: significand bits, the exponent of its smallest subnormal, and how exact a norm over it must be."""

    name: str
    dtype: torch.dtype
    bits: int
    smallest: int
    # fp32 and the halves: the norm is returned in fp32, half a unit is 6e-8. fp64: 2e5 sums of 1e-16 each, added in lanes.
    norm_tolerance: float

    @property
    def roundoff(self) -> float:
        """Half a unit in the last place, relative."""
        return 2.0**-self.bits

    @property
    def arithmetic(self) -> Storage:
        return FP64 if self.dtype == torch.float64 else FP32


FP32 = Storage("fp32", torch.float32, 24, -149, 1e-6)
FP64 = Storage("fp64", torch.float64, 53, -1074, 1e-14)
BF16 = Storage("bf16", torch.bfloat16, 8, -133, 1e-6)
FP16 = Storage("fp16", torch.float16, 11, -24, 1e-6)
STORAGES = (FP32, FP64, BF16, FP16)
STORAGE_OF = {storage.dtype: storage for storage in STORAGES}


def intermediate(runner: str, storage: Storage) -> tuple[Storage, float]:
    """The precision that ``runner`` keeps between two operations on one element, and how many units each may be off by.

    Native, and the reference, keep the arithmetic's precision and round each operation correctly. Torch's multi-tensor calls
    round every intermediate list to storage, so the halves lose there what they lose in torch itself; its vector code for sqrt
    and division may be off by one more unit, and its fused kernels form lr / (1 - beta^t) in the arithmetic's precision.
    """
    if runner == "foreach":
        return storage, 2.0
    return storage.arithmetic, 1.0


# ---- shapes and layouts -----------------------------------------------------------------------------------------------


def _contiguous(values: Tensor) -> tuple[Tensor, Tensor]:
    held = values.clone(memory_format=torch.contiguous_format)
    return held, held


def _transposed(values: Tensor) -> tuple[Tensor, Tensor]:
    backwards = tuple(reversed(range(values.dim())))
    held = values.permute(backwards).clone(memory_format=torch.contiguous_format)
    return held.permute(backwards), held


def _channels_last(values: Tensor) -> tuple[Tensor, Tensor]:
    held = values.clone(memory_format=torch.channels_last)
    return held, held


SENTINEL = 7.0


def _with_gaps(values: Tensor) -> tuple[Tensor, Tensor]:
    """Every second element of each row of a larger block."""
    held = torch.full((*values.shape[:-1], 2 * values.shape[-1]), SENTINEL, dtype=values.dtype)
    view = held[..., ::2]
    view.copy_(values)
    return view, held


def _offset(values: Tensor) -> tuple[Tensor, Tensor]:
    """Dense, but its first element is aligned to no vector register."""
    held = torch.full((values.numel() + 2,), SENTINEL, dtype=values.dtype)
    view = held[1:-1].view(values.shape)
    view.copy_(values)
    return view, held


def _odd_unit_strides(values: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous except for the strides of dimensions of size 1, which mean nothing."""
    held = values.clone(memory_format=torch.contiguous_format)
    strides = [913 if size == 1 else stride for size, stride in zip(held.shape, held.stride(), strict=True)]
    return held.as_strided(held.shape, strides), held


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "gaps": _with_gaps,
    "offset": _offset,
    "unit_strides": _odd_unit_strides,
}


@dataclass(frozen=True)
class Entry:
    """One parameter: its shape, how its memory is arranged, and how its gradient's and everything else's is."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    others: str | None = None


# 15, 16, 17: around a vector register. 511 to 513: around the kernels' block.
SIZES = (0, 1, 15, 16, 17, 511, 512, 513)

ENTRIES = (
    *(Entry((size,)) for size in SIZES),
    Entry(()),
    Entry((0, 3)),
    Entry((7, 5), "transposed"),
    Entry((7, 5), "transposed", "contiguous"),
    Entry((7, 5), "contiguous", "transposed"),
    Entry((2, 3, 4, 5), "channels_last"),
    Entry((2, 3, 4, 5), "channels_last", "contiguous"),
    Entry((2, 3, 4, 5), "contiguous", "channels_last"),
    Entry((2, 3, 1, 1), "contiguous", "channels_last"),
    Entry((6, 5), "gaps"),
    Entry((33,), "gaps", "contiguous"),
    Entry((33,), "contiguous", "gaps"),
    Entry((17,), "offset"),
    Entry((100,), "offset", "contiguous"),
    Entry((100,), "contiguous", "offset"),
    Entry((1,), "unit_strides"),
    Entry((1,), "unit_strides", "gaps"),
    Entry((5, 1, 3), "unit_strides"),
    Entry((5, 1, 3), "unit_strides", "contiguous"),
    Entry((5, 1, 3), "contiguous", "unit_strides"),
)

# Those that a TensorSet takes by address.
FITTING = tuple(entry for entry in ENTRIES if entry.layout != "gaps" and entry.others in (None, "offset", "unit_strides"))

# Around the kernels' chunk and twice that, which is the usual one elsewhere; together enough for a parallel region.
LARGE = (
    *(Entry((size,)) for size in (32767, 32768, 32769, 65535, 65536, 65537)),
    Entry((150, 219), "transposed", "gaps"),
    Entry((40001,), "offset"),
)

MANY_SMALL = tuple(Entry((index % 23,)) for index in range(200))
ALL_EMPTY = (Entry((0,)), Entry((3, 0)), Entry((0,), "transposed"))
NOTHING: tuple[Entry, ...] = ()
LISTS = {"many_small": MANY_SMALL, "all_empty": ALL_EMPTY, "nothing": NOTHING}


# ---- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way of calling one operation. Rows of ``hyper``, ``scaling`` and ``first`` are dealt out to the tensors in turn."""

    name: str
    op: str
    hyper: tuple[tuple[float, ...], ...] = ()
    scaling: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    backup_exists: bool = False
    fresh: bool = False  # the accumulators are written and not read
    norm: float = 3.7
    in_place: bool = False  # backups are the parameters themselves: the plain base step
    steps: tuple[float, ...] = (0.0,)  # Adam's step counts so far

    def __str__(self) -> str:
        return self.name


NORM_CASES = (
    Case("norm", "grad_norm"),
    Case("norm-adaptive", "grad_norm", scaling=(1,)),
    Case("norm-some-adaptive", "grad_norm", scaling=(0, 1, 1)),
    Case("norm-inv_scale", "grad_norm", scalars={"inv_scale": 1 / 1024}),
    Case("norm-accumulated", "grad_norm", scalars={"weight": 0.3}),
    Case("norm-accumulated-adaptive", "grad_norm", scaling=(0, 1), scalars={"weight": 0.3, "inv_scale": 0.7}),
    Case("norm-inv_scale-adaptive", "grad_norm", scaling=(1, 0), scalars={"inv_scale": 0.3}),
)

# Columns: rho, perturb_eps.
PERTURB_CASES = (
    Case("perturb", "perturb_", ((0.05, 1e-12),)),
    Case("perturb-adaptive", "perturb_", ((2.0, 1e-12),), scaling=(1,)),
    Case("perturb-backup_exists", "perturb_", ((0.05, 1e-12),), backup_exists=True),
    Case("perturb-backup_exists-adaptive", "perturb_", ((0.5, 1e-12),), scaling=(1, 0), backup_exists=True),
    Case("perturb-groups", "perturb_", ((0.05, 1e-12), (0.5, 0.01), (0.0, 1e-12)), scaling=(0, 1)),
    Case("perturb-inv_scale", "perturb_", ((0.7, 0.0),), scalars={"inv_scale": 0.3}),
)

RESTORE_CASES = (Case("restore", "restore_"), Case("restore-in_place", "restore_", in_place=True))

ACCUMULATE_CASES = (
    Case("accumulate", "restore_accumulate_", scalars={"weight": 0.3}),
    Case("accumulate-fresh", "restore_accumulate_", scalars={"weight": 0.3}, fresh=True),
    Case("accumulate-in_place", "restore_accumulate_", scalars={"weight": 1.0}, in_place=True),
)

# Columns: lr, momentum, dampening, weight_decay, nesterov, maximize.
SGD_CASES = (
    Case("sgd", "restore_sgd_", ((0.1, 0, 0, 0, 0, 0),)),
    Case("sgd-wd", "restore_sgd_", ((0.1, 0, 0, 0.01, 0, 0),)),
    Case("sgd-maximize", "restore_sgd_", ((0.1, 0, 0, 0.01, 0, 1),)),
    Case("sgd-momentum", "restore_sgd_", ((0.1, 0.9, 0, 0, 0, 0),)),
    Case("sgd-dampening", "restore_sgd_", ((0.1, 0.9, 0.3, 0.01, 0, 0),)),
    Case("sgd-nesterov", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 1, 0),)),
    Case("sgd-nesterov-maximize", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 1, 1),)),
    Case("sgd-first", "restore_sgd_", ((0.1, 0.9, 0.3, 0.01, 0, 0),), first=(1,)),
    Case("sgd-first-nesterov", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 1, 0),), first=(1, 0)),
    Case(
        "sgd-groups",
        "restore_sgd_",
        ((0.1, 0.9, 0.3, 0.01, 0, 0), (0.5, 0, 0, 0, 0, 1), (0.01, 0.5, 0, 0.1, 1, 0)),
        first=(0, 1),
    ),
    Case("sgd-scaled", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 0, 1),), scalars={"inv_scale": 0.3, "clip": 0.7}),
    Case("sgd-clip", "restore_sgd_", ((0.1, 0, 0, 0, 0, 0),), scalars={"clip": 0.7, "found_inf": 0.0}),
    Case("sgd-accumulated", "restore_sgd_", ((0.1, 0, 0, 0.01, 0, 0),), scalars={"weight": 0.3}),
    Case(
        "sgd-accumulated-scaled",
        "restore_sgd_",
        ((0.1, 0.9, 0, 0.01, 1, 1), (0.5, 0.9, 0.3, 0, 0, 0)),
        first=(0, 1),
        scalars={"weight": 0.3, "inv_scale": 0.3, "clip": 0.7},
    ),
    Case("sgd-accumulated-found_inf", "restore_sgd_", ((0.1, 0.9, 0, 0, 0, 0),), scalars={"weight": 0.3, "found_inf": 1.0}),
    Case("sgd-in_place", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 1, 0),), in_place=True),
    Case("sgd-found_inf", "restore_sgd_", ((0.1, 0.9, 0, 0.01, 1, 0),), scalars={"found_inf": 1.0}),
)

# Columns: lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize.
ADAM_CASES = (
    Case("adam", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0, 0, 0, 0),)),
    Case("adam-wd", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 0, 0, 0),), steps=(4.0,)),
    Case("adamw", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0),), steps=(4.0,)),
    Case("adamw-amsgrad", "restore_adamw_", ((0.01, 0.8, 0.99, 1e-3, 0.1, 1, 1, 0),), steps=(1000.0,)),
    Case("adam-amsgrad-maximize", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 0, 1, 1),), steps=(4.0,)),
    Case("adamw-maximize", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 1),)),
    # Groups and step counts that change in the middle of a list, together and apart.
    Case(
        "adam-groups",
        "restore_adamw_",
        ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0), (0.1, 0.5, 0.9, 1e-3, 0, 0, 1, 1)),
        steps=(0.0, 0.0, 3.0, 3.0, 3.0),
    ),
    Case("adamw-scaled", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0),), scalars={"inv_scale": 0.3, "clip": 0.7}),
    Case("adamw-accumulated", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0),), scalars={"weight": 0.3}),
    Case(
        "adam-accumulated-scaled",
        "restore_adamw_",
        ((0.01, 0.9, 0.999, 1e-8, 0.1, 0, 1, 1),),
        steps=(4.0,),
        scalars={"weight": 0.3, "inv_scale": 0.3, "clip": 0.7},
    ),
    Case("adamw-in_place", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0),), in_place=True),
    Case("adamw-found_inf", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 1, 0),), scalars={"found_inf": 1.0}),
)

CASES = (*NORM_CASES, *PERTURB_CASES, *RESTORE_CASES, *ACCUMULATE_CASES, *SGD_CASES, *ADAM_CASES)

# One of each operation, in the form with the most in it.
WIDEST = (
    *(NORM_CASES[1], PERTURB_CASES[1], PERTURB_CASES[3], RESTORE_CASES[0], ACCUMULATE_CASES[0], SGD_CASES[8], ADAM_CASES[3]),
    *(case for case in (*SGD_CASES, *ADAM_CASES) if case.name in ("sgd-accumulated-scaled", "adam-accumulated-scaled")),
)
