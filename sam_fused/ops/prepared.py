"""Tensors that go through a step together, with what does not change between steps looked up once.

A ``TensorSet`` is what the optimizer layer talks to. It has two ways into the same kernels. The fast one, for backends with
compiled kernels (``DOORS``) and plain tensors, keeps an int64 table with one row per tensor (``TensorRow`` in
``csrc/plan.h``) and hands over one int64 tensor of the fresh gradients' addresses: marshalling eight lists of 161 tensors
into C++ costs 0.2 ms, more than the arithmetic of a small model. Everything an address stands for is checked on every step:
``is_current`` holds each cached address against the tensor's present one (whoever keeps a set asks before using it, and makes
a new one if not), ``checked`` looks at each gradient's type, device, dtype, size and layout. Whatever does not fit, and
whatever a compiler or a dispatch mode must see, takes the list operations of ``sam_fused.ops.functional``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backends, captures, functional, native, triton
from .checks import check_tensor, is_dense, same_layout
from .door import Door
from .dtypes import SUPPORTED
from .fingerprint import PLAIN_TYPES, Fingerprint
from .rows import FIRST, build_rows

# The backends that have a second door.
DOORS: dict[str, Door] = {"native": native.DOOR, "triton": triton.DOOR}

_GRAD_TYPE = frozenset((Tensor, torch.nn.Parameter))

_dtype_of = attrgetter("dtype")
_version_of = attrgetter("_version")
_data_ptr = Tensor.data_ptr


@dataclass(frozen=True)
class Gradients:
    """Gradients that one set has checked: for this step's operations on that set, and no longer."""

    tensors: Sequence[Tensor]
    addresses: Tensor | None  # int64, for the fast way; None where the lists must be taken
    fit: bool  # whether the list operations would find nothing to say about them


class Factors(NamedTuple):
    """The scalars of a last pass, in the doors' order: 0-dim tensors on the parameters' device, see ``ops/schema.py``."""

    weight: Tensor | None = None
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None


NO_FACTORS = Factors()


@dataclass
class _FastWay:
    """A set's way through its backend's second door: rows, what the device reads in their place, and where norms are put."""

    door: Door
    rows: Tensor
    table: Any
    norm: Tensor
    found_inf: Tensor


