"""The operations as functions: arguments checked, backend chosen, mutation made visible to autograd.

``hyper`` tables are float64 ``[groups, columns]``; their columns, the operands that repeat and the schemas are described in
``sam_fused.ops.schema``. Lists may be empty; tensors may be empty, 0-dimensional, unaligned or non-contiguous, and of mixed
dtypes (float32, float64, bfloat16, float16).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backends, checks, fitting, foreach, reference, schema, triton
from .dtypes import arithmetic_dtype

# Backends that take tensors as they are. The others' kernels read blocks of memory, which have to fit.
_PYTHON = {"reference": reference.KERNELS, "foreach": foreach.KERNELS}
schema.register_python_backend("triton", triton.KERNELS)


def _chosen(device: str, backend: str | None) -> str:
    """``backends.choose``, which loads libraries and warns, out of a compiler's sight."""
    return backends.choose(torch.device(device), backend)


# All that torch.compiler.assume_constant_result does; but that imports the whole compiler, two seconds for everybody.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(
    op: str, backend: str | None, lists: dict[str, Sequence[Tensor]], reference_list: str, arguments: dict[str, Any]
) -> Any:
    """One of the operations below, over lists that were checked. ``reference_list`` is the one that decides the layout."""
    device = lists[reference_list][0].device
    compiling = torch.compiler.is_compiling()
    name = _chosen(str(device), backend) if compiling else backends.choose(device, backend)
    with torch.no_grad():
        if name not in _PYTHON:
            result = fitting.call(op, name, lists, reference_list, arguments)
        elif compiling:
            # Opaque to the compiler: its in-place lists are functionalised from the schema.
            full = schema.OPS[op].complete({**{k: list(v) for k, v in lists.items()}, **arguments})
            return schema.overload(op, name)(**full)
        else:
            result = _PYTHON[name][op](**lists, **arguments)
    if compiling:
        return result
    # A mutable schema alone does not do this: without it autograd would use overwritten values in silence.
    touched = [tensor for name in schema.OPS[op].mutates for tensor in lists[name]]
    if touched:
        increment_version(touched)
    return result


