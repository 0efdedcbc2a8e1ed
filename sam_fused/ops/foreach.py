"""torch's multi-tensor calls: what runs on any device, without a compiler.

The lists are walked a few times instead of once. The norm and the perturbation of half-precision lists go through fp32 copies,
because factors and products overflow there; the base steps are torch's own, which round every intermediate list to storage,
so a half-precision value may differ from the native backend's by a unit in the last place. Nothing here waits for an
accelerator: on the CPU, where reading a scalar costs nothing, factors are Python numbers and the perturbation is in place;
elsewhere they stay tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, sqrt
from operator import attrgetter

import torch
from torch import Tensor

from . import schema
from .checks import is_dense, same_layout
from .dtypes import arithmetic_dtype
from .fingerprint import PLAIN_TYPES

# Between these a sum of squares in fp32 cannot have overflowed, and what vanished cannot have mattered.
_SAFE_NORM = (1e-15, 1e15)

_FUSED_DEVICES = ("cpu", "cuda", "mps")

# The types that torch computes in. Only these are given to its fused kernels: torch 2.13's fused SGD on the CPU fills a
# half-precision momentum buffer with garbage.
_WIDE = frozenset((torch.float32, torch.float64))

_dtype_of = attrgetter("dtype")


def _by_group(count: int, *keys: Sequence[int]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Indices that share the same keys; an empty key list counts as all zero."""
    if all(len(set(key)) <= 1 for key in keys):
        yield tuple(key[0] if key else 0 for key in keys), list(range(count))
        return
    found: dict[tuple[int, ...], list[int]] = {}
    for index in range(count):
        found.setdefault(tuple(key[index] if key else 0 for key in keys), []).append(index)
    yield from found.items()


def _pick(tensors: Sequence[Tensor], indices: list[int]) -> list[Tensor]:
    return list(tensors) if len(indices) == len(tensors) else [tensors[index] for index in indices]


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype they are computed in: half-precision ones are copied to fp32."""
    if _WIDE.issuperset(map(_dtype_of, tensors)):
        return list(tensors)
    return [tensor.to(arithmetic_dtype(tensor.dtype)) for tensor in tensors]


# torch's CPU norm adds in fp32 from one end of a tensor to the other: off by 2e-3 for 38 M elements, by 1e-7 for this many.
_NORM_PIECE = 65536


def _pieces(values: list[Tensor]) -> list[Tensor]:
    """The values cut up for the norm on the CPU: what is large into views of at most ``_NORM_PIECE`` elements."""
    if all(value.numel() <= _NORM_PIECE for value in values):
        return values
    cut: list[Tensor] = []
    for value in values:
        if value.numel() <= _NORM_PIECE:
            cut.append(value)
        else:
            flat = value.as_strided((value.numel(),), (1,)) if is_dense(value) else value.reshape(-1)
            cut += flat.split(_NORM_PIECE)
    return cut


def _norms_of(values: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """The root of the sum of squares of everything times ``inv_scale``, one scalar, over the dtype's whole range."""
    wide = any(value.dtype == torch.float64 for value in values)
    dtype = torch.float64 if wide else torch.float32
    # Half-precision squares overflow from 256 on and vanish below 2.4e-4.
    values = [value for value in _widened(values) if value.numel()]
    if not values:
        return torch.zeros((), dtype=dtype, device="cpu")
    if values[0].device.type == "cpu":
        pieces = _pieces(values)
        one_dtype = len(set(map(_dtype_of, pieces))) == 1
        norms = torch.stack(
            list(torch._foreach_norm(pieces)) if one_dtype else [n.double() for n in torch._foreach_norm(pieces)]
        )
        norms = norms.double()
        known = norms.tolist()
        # Zero may be a sum of squares that vanished. (Many a list holds real zeros: half of LoRA's gradients at its start.)
        vanished = [piece for piece, n in zip(pieces, known, strict=True) if n == 0]
        truly_zero = not vanished or not any(map(float, torch._foreach_norm(vanished, float("inf"))))
        if truly_zero and all(n == 0 or _SAFE_NORM[0] < n < _SAFE_NORM[1] for n in known):
            norm = torch.linalg.vector_norm(norms)
            return (norm if inv_scale is None else norm * inv_scale).to(dtype)
    # Divided by the largest element, in a copy: right over the whole range, without fp64, which not every device has.
    largest = torch.stack([n.to(dtype) for n in torch._foreach_norm(values, float("inf"))]).amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    shrunk = [value / scale.to(value.dtype) for value in values]
    shrunk = _pieces(shrunk) if shrunk[0].device.type == "cpu" else shrunk
    norms = torch.stack([n.to(dtype) for n in torch._foreach_norm(shrunk)])
    if inv_scale is not None:  # before the norm reaches its full size: unscaled it may be in range, scaled not
        scale = scale * inv_scale.to(dtype)
    norm = torch.linalg.vector_norm(norms) * scale
    return torch.where(largest.isfinite(), norm, largest)