def _seen_by_torch_only() -> bool:
    """Whether a compiler or a dispatch mode is watching: raw addresses would be invisible to it."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_data_ptr, tensors))


def _properties(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.size(), tensor.stride()) for tensor in tensors]


class TensorSet:
    """Parameters of one device with their backups and base-optimizer state.

    Args:
        params: the parameters, all on one device.
        backups: a tensor for each, laid out as the parameter; the parameter itself where nothing was perturbed. Owned by
            whoever makes the set: their addresses are looked up once and for all.
        backend: the backend that serves them.
        groups, scaling: see ``sam_fused.ops.schema``.
        states: the base optimizer's state lists, in the order of the operation: ``(momentum_buffers,)`` or
            ``(exp_avgs, exp_avg_sqs, max_exp_avg_sqs)``.
        steps: Adam's step counts.
        first: 1 where the base optimizer creates the momentum buffer in the coming step.
        accumulators: what the micro-batches before this one add up to, for a set that ends a micro-batch.
        grad_dtypes: those of the gradients to come, where they are not the parameters'.
        perturbed: the cell that says whether the parameters are perturbed; shared between the set that perturbs and the one
            that restores. The second door writes it in the call that moves the weights.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        backups: Sequence[Tensor],
        *,
        backend: str,
        groups: Sequence[int] = (),
        scaling: Sequence[int] = (),
        states: tuple[Sequence[Tensor], ...] = (),
        steps: Sequence[Tensor] = (),
        first: Sequence[int] = (),
        accumulators: Sequence[Tensor] = (),
        grad_dtypes: Sequence[torch.dtype] = (),
        perturbed: Tensor | None = None,
    ) -> None:
        self.params = list(params)
        self.backups = list(backups)
        self.backend = backend
        self.groups = list(groups)
        self.scaling = list(scaling)
        self.states = tuple(list(state) for state in states)
        self.steps = list(steps)
        self.first = list(first)
        self.accumulators = list(accumulators)
        self.perturbed = torch.zeros(1, dtype=torch.int64, device="cpu") if perturbed is None else perturbed
        self._device = self.params[0].device if self.params else torch.device("cpu")
        self._fixed = [*self.params, *(t for state in self.states for t in state), *self.steps]
        self._fixed_addresses = _addresses(self._fixed) if self._has_plain_memory() else []
        self._dtypes = list(grad_dtypes) or list(map(_dtype_of, self.params))
        self._numels = list(map(Tensor.numel, self.params))
        self._fixed_properties = _properties(self._fixed) if self._fixed_addresses else []
        self._checked_before: set[str] = set()
        self._fixed_were = Fingerprint()
        self._grads_were = Fingerprint()
        self._fast = self._fast_way() if self._fixed_addresses else None

    # ---- construction and validity -----------------------------------------------------------------------------------

    def _has_plain_memory(self) -> bool:
        return all(
            type(t) in PLAIN_TYPES and t.layout == torch.strided and not t.is_neg()
            for t in (*self._fixed, *self.backups, *self.accumulators)
        )

    def _fast_way(self) -> _FastWay | None:
        if self.backend not in DOORS or backends.COMPILED[self.backend](self._device) is not None:
            return None
        rows = self._build_rows()
        if rows is None:
            return None
        if captures.is_capturing(self._device):
            # The table would be written by the graph's replays, and be there for nobody before the first one.
            raise RuntimeError(
                "a step in a CUDA graph: expected a step like it before the capture, got the first one with these parameters, "
                "gradients and state: take one step before the capture."
            )
        door = DOORS[self.backend]
        wide = torch.float64 in self._dtypes
        norm = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=self._device)
        found_inf = torch.zeros((), dtype=torch.float32, device=self._device)
        return _FastWay(door, rows, door.table(rows, self._device), norm, found_inf)

    def _fits(self, tensor: Tensor, param: Tensor) -> bool:
        return tensor.dtype in SUPPORTED and tensor.device == self._device and same_layout(param, tensor)

    def _build_rows(self) -> Tensor | None:
        """The table, or None where a tensor's memory is not arranged as its parameter's, or somewhere else."""
        if not all(is_dense(p) and p.device == self._device and p.dtype in SUPPORTED for p in self.params):
            return None
        if not all(b.dtype == p.dtype and self._fits(b, p) for b, p in zip(self.backups, self.params, strict=True)):
            return None
        if not all(self._fits(a, p) for a, p in zip(self.accumulators, self.params, strict=False)):
            return None
        for column in filter(None, self.states):
            for tensor, param in zip(column, self.params, strict=True):
                # An empty one is unused by this parameter's group; the kernels look at the hyper-parameters first.
                if tensor.numel() and not self._fits(tensor, param):
                    return None
        if not all(
            s.device == self._device and s.numel() == 1 and s.dtype in (torch.float32, torch.float64) for s in self.steps
        ):
            return None
        by_role: dict[str, Sequence[Tensor]] = {"weight": self.params, "backup": self.backups, "step": self.steps}
        by_role["accumulator"] = self.accumulators
        by_role |= {f"state{index}": state for index, state in enumerate(self.states)}
        return build_rows(
            by_role, self._numels, groups=self.groups, scaling=self.scaling, first=self.first, grad_dtypes=self._dtypes
        )

    def is_current(self) -> bool:
        """Whether every address looked up at construction is still the tensor's, with the same memory behind it."""
        if not self._fixed_addresses:
            return True
        if _addresses(self._fixed) != self._fixed_addresses:
            return False
        # The same address can be looked at transposed (`p.data.t()`), in another dtype, or cut off (`p.data[:8]`).
        if self._fixed_were.matches(self._fixed):
            return True
        if _properties(self._fixed) != self._fixed_properties:
            return False
        self._fixed_were.take(self._fixed)
        return True

    def checked(self, grads: Sequence[Tensor]) -> Gradients:
        """The gradients, one per parameter, ready for the operations below.

        Raises:
            TypeError: a gradient is sparse, quantised, or of an unsupported dtype.
            ValueError: a gradient is on another device, or of another shape, than its parameter.
        """
        captures.keep_if_captured(self, self._device)
        fits = self._fast is not None and not _seen_by_torch_only()
        if fits and (self._grads_were.matches(grads) or self._fit_the_rows(grads)):
            addresses = _addresses(grads)
            # Null is an empty tensor's address, or that of a gradient without memory (zero by definition, or freed).
            if all(addresses) or not any(n for n, address in zip(self._numels, addresses, strict=True) if not address):
                # By way of a list: an array that grows with an iterator takes longer than both.
                return Gradients(grads, torch.frombuffer(array("q", addresses), dtype=torch.int64), True)
        if self._fast is not None or not self._grads_were.matches(grads):
            self._check_each(grads)
            if self._fast is None:
                self._grads_were.take(grads)
        return Gradients(grads, None, self._fast is None)

    def _fit_the_rows(self, grads: Sequence[Tensor]) -> bool:
        """Whether reading numel elements of the parameter's dtype from each gradient's address is right."""
        fit = (
            _GRAD_TYPE.issuperset(map(type, grads))
            and len(grads) == len(self.params)
            and list(map(_dtype_of, grads)) == self._dtypes
            and all(g.device == self._device and g.layout == torch.strided and not g.is_neg() for g in grads)
            and all(map(same_layout, self.params, grads))
        )
        if fit:
            self._grads_were.take(grads)
        return fit

    def _check_each(self, grads: Sequence[Tensor]) -> None:
        for index, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
            name = f"gradient {index} of shape {tuple(param.shape)}"
            check_tensor(grad, name)
            if grad.device != param.device or grad.size() != param.size():
                raise ValueError(
                    f"{name}: expected {tuple(param.size())} on {param.device} as its parameter, got {tuple(grad.size())} on "
                    f"{grad.device}: run backward again after moving or resizing the parameter."
                )

    # ---- the operations ----------------------------------------------------------------------------------------------

    def _lists(self, grads: Gradients, **others: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        return {"params": self.params, "backups": self.backups, "grads": grads.tensors, **others}

    def _through_lists(self, op: str, grads: Gradients, lists: dict[str, Sequence[Tensor]], arguments: dict[str, Any]) -> Any:
        """The list operation; once it has checked this set's lists, and for gradients that fit, without checking them again."""
        if grads.fit and op in self._checked_before and self.params:
            reference_list = "params" if "params" in lists else "grads"
            return functional.run(op, self.backend, lists, reference_list, arguments)
        result = getattr(functional, op)(**lists, **arguments, backend=self.backend)
        self._checked_before.add(op)
        return result

    def grad_norm(
        self,
        grads: Gradients,
        *,
        weight: Tensor | None = None,
        inv_scale: Tensor | None = None,
        overflows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``functional.grad_norm``. The result tensors are reused by the next call. ``overflows``, an int64 scalar on the
        parameters' device, becomes one more where the norm is not finite."""
        fast = self._fast
        if grads.addresses is None or fast is None:
            lists = {"grads": grads.tensors, **({"params": self.params} if any(self.scaling) else {}), **self._summed()}
            arguments = {"scaling": self.scaling, "weight": weight, "inv_scale": inv_scale}
            norm, found_inf = self._through_lists("grad_norm", grads, lists, arguments)
            if overflows is not None:
                overflows.add_(found_inf.to(overflows.dtype))
            return norm, found_inf
        operands = (weight, inv_scale, overflows)
        fast.door.grad_norm_(fast.rows, grads.addresses, fast.norm, fast.found_inf, *operands, fast.table)
        return fast.norm, fast.found_inf

    def _summed(self) -> dict[str, Sequence[Tensor]]:
        return {"accumulators": self.accumulators} if self.accumulators else {}

    def perturb_(
        self,
        grads: Gradients,
        norm: Tensor,
        hyper: Tensor,
        *,
        inv_scale: Tensor | None = None,
        backup_exists: bool = False,
    ) -> None:
        """``functional.perturb_``; afterwards ``perturbed`` is 1. If anything is thrown the weights are clean or ``w + e`` and
        ``perturbed`` says which."""
        fast = self._fast
        if grads.addresses is not None and fast is not None:
            increment_version(self.params)  # before: the checks have just brought these objects into the cache
            fast.door.perturb_(fast.rows, grads.addresses, norm, hyper, self.perturbed, backup_exists, inv_scale, fast.table)
            return
        arguments = {
            "norm": norm,
            "hyper": hyper,
            "groups": self.groups,
            "scaling": self.scaling,
            "inv_scale": inv_scale,
        }
        if self.backend == "foreach" and not backup_exists:
            self._perturb_in_two_calls(grads, arguments)
            return
        # The backup first, then the cell, then the weights: an interrupt between any two leaves something restorable.
        if not backup_exists:
            functional.restore_(self.backups, self.params, backend=self.backend)
        self.perturbed.fill_(1)
        self._through_lists("perturb_", grads, self._lists(grads), {**arguments, "backup_exists": True})

    def _perturb_in_two_calls(self, grads: Gradients, arguments: dict[str, Any]) -> None:
        # foreach copies the backup and then adds, so the backup need not be copied twice as above: if it was interrupted, the
        # backups' versions tell whether the weights can have moved.
        before = list(map(_version_of, self.backups))
        try:
            self._through_lists("perturb_", grads, self._lists(grads), arguments)
            self.perturbed.fill_(1)
        except BaseException:
            if any(backup._version != version for backup, version in zip(self.backups, before, strict=True)):
                self.perturbed.fill_(1)
            raise

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_perturbed(self) -> bool:
        return bool(self.perturbed.item())

    def restore_(self) -> None:
        """``functional.restore_``; afterwards ``perturbed`` is 0."""
        fast = self._fast
        if fast is not None and not _seen_by_torch_only() and self.is_current():
            increment_version(self.params)
            fast.door.restore_(fast.rows, self.perturbed, fast.table)
            return
        functional.restore_(self.params, self.backups, backend=self.backend)
        self.perturbed.fill_(0)

    @torch.no_grad()
    def restore_converted_(self) -> None:
        """``restore_`` for parameters that were changed while perturbed: what was clean, in the dtype and place of today."""
        for param, backup in zip(self.params, self.backups, strict=True):
            if param.size() == backup.size():
                param.copy_(backup)
        self.perturbed.fill_(0)

    def restore_accumulate_(self, grads: Gradients, weight: Tensor, fresh: bool = False) -> None:
        """``functional.restore_accumulate_``; afterwards ``perturbed`` is 0."""
        fast = self._fast
        if grads.addresses is None or fast is None:
            lists = self._lists(grads, **self._summed())
            self._through_lists("restore_accumulate_", grads, lists, {"weight": weight, "fresh": fresh})
            self.perturbed.fill_(0)
            return
        increment_version(self.params)  # and not the accumulators', which are the set's own, as its backups are
        fast.door.restore_accumulate_(fast.rows, grads.addresses, weight, self.perturbed, fresh, fast.table)

    def restore_sgd_(self, grads: Gradients, hyper: Tensor, factors: Factors = NO_FACTORS) -> None:
        """``functional.restore_sgd_`` with the set's momentum buffers."""
        fast = self._fast
        if grads.addresses is None or fast is None:
            lists = self._lists(grads, momentum_buffers=self.states[0] if self.states else [], **self._summed())
            arguments = {"hyper": hyper, "groups": self.groups, "first": self.first}
            self._through_lists("restore_sgd_", grads, lists, {**arguments, **factors._asdict()})
            self.perturbed.fill_(0)
        else:
            increment_version(self._fixed)
            fast.door.restore_sgd_(fast.rows, grads.addresses, hyper, self.perturbed, *factors, fast.table)
        if any(self.first):
            self._momentum_exists(factors.found_inf, by_the_table=grads.addresses is not None)

    def _momentum_exists(self, found_inf: Tensor | None, by_the_table: bool) -> None:
        """The buffers were created, unless the step was skipped."""
        if found_inf is not None and found_inf.is_cpu and bool(found_inf):
            return
        self.first = [0] * len(self.params)
        if self._fast is None or (found_inf is not None and not found_inf.is_cpu and by_the_table):
            # Whether a device skipped the step is not asked: its table keeps ``first`` until a step is taken. (Should such a
            # set go through lists later, its buffer of zeros is taken for one that was created; only dampening could tell.)
            return
        self._fast.rows[:, FIRST] = 0
        if not by_the_table:
            self._fast.table = self._fast.door.table(self._fast.rows, self._device)

    def restore_adamw_(self, grads: Gradients, hyper: Tensor, factors: Factors = NO_FACTORS) -> None:
        """``functional.restore_adamw_`` with the set's moments and step counts."""
        fast = self._fast
        if grads.addresses is None or fast is None:
            names = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
            lists = self._lists(grads, **dict(zip(names, self.states, strict=True)), steps=self.steps, **self._summed())
            arguments = {"hyper": hyper, "groups": self.groups, **factors._asdict()}
            self._through_lists("restore_adamw_", grads, lists, arguments)
            self.perturbed.fill_(0)
            return
        increment_version(self._fixed)
        fast.door.restore_adamw_(fast.rows, grads.addresses, hyper, self.perturbed, *factors, fast.table)
