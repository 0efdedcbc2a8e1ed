"""SAM's moves without an optimizer: any tensors are moved along any gradients, and come back bit for bit.

The arithmetic is the optimizer's (``sam_fused.ops.functional.perturb_``), on the same backends. What has moved is held by a
``Moved`` (``moved.py``), which stays until it is put back; the caller's ``Perturbation`` is a handle on it, and may be lost.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from numbers import Real
from types import TracebackType

import torch
from torch import Tensor

from .compiled import not_traced
from .moved import Moved, refuse_capture
from .ops import backends, checks
from .ops.functional import combined_norm
from .ops.prepared import TensorSet
from .optim.ascent import partition


class Perturbation:
    """Tensors at ``w + e``, from ``perturb`` to ``restore``: as a context manager, which restores on the way out, or by hand.

    What is written into the tensors in between is lost: take optimizer steps after restoring. When the last reference to it
    goes while the tensors are perturbed, a RuntimeWarning says so, and they are restored; unless an optimizer or anybody else
    has written into them since (through ``.data`` nobody hears of it), whose work this would undo at a moment that nobody
    chose: then they stay as they are.

    Attributes:
        norm: what e was divided by, a 0-dim tensor.
    """

    def __init__(self, norm: Tensor, moved: Moved) -> None:
        self.norm = norm
        self._moved = moved
        self._entered = False
        # Not __del__: the interpreter's exit, where nobody can look at weights any more, would call that one, too.
        self._finalizer = weakref.finalize(self, moved.let_go)
        self._finalizer.atexit = False

    @property
    def is_perturbed(self) -> bool:
        """True until the tensors are restored, also where nothing moved because there was no gradient or a zero one."""
        return self._moved.is_perturbed

    def restore(self) -> None:
        """The tensors are what they were, bit for bit and in place. Does nothing the second time.

        Raises:
            RuntimeError: a later perturbation of the same memory has not been restored; nothing is written then.
        """
        self._moved.put_back_in_order()

    def __enter__(self) -> Perturbation:
        if self._entered or not self.is_perturbed:
            raise RuntimeError(
                "with: expected a perturbation that was neither entered nor restored, got a used one: call perturb() again."
            )
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._moved.put_back_in_order()
        else:
            self._moved.unwind()


@not_traced
def perturb(
    tensors: Iterable[Tensor],
    grads: Iterable[Tensor | None] | None = None,
    rho: float | Tensor = 0.05,
    *,
    adaptive: bool = False,
    perturb_eps: float | Tensor = 1e-12,
    norm: Tensor | None = None,
    backend: str | None = None,
) -> Perturbation:
    """Moves the tensors to ``w + e`` at once, ``e = rho g / (norm + perturb_eps)``: the numbers of ``sam_fused.SAM``.

    Example:
        >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> def loss():
        ...     return (torch.tensor([0.5, 2.0]) * w * w).sum()
        >>> with perturb([w], torch.autograd.grad(loss(), [w]), rho=0.5):  # w is (3.3, 1.4) inside
        ...     sharp = torch.autograd.grad(loss(), [w])

    Every call allocates its backup, and ``restore`` frees it; ``sam_fused.SAM`` keeps its own and is faster. One that is taken
    while a SAM optimizer has the same tensors perturbed is to be restored before that one's second pass ends: each brings back
    what it found.

    Args:
        tensors: parameters or plain tensors: leaves, or without ``requires_grad``. Dtypes and devices may be mixed.
        grads: one per tensor, of its shape and on its device; a tensor with None stays where it is. Left out, they are the
            tensors' ``.grad``. Where there is none at all nothing moves, and the norm is 0.
        rho: the length of e, finite and >= 0. A number, or a 0-dim tensor on the CPU.
        adaptive: ASAM: ``e = rho w^2 g / (norm + perturb_eps)``, and the norm is that of ``|w| g``.
        perturb_eps: added to the norm.
        norm: divided by instead of the norm of all these gradients, over all devices together: a tensor of one element, fp32 or
            fp64. Where a norm is zero or not finite nothing moves.
        backend: as for ``sam_fused.SAM``.

    Raises:
        TypeError, ValueError: bad input.
        RuntimeError: a CUDA graph is being captured.

    Whatever is raised, no tensor has moved.
    """
    row = [_number(rho, "rho", "0.05"), _number(perturb_eps, "perturb_eps", "1e-12")]
    hyper = torch.tensor([row], dtype=torch.float64, device="cpu")
    backends.check_name(backend)
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive: expected True or False, got {adaptive!r}: sam_fused.SAM has the other definitions.")
    moving, directions = _with_gradients(_listed(tensors, "tensors"), grads)
    checks.refuse_shared_memory(moving)
    refuse_capture(moving, "perturb()")
    sets, picked = [], []
    for (_, name), indices in partition(moving, range(len(moving)), backend).items():
        sets.append(_prepared([moving[i] for i in indices], [directions[i] for i in indices], name, adaptive))
        picked.append(sets[-1].checked([directions[i] for i in indices]))
    if norm is not None:
        norm = _given(norm)
    elif sets:
        norm = combined_norm([members.grad_norm(chosen)[0] for members, chosen in zip(sets, picked, strict=True)])
    else:
        norm = torch.zeros((), dtype=torch.float32, device="cpu")
    moved = Moved(sets)
    try:
        perturbation = Perturbation(norm, moved)
        for members, chosen in zip(sets, picked, strict=True):
            members.perturb_(chosen, norm.to(members.params[0].device), hyper)
        moved.note_versions()
    except BaseException:
        moved.unwind()
        raise
    return perturbation


def restore(perturbation: Perturbation) -> None:
    """``perturbation.restore()``."""
    if not isinstance(perturbation, Perturbation):
        raise TypeError(
            f"perturbation: expected what perturb() returned, got {type(perturbation).__name__}: keep its result for restore()."
        )
    perturbation.restore()


# ---- arguments -------------------------------------------------------------------------------------------------------


def _number(value: object, name: str, example: str) -> float:
    of_one_element = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
    if not isinstance(value, Real) and not of_one_element:
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}: use for example {example}.")
    if isinstance(value, Tensor) and not value.is_cpu:
        raise ValueError(
            f"{name}: expected a tensor on the CPU, got one on {value.device} that would be waited for: pass a number."
        )
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}: use for example {example}.")
    return number


def _given(norm: Tensor) -> Tensor:
    checks.check_scalar(norm, "norm")
    if norm.is_cpu and norm < 0:
        raise ValueError(f"norm: expected a norm, >= 0, got {float(norm)}: pass the norm of the gradients.")
    return norm.detach().reshape(())


def _listed(tensors: Iterable[Tensor], name: str) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a list of tensors, got a single one: pass [tensor].")
    return list(tensors)


def _with_gradients(tensors: list[Tensor], grads: Iterable[Tensor | None] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Those tensors that have a gradient, and the gradients. Everything that was given is checked."""
    for index, tensor in enumerate(tensors):
        checks.check_tensor(tensor, f"tensors[{index}]")
        if tensor.requires_grad and not tensor.is_leaf:
            raise ValueError(
                f"tensors[{index}]: expected a leaf or a tensor without requires_grad, got the result of an operation: pass "
                "the tensors that it was computed from."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True)):
            raise ValueError(f"tensors[{index}]: expected memory for every element, got an expanded tensor: clone it first.")
    if len(set(map(id, tensors))) != len(tensors):
        raise ValueError(
            f"tensors: expected each tensor once, got {len(tensors) - len(set(map(id, tensors)))} more than once: drop the "
            "duplicates, for example with dict.fromkeys(tensors)."
        )
    given = [tensor.grad for tensor in tensors] if grads is None else list(_listed(grads, "grads"))  # type: ignore[arg-type]
    if len(given) != len(tensors):
        raise ValueError(f"grads: expected {len(tensors)}, one per tensor, got {len(given)}: pass None where there is none.")
    pairs = []
    for index, (tensor, grad) in enumerate(zip(tensors, given, strict=True)):
        if grad is None:
            continue
        checks.check_tensor(grad, f"grads[{index}]")
        if grad.size() != tensor.size() or grad.device != tensor.device:
            raise ValueError(
                f"grads[{index}]: expected {tuple(tensor.size())} on {tensor.device} as its tensor, got {tuple(grad.size())} "
                f"on {grad.device}: pass the gradient that belongs to this tensor."
            )
        pairs.append((tensor, grad))
    return [tensor for tensor, _ in pairs], [grad for _, grad in pairs]


def _prepared(tensors: list[Tensor], grads: list[Tensor], backend: str, adaptive: bool) -> TensorSet:
    with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
        backups = [torch.empty_like(tensor.detach()) for tensor in tensors]
    return TensorSet(
        tensors,
        backups,
        backend=backend,
        scaling=[int(adaptive)] * len(tensors),
        grad_dtypes=[grad.dtype for grad in grads],
    )
