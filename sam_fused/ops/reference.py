"""The oracle: what each operation means, tensor by tensor, in fp64, rounded once when it is stored.

Slow and readable. Every other backend is tested against it; its own tests are closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import schema
from .dtypes import arithmetic_dtype


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A scalar as the arithmetic of ``dtype`` receives it: rounded once."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(arithmetic_dtype(dtype)))


def _row(hyper: list[list[float]], groups: Sequence[int], index: int) -> list[float]:
    return hyper[groups[index] if groups else 0]


def _summed(grads: Sequence[Tensor], accumulators: Sequence[Tensor], weight: Tensor | None) -> Sequence[Tensor]:
    """``accumulator + weight g``, in the dtype of the arithmetic; the gradients themselves where nothing was accumulated."""
    if not accumulators or weight is None:
        return grads
    found = []
    for grad, accumulator in zip(grads, accumulators, strict=True):
        share = _rounded(float(weight), accumulator.dtype)
        found.append((accumulator.double() + share * grad.double()).to(arithmetic_dtype(accumulator.dtype)))
    return found


def grad_norm(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    scaling: Sequence[int] = (),
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = any(grad.dtype == torch.float64 for grad in grads)
    norms = []
    for index, grad in enumerate(_summed(grads, accumulators, weight)):
        value = grad.double()
        if inv_scale is not None:
            value = value * inv_scale.double()
        if scaling and scaling[index]:
            value = value * params[index].double()
        # Divided by its largest element first, so that no square overflows or vanishes.
        largest = value.abs().amax() if value.numel() else value.new_zeros(())
        safe = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
        norms.append(torch.linalg.vector_norm(value / safe) * safe)
    stacked = torch.stack(norms)
    largest = stacked.amax()
    safe = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    norm = (torch.linalg.vector_norm(stacked / safe) * safe).to(torch.float64 if wide else torch.float32)
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
    table = hyper.tolist()
    length = float(norm)
    inverse = 1.0 if inv_scale is None else float(inv_scale)
    for index, (param, backup, grad) in enumerate(zip(params, backups, grads, strict=True)):
        if not backup_exists:
            backup.copy_(param)
        rho, perturb_eps = _row(table, groups, index)
        denominator = length + perturb_eps
        c = _rounded(rho / denominator * inverse, param.dtype) if denominator else 0.0
        moves = length != 0 and c != 0 and torch.isfinite(torch.tensor([length, c], dtype=torch.float64, device="cpu")).all()
        if not moves:
            param.copy_(backup)
            continue
        w = backup.double()
        direction = w * (w * grad.double()) if scaling and scaling[index] else grad.double()
        param.copy_(w + c * direction)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    for param, backup in zip(params, backups, strict=True):
        param.copy_(backup)


def restore_accumulate_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    weight: Tensor,
    fresh: bool = False,
) -> None:
    restore_(params, backups)
    if fresh:
        for accumulator in accumulators:
            accumulator.zero_()
    for accumulator, total in zip(accumulators, _summed(grads, accumulators, weight), strict=True):
        accumulator.copy_(total)


def _skips(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf)


def _scaled(grad: Tensor, inv_scale: Tensor | None, clip: Tensor | None, maximize: float) -> Tensor:
    value = grad.double()
    factor = (1.0 if inv_scale is None else float(inv_scale)) * (1.0 if clip is None else float(clip))
    if inv_scale is not None or clip is not None:
        value = value * _rounded(factor, grad.dtype)
    return -value if maximize else value


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
    if _skips(found_inf):
        return restore_(params, backups)
    table = hyper.tolist()
    summed = _summed(grads, accumulators, weight)
    for index, (param, backup, grad) in enumerate(zip(params, backups, summed, strict=True)):
        lr, momentum, dampening, weight_decay, nesterov, maximize = _row(table, groups, index)
        dtype = param.dtype
        w = backup.double()
        d = _scaled(grad, inv_scale, clip, maximize)
        d = (d + _rounded(weight_decay, dtype) * w).to(arithmetic_dtype(dtype)).double()
        update = d
        if momentum:
            buffer = momentum_buffers[index]
            if first and first[index]:
                v = d
            else:
                v = _rounded(momentum, dtype) * buffer.double() + _rounded(1 - dampening, dtype) * d
            update = d + _rounded(momentum, dtype) * v if nesterov else v
            buffer.copy_(v)
        param.copy_(w - _rounded(lr, dtype) * update)


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
    if _skips(found_inf):
        return restore_(params, backups)
    table = hyper.tolist()
    summed = _summed(grads, accumulators, weight)
    for index, (param, backup, grad) in enumerate(zip(params, backups, summed, strict=True)):
        lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = _row(table, groups, index)
        steps[index].add_(1)
        step = float(steps[index])
        w = backup.double()
        g = _scaled(grad, inv_scale, clip, maximize)
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
        m = exp_avgs[index].double() + (1 - beta1) * (g - exp_avgs[index].double())
        v = beta2 * exp_avg_sqs[index].double() + (1 - beta2) * g * g
        exp_avgs[index].copy_(m)
        exp_avg_sqs[index].copy_(v)
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[index].double(), v)
            max_exp_avg_sqs[index].copy_(v)
        denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
        param.copy_(w - lr / (1 - beta1**step) * m / denominator)


KERNELS = {name: globals()[name] for name in schema.OPS}
schema.register_python_backend("reference", KERNELS)