def grad_norm(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    scaling: Sequence[int] = (),
    *,
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, ``sqrt(sum_i ||T_i g_i||^2)``, and whether it is not finite.

    Reads g (and w where T = ``|w|``), writes nothing: 1 access per element. ``params`` may be empty if nothing is scaled. With
    accumulators g is ``accumulator + weight g``: 2 accesses.

    Returns:
        The norm, 0-dim fp32 (fp64 if any gradient is fp64), and a 0-dim fp32 flag: 1.0 if the norm is inf or NaN, else 0.0.
    """
    summed = _summed(accumulators, weight, grads)
    checks.check_lists(grads, "grads", **({"params": params} if len(params) or any(scaling) else {}), **summed)
    checks.check_ints(scaling, "scaling", len(grads), (0, 1))
    scalars = _scalars(grads, weight=weight, inv_scale=inv_scale)
    if not grads:
        backends.check_name(backend)
        nothing = torch.zeros((), dtype=torch.float32, device="cpu")
        return nothing, nothing.clone()
    lists = {"grads": grads, **({"params": params} if any(scaling) else {}), **summed}
    if any(scaling):
        # The weights' arrangement in memory is the one to fit: they are the larger and the longer-lived.
        scaled: tuple[Tensor, Tensor] = run("grad_norm", backend, lists, "params", {"scaling": list(scaling), **scalars})
        return scaled
    plain: tuple[Tensor, Tensor] = run("grad_norm", backend, lists, "grads", scalars)
    return plain


def perturb_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    norm: Tensor,
    hyper: Tensor,
    groups: Sequence[int] = (),
    scaling: Sequence[int] = (),
    *,
    backup_exists: bool = False,
    inv_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """``backup = w; w = w + rho / (norm + perturb_eps) T^2 g`` [2010.01412, equation 2; T: 2102.11600, equation 6].

    Reads w and g, writes w and backup: 4 accesses per element. With ``backup_exists`` the backups hold the weights already, bit
    for bit; they are not written, and either is read: 3. Where the norm is zero or not finite nothing moves; the backup is
    written all the same.

    Args:
        hyper: columns ``rho``, ``perturb_eps``.
    """
    checks.check_lists(params, backups=backups, grads=grads)
    checks.check_hyper(hyper, schema.PERTURB_COLUMNS, groups, params)
    checks.check_ints(scaling, "scaling", len(params), (0, 1))
    norm, inv_scale = _scalar(norm, "norm", params), _scalar(inv_scale, "inv_scale", params)
    if not params:
        backends.check_name(backend)
        return
    run(
        "perturb_",
        backend,
        {"params": params, "backups": backups, "grads": grads},
        "params",
        {
            "norm": norm,
            "hyper": hyper,
            "groups": list(groups),
            "scaling": list(scaling),
            "backup_exists": backup_exists,
            "inv_scale": inv_scale,
        },
    )


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor], *, backend: str | None = None) -> None:
    """``w = backup``, bit for bit, in place. Reads backup, writes w: 2 accesses per element."""
    checks.check_lists(params, backups=backups)
    if not params:
        backends.check_name(backend)
        return
    run("restore_", backend, {"params": params, "backups": backups}, "params", {})


def restore_accumulate_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    weight: Tensor,
    *,
    fresh: bool = False,
    backend: str | None = None,
) -> None:
    """``w = backup; accumulator = accumulator + weight g``: the end of a micro-batch [mSAM: 2302.09693].

    Reads backup, g and accumulator, writes w and accumulator: 5 accesses per element. With ``fresh`` the accumulator is
    written, ``weight g``, and not read: 4. ``backups[i]`` may be ``params[i]``: then nothing is restored.

    Args:
        accumulators: one per parameter, in the dtype of the arithmetic (fp32, fp64 for fp64): halves would lose what many
            micro-batches add up to.
        weight: scalar tensor, the micro-batch's share of the batch, ``|S_k| / |B|``.
    """
    checks.check_accumulators(accumulators, weight, len(params))
    checks.check_lists(params, backups=backups, grads=grads, accumulators=accumulators)
    weight = _scalar(weight, "weight", params)
    if not params:
        backends.check_name(backend)
        return
    lists = {"params": params, "backups": backups, "grads": grads, "accumulators": accumulators}
    run("restore_accumulate_", backend, lists, "params", {"weight": weight, "fresh": fresh})


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int] = (),
    first: Sequence[int] = (),
    *,
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """SGD's step from the backup: the restore is free because the step reads the backup instead of the weight.

    ``d = g + wd w; v = momentum v + (1 - dampening) d`` (``v = d`` where ``first``); ``w = backup - lr (d + momentum v)`` with
    Nesterov, else ``backup - lr v``; `torch.optim.SGD`'s rule and order. Reads backup, g, v, writes w, v: 5 accesses
    per element (3 without momentum). ``backups[i]`` may be ``params[i]``: then it is the plain base step.

    Args:
        momentum_buffers: one per parameter, or empty if no group has momentum.
        hyper: columns ``lr``, ``momentum``, ``dampening``, ``weight_decay``, ``nesterov``, ``maximize``.
        first: 1 where the buffer is created in this step, as torch ignores dampening then; empty means 0.
    """
    summed = _summed(accumulators, weight, params)
    with_momentum = {"momentum_buffers": momentum_buffers}
    checks.check_lists(params, backups=backups, grads=grads, **(with_momentum if len(momentum_buffers) else {}), **summed)
    checks.check_hyper(hyper, schema.SGD_COLUMNS, groups, params)
    checks.check_ints(first, "first", len(params), (0, 1))
    scalars = _scalars(params, weight=weight, inv_scale=inv_scale, found_inf=found_inf, clip=clip)
    if not params:
        backends.check_name(backend)
        return
    momentum = schema.SGD_COLUMNS.index("momentum")
    checks.check_state(momentum_buffers, "momentum_buffers", params, hyper, momentum, groups)
    run(
        "restore_sgd_",
        backend,
        {"params": params, "backups": backups, "grads": grads, **with_momentum, **summed},
        "params",
        {"hyper": hyper, "groups": list(groups), "first": list(first), **scalars},
    )


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
    *,
    accumulators: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adam's [1412.6980] or AdamW's [1711.05101] step from the backup, `torch.optim.Adam`'s rule and order.

    ``m = m + (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2;
    w = backup' - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`` with ``backup' = (1 - lr wd) backup`` if
    ``decoupled`` (AdamW), else ``g = g + wd backup`` first (Adam); with ``amsgrad`` the largest v so far is used. Reads
    backup, g, m, v, writes w, m, v: 7 accesses per element (9 with amsgrad).

    Args:
        max_exp_avg_sqs: one per parameter, or empty if no group has amsgrad.
        steps: the number of steps taken, one scalar tensor per parameter, float32 or float64; incremented by this call.
        hyper: columns ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``, ``decoupled``, ``amsgrad``, ``maximize``.
    """
    summed = _summed(accumulators, weight, params)
    with_max = {"max_exp_avg_sqs": max_exp_avg_sqs}
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    checks.check_lists(params, backups=backups, grads=grads, **moments, **(with_max if len(max_exp_avg_sqs) else {}), **summed)
    checks.check_hyper(hyper, schema.ADAM_COLUMNS, groups, params)
    scalars = _scalars(params, weight=weight, inv_scale=inv_scale, found_inf=found_inf, clip=clip)
    if len(steps) != len(params):
        raise ValueError(
            f"steps: expected {len(params)} scalar tensors as there are params, got {len(steps)}: pass one for each."
        )
    for index, step in enumerate(steps):
        checks.check_scalar(step, f"steps[{index}]")
    if not params:
        backends.check_name(backend)
        return
    amsgrad = schema.ADAM_COLUMNS.index("amsgrad")
    checks.check_state(max_exp_avg_sqs, "max_exp_avg_sqs", params, hyper, amsgrad, groups)
    run(
        "restore_adamw_",
        backend,
        {"params": params, "backups": backups, "grads": grads, **moments, **with_max, "steps": steps, **summed},
        "params",
        {"hyper": hyper, "groups": list(groups), **scalars},
    )


def _summed(accumulators: Sequence[Tensor], weight: Tensor | None, tensors: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """The accumulators as one of the lists to check and to pass on; nothing where there are none."""
    checks.check_accumulators(accumulators, weight, len(tensors))
    return {"accumulators": accumulators} if len(accumulators) else {}


def _scalar(scalar: Any, name: str, tensors: Sequence[Tensor]) -> Any:
    """The checked scalar as a 0-dim tensor: one of shape [1] would broadcast its shape into results."""
    checks.check_scalar(scalar, name, tensors[0].device if tensors else None)
    return scalar if scalar is None or scalar.dim() == 0 else scalar.reshape(())


def _scalars(tensors: Sequence[Tensor], **scalars: Tensor | None) -> dict[str, Tensor | None]:
    return {name: _scalar(scalar, name, tensors) for name, scalar in scalars.items()}


def inverse_scale(scale: Tensor) -> Tensor:
    """A loss scale as the operand ``inv_scale``: 0-dim fp32, on its device."""
    return scale.float().reciprocal().reshape(())


def clip_factor(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_` has it, on the norm's device."""
    limit = max_norm.detach().to(norm).reshape(()) if isinstance(max_norm, Tensor) else max_norm
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def scaled(grads: Sequence[Tensor], dtypes: Sequence[torch.dtype], factor: Tensor | None) -> list[Tensor]:
    """``factor g`` in copies of these dtypes, computed as the dtype of the arithmetic is, for who reads gradients itself."""
    copies = [grad.detach().to(arithmetic_dtype(grad.dtype), copy=True) for grad in grads]
    if factor is not None:
        for copy in copies:
            copy.mul_(factor.to(copy.device))
    return [copy.to(dtype) for copy, dtype in zip(copies, dtypes, strict=True)]


def not_all_zero(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the tensors that hold something else than zeros. Waits for each device once."""
    answers: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        answers.setdefault(tensor.device, []).append(tensor.detach().any())
    holding = {device: iter(torch.stack(found).tolist()) for device, found in answers.items()}
    return [tensor for tensor in tensors if next(holding[tensor.device])]


def count_not_finite_(norm: Tensor, count: Tensor) -> None:
    """``count``, an int64 scalar on the norm's device, becomes one more where the norm is inf or NaN."""
    count.add_(~norm.isfinite())


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i weights_i values_i`` of scalars whose weights sum to 1: 0-dim, on the first one's device and in its dtype (of
    whole numbers fp32), added up in the dtype of the arithmetic. Of a single one it is that one. Nothing waits for it."""
    device = values[0].device
    dtype = values[0].dtype if values[0].dtype.is_floating_point else torch.float32
    if len(values) == 1:
        return values[0].detach().reshape(())
    if all(value.is_cpu for value in values):
        # In Python: a handful of calls of torch on scalars would cost as much as a small model's perturbation.
        total = sum(value.item() * weight for value, weight in zip(values, weights, strict=True))
        return torch.tensor(total, dtype=dtype, device="cpu")
    here = [value.detach() if value.device == device else value.detach().to(device) for value in values]
    scalars = torch.stack([value if value.dim() == 0 else value.reshape(()) for value in here])
    wide = scalars.to(arithmetic_dtype(dtype))
    # Equal weights at once: a tensor of weights would have to be brought to the device.
    terms, begin = [], 0
    for weight, run in groupby(weights):
        end = begin + len(list(run))
        terms.append(wide[begin:end].sum() * weight)
        begin = end
    return (terms[0] if len(terms) == 1 else torch.stack(terms).sum()).to(dtype)


def unrounded_(rounded: Tensor, exact: Tensor) -> Tensor:
    """``exact``, overwritten by ``rounded``, a half type, wherever that is something else than its rounding.

    Compared bit by bit: neither a scaler's kernels, nor collectives, nor writing through ``.data`` leave a trace in version
    counters.
    """
    here, fresh = rounded.view(torch.int16), exact.to(rounded.dtype).view(torch.int16)
    if exact.is_cpu and torch.equal(here, fresh):  # nothing was written, as nearly always; asking a device would wait for it
        return exact
    return torch.where(here == fresh, exact, rounded.to(exact.dtype), out=exact)


def combined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of several devices' norms together, on the first one's device: ``sqrt(sum n_i^2)`` without overflow."""
    if len(norms) == 1:
        return norms[0]
    wide = any(norm.dtype == torch.float64 for norm in norms)
    here = torch.stack([norm.to(norms[0].device, torch.float64 if wide else torch.float32) for norm in norms])
    largest = here.amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(here / scale) * scale
