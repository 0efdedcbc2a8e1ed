"""Bad input becomes one sentence, raised in Python before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .dtypes import SUPPORTED, SUPPORTED_NAMES, arithmetic_dtype
from .fingerprint import PLAIN_TYPES


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each place once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.size(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether both are dense and element i of one block of memory is element i of the other's.

    The stride of a dimension of size 1 means nothing and is ignored.
    """
    if first.size() != second.size():
        return False
    if first.is_contiguous() and second.is_contiguous():
        return True
    differ = any(a != b for a, b, n in zip(first.stride(), second.stride(), first.size(), strict=True) if n != 1)
    return not differ and is_dense(first)


def check_tensor(tensor: object, name: str) -> None:
    """Refuses what the kernels cannot read: anything but a dense-layout tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}: pass the parameter's tensor.")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a strided tensor, got layout {tensor.layout}: use a dense gradient "
            "(for example nn.Embedding(sparse=False)) or give this parameter to an optimizer of its own."
        )
    if tensor.is_quantized or tensor.dtype not in SUPPORTED:
        raise TypeError(
            f"{name}: expected {SUPPORTED_NAMES}, got {tensor.dtype}: convert it, or keep this parameter out of the optimizer."
        )


# Lists whose entry may be an empty tensor where that parameter's group has no use for one.
_MAY_HAVE_EMPTY_ENTRIES = ("momentum_buffers", "max_exp_avg_sqs")


def check_lists(reference: Sequence[Tensor], called: str = "params", /, **others: Sequence[Tensor]) -> None:
    """Every list as long as ``reference``, every tensor on its device and as large as its parameter, backups of its dtype."""
    for index, tensor in enumerate(reference):
        check_tensor(tensor, f"{called}[{index}]")
        if tensor.device != reference[0].device:
            raise ValueError(
                f"{called}[{index}]: expected device {reference[0].device} as {called}[0], got {tensor.device}: "
                "make one call per device."
            )
    for name, tensors in others.items():
        if len(tensors) != len(reference):
            raise ValueError(
                f"{name}: expected {len(reference)} tensors as there are params, got {len(tensors)}: pass one for each."
            )
        for index, (tensor, param) in enumerate(zip(tensors, reference, strict=True)):
            check_tensor(tensor, f"{name}[{index}]")
            if tensor.device != param.device:
                raise ValueError(
                    f"{name}[{index}]: expected device {param.device} as its parameter, got {tensor.device}: "
                    "move it to the parameter's device."
                )
            unused = name in _MAY_HAVE_EMPTY_ENTRIES and tensor.numel() == 0
            if tensor.size() != param.size() and not unused:
                raise ValueError(
                    f"{name}[{index}]: expected shape {tuple(param.size())} as its parameter, "
                    f"got {tuple(tensor.size())}: pass the tensor that belongs to this parameter."
                )
            if name == "backups" and tensor.dtype != param.dtype:
                raise TypeError(
                    f"{name}[{index}]: expected {param.dtype} as its parameter, got {tensor.dtype}: a backup is a copy "
                    "of the bits, make it with torch.empty_like(param)."
                )
            if name == "accumulators" and tensor.dtype != arithmetic_dtype(param.dtype):
                raise TypeError(
                    f"{name}[{index}]: expected {arithmetic_dtype(param.dtype)}, what {param.dtype} is computed in, got "
                    f"{tensor.dtype}: sums of many micro-batches need it, make it with torch.empty_like(param, dtype=...)."
                )


def check_hyper(hyper: Tensor, columns: tuple[str, ...], groups: Sequence[int], params: Sequence[Tensor]) -> None:
    """A contiguous float64 table with these columns, where it can be read, and for each tensor a row that exists."""
    count = len(params)
    if not isinstance(hyper, Tensor):
        raise TypeError(
            f"hyper: expected a float64 tensor [groups, {len(columns)}], got {type(hyper).__name__}: "
            "build it with torch.tensor([[...]], dtype=torch.float64)."
        )
    if hyper.dtype != torch.float64 or hyper.dim() != 2 or hyper.size(1) != len(columns) or not hyper.is_contiguous():
        raise ValueError(
            f"hyper: expected a contiguous float64 table [groups, {len(columns)}] of {', '.join(columns)}, "
            f"got {hyper.dtype} {tuple(hyper.size())}: build it with torch.tensor([[...]], dtype=torch.float64)."
        )
    if params and hyper.device.type != "cpu" and hyper.device != params[0].device:
        raise ValueError(
            f"hyper: expected a table on the CPU or on {params[0].device} as the parameters, got {hyper.device}: move it there."
        )
    if groups and (len(groups) != count or min(groups) < 0 or max(groups) >= hyper.size(0)):
        raise ValueError(
            f"groups: expected {count} row numbers below {hyper.size(0)}, got {list(groups)[:8]}: "
            "give each tensor its parameter group's row."
        )
    if not groups and count and hyper.size(0) < 1:
        raise ValueError("hyper: expected at least one row, got none: pass one row per parameter group.")


def check_state(
    states: Sequence[Tensor], name: str, params: Sequence[Tensor], hyper: Tensor, column: int, groups: Sequence[int]
) -> None:
    """Base-optimizer state for every parameter whose group has a non-zero hyper-parameter in ``column``."""
    if hyper.device.type != "cpu" or torch.compiler.is_compiling():  # waiting for a device, or guessing, is not worth it
        return
    wanted = [row[column] != 0 for row in hyper.tolist()]
    for index, param in enumerate(params):
        if not wanted[groups[index] if groups else 0]:
            continue
        if not states:
            raise ValueError(f"{name}: expected one per parameter because a group uses it, got none: pass them.")
        if states[index].numel() != param.numel():
            raise ValueError(
                f"{name}[{index}]: expected shape {tuple(param.size())} because its group uses it, "
                f"got {tuple(states[index].size())}: pass a tensor like the parameter."
            )


def check_ints(values: Sequence[int], name: str, count: int, allowed: tuple[int, ...]) -> None:
    if values and (len(values) != count or any(value not in allowed for value in values)):
        raise ValueError(
            f"{name}: expected {count} numbers out of {allowed}, or none, got {list(values)[:8]}: pass one per tensor."
        )


def check_scalar(scalar: Tensor | None, name: str, device: torch.device | None = None) -> None:
    """A float32 or float64 tensor of one element, on ``device`` if that is given; None is fine."""
    if scalar is None:
        return
    if not isinstance(scalar, Tensor) or scalar.numel() != 1 or scalar.dtype not in (torch.float32, torch.float64):
        got = f"{scalar.dtype} {tuple(scalar.size())}" if isinstance(scalar, Tensor) else type(scalar).__name__
        raise TypeError(f"{name}: expected a float32 or float64 tensor of one element, got {got}: use torch.tensor(value).")
    if device is not None and scalar.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device} as the parameters, got {scalar.device}: move it there, so that no "
            "operation has to wait for another device."
        )


def check_accumulators(accumulators: Sequence[Tensor], weight: Tensor | None, count: int) -> None:
    """What was accumulated for ``count`` tensors and the weight of what is added to it: both or neither."""
    if bool(len(accumulators)) != (weight is not None) and (count or len(accumulators)):
        got = "accumulators alone" if weight is None else "a weight alone"
        raise ValueError(
            f"accumulators, weight: expected both or neither, got {got}: pass the weight of this micro-batch, |S_k|/|B|, and "
            "what the others add up to."
        )


def refuse_shared_memory(params: Sequence[Tensor]) -> None:
    """Memory under two parameters would be perturbed twice, and the second backup would be of perturbed weights."""
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), index)
        for index, p in enumerate(params)
        if type(p) in PLAIN_TYPES and p.numel() and is_dense(p)
    )
    for (device, _, end, first), (other_device, start, _, second) in pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"params: expected parameters with memory of their own, got shapes {tuple(params[first].shape)} and "
                f"{tuple(params[second].shape)} over the same: tie weights by using one Parameter twice."
            )