def _weighted(grads: list[Tensor], weight: Tensor) -> list[Tensor]:
    """``weight g`` in copies; halves become fp32."""
    return list(torch._foreach_mul(_widened(grads), weight))


def _summed(grads: Sequence[Tensor], accumulators: Sequence[Tensor], weight: Tensor | None) -> list[Tensor]:
    """``accumulator + weight g`` in copies; the gradients themselves where nothing was accumulated."""
    if not accumulators or weight is None:
        return list(grads)
    if weight.device.type == "cpu":
        return list(torch._foreach_add(list(accumulators), _widened(grads), alpha=float(weight)))
    return list(torch._foreach_add(list(accumulators), _weighted(list(grads), weight)))


def grad_norm(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    scaling: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values: list[Tensor] = []
    summed = _summed(grads, accumulators, weight)
    for (scaled,), indices in _by_group(len(grads), scaling):
        chosen = _pick(summed, indices)
        if scaled:
            wide = _widened(chosen)
            chosen = list(torch._foreach_mul(wide, [w.to(g.dtype) for w, g in zip(_pick(params, indices), wide, strict=True)]))
        values += chosen
    norm = _norms_of(values, inv_scale).to(grads[0].device)
    return norm, (~norm.isfinite()).float()


def perturb_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    norm: Tensor,
    hyper: Tensor,
    groups: Sequence[int] = (),
    scaling: Sequence[int] = (),
    backup_exists: bool = False,
    inv_scale: Tensor | None = None,
) -> None:
    if not backup_exists:
        torch._foreach_copy_(list(backups), list(params))
    table = hyper.tolist()
    on_cpu = params[0].device.type == "cpu"
    for (group, scaled), indices in _by_group(len(params), groups, scaling):
        rho, perturb_eps = table[group]
        stored = _pick(params, indices)
        # Where nothing had to be widened these are the parameters themselves, updated in place.
        moved, directions = _widened(stored), _widened(_pick(grads, indices))
        if scaled:
            clean = _pick(backups, indices)
            directions = list(torch._foreach_mul(directions, clean))
            torch._foreach_mul_(directions, clean)
        if on_cpu:
            length = float(norm)
            c = rho / (length + perturb_eps) if length + perturb_eps else 0.0
            c *= 1.0 if inv_scale is None else float(inv_scale)
            if not (length and isfinite(length) and isfinite(c) and c):
                continue
            torch._foreach_add_(moved, directions, alpha=c)
        else:
            ratio = rho / (norm + perturb_eps)
            if inv_scale is not None:
                ratio = ratio * inv_scale
            sound = norm.isfinite() & (norm != 0) & ratio.isfinite() & (ratio != 0)
            # where() and not a product with zero: 0 * inf is NaN.
            steps = [torch.where(sound, direction * ratio.to(direction.dtype), 0) for direction in directions]
            torch._foreach_add_(moved, steps)
        rounded = [(param, wide) for param, wide in zip(stored, moved, strict=True) if wide is not param]
        if rounded:
            torch._foreach_copy_([param for param, _ in rounded], [wide for _, wide in rounded])


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    moved = [(param, backup) for param, backup in zip(params, backups, strict=True) if param is not backup]
    if moved:
        torch._foreach_copy_([param for param, _ in moved], [backup for _, backup in moved])


def restore_accumulate_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    weight: Tensor,
    fresh: bool = False,
) -> None:
    restore_(params, backups)
    on_cpu = weight.device.type == "cpu"
    if fresh:
        # Copied and then scaled in place: no list of products is allocated.
        torch._foreach_copy_(list(accumulators), list(grads))
        torch._foreach_mul_(list(accumulators), float(weight) if on_cpu else weight)
    elif on_cpu:
        torch._foreach_add_(list(accumulators), _widened(grads), alpha=float(weight))
    else:
        torch._foreach_add_(list(accumulators), _weighted(list(grads), weight))


def _directions(
    params: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    weight: Tensor | None,
    inv_scale: Tensor | None,
    clip: Tensor | None,
) -> list[Tensor]:
    """The base step's gradients. Sums are in the arithmetic's dtype, and torch's base steps want the parameters'."""
    directions = _scaled(_summed(grads, accumulators, weight), inv_scale, clip)
    return [d.to(p.dtype) for d, p in zip(directions, params, strict=True)]


def _scaled(grads: list[Tensor], inv_scale: Tensor | None, clip: Tensor | None) -> list[Tensor]:
    """The gradients times their factors, in a copy: gradients are never written into."""
    if inv_scale is None and clip is None:
        return grads
    wide = grads[0].device.type == "cpu" or any(grad.dtype == torch.float64 for grad in grads)
    factor = torch.ones((), dtype=torch.float64 if wide else torch.float32, device=grads[0].device)
    for scale in (inv_scale, clip):
        if scale is not None:
            factor = factor * scale.to(factor)
    # In the arithmetic's dtype and rounded once: a half factor would round before it is used.
    return [(grad.to(arithmetic_dtype(grad.dtype)) * factor.to(arithmetic_dtype(grad.dtype))).to(grad.dtype) for grad in grads]


def _fusible(*lists: list[Tensor]) -> bool:
    """Whether torch's own fused kernel may take these lists: one dtype and matching dense layouts."""
    params = lists[0]
    if params[0].device.type not in _FUSED_DEVICES or params[0].dtype not in _WIDE:
        return False
    # A pass in C for each property and list: this is asked in every step.
    if not all(set(map(_dtype_of, entries)) == {params[0].dtype} for entries in lists):
        return False
    if not all(PLAIN_TYPES.issuperset(map(type, entries)) for entries in lists):
        return False
    if all(all(map(Tensor.is_contiguous, entries)) for entries in lists):
        return True
    return all(all(map(same_layout, params, entries)) for entries in lists)


def _saved_if_skippable(found_inf: Tensor | None, lists: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """Copies of everything a step writes: without reading ``found_inf`` on the host, a step can only be undone."""
    return None if found_inf is None else [t.clone() for entries in lists for t in entries]


def _undo_where(found_inf: Tensor | None, saved: list[Tensor] | None, lists: Sequence[Sequence[Tensor]]) -> None:
    if saved is None or found_inf is None:
        return
    flat = [t for entries in lists for t in entries]
    for current, before in zip(flat, saved, strict=True):
        current.copy_(torch.where(found_inf.to(current.device) != 0, before, current))


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int] = (),
    first: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    restore_(params, backups)
    saved = _saved_if_skippable(found_inf, (params, momentum_buffers))
    table = hyper.tolist()
    for (group, is_first), indices in _by_group(len(params), groups, first):
        lr, momentum, dampening, weight_decay, nesterov, maximize = table[group]
        chosen = _pick(params, indices)
        summands = _pick(grads, indices), _pick(accumulators, indices) if accumulators else []
        directions = _directions(chosen, *summands, weight, inv_scale, clip)
        buffers = _pick(momentum_buffers, indices) if momentum else []
        if _fusible(chosen, directions, *([buffers] if buffers else [])):
            torch._fused_sgd_(
                chosen,
                directions,
                buffers,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=bool(nesterov),
                maximize=bool(maximize),
                is_first_step=bool(is_first),
            )
            continue
        if maximize:
            directions = list(torch._foreach_neg(directions))
        if weight_decay:
            directions = list(torch._foreach_add(directions, chosen, alpha=weight_decay))
        if momentum:
            if is_first:
                torch._foreach_copy_(buffers, directions)
            else:
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, directions, alpha=1 - dampening)
            directions = list(torch._foreach_add(directions, buffers, alpha=momentum)) if nesterov else buffers
        torch._foreach_add_(chosen, directions, alpha=-lr)
    _undo_where(found_inf, saved, (params, momentum_buffers))


def restore_adamw_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    restore_(params, backups)
    state = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    saved = _saved_if_skippable(found_inf, state)
    table = hyper.tolist()
    for (group,), indices in _by_group(len(params), groups):
        lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = table[group]
        chosen = _pick(params, indices)
        summands = _pick(grads, indices), _pick(accumulators, indices) if accumulators else []
        directions = _directions(chosen, *summands, weight, inv_scale, clip)
        m, v, counts = _pick(exp_avgs, indices), _pick(exp_avg_sqs, indices), _pick(steps, indices)
        largest = _pick(max_exp_avg_sqs, indices) if amsgrad else []
        torch._foreach_add_(counts, 1)
        if _fusible(chosen, directions, m, v, *([largest] if largest else [])):
            fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
            fused(
                chosen,
                directions,
                m,
                v,
                largest,
                counts,
                amsgrad=bool(amsgrad),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                maximize=bool(maximize),
            )
            continue
        if maximize:
            directions = list(torch._foreach_neg(directions))
        if weight_decay and decoupled:
            torch._foreach_mul_(chosen, 1 - lr * weight_decay)
        elif weight_decay:
            directions = list(torch._foreach_add(directions, chosen, alpha=weight_decay))
        torch._foreach_lerp_(m, directions, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, directions, directions, 1 - beta2)
        second = v
        if amsgrad:
            torch._foreach_maximum_(largest, v)
            second = largest
        taken = [float(count) for count in counts]  # the fallback of the fallback: this waits for an accelerator
        denominators = list(torch._foreach_sqrt(second))
        torch._foreach_div_(denominators, [sqrt(1 - beta2**t) for t in taken])
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(chosen, m, denominators, [-lr / (1 - beta1**t) for t in taken])
    _undo_where(found_inf, saved, state)


KERNELS = {name: globals()[name] for name in schema.OPS}
schema.register_python_backend("foreach", KERNELS)
