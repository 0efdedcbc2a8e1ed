"""Memory of micro-batch SAM: what the optimizer holds whatever K is, and whether sums in `.grad` would need less.

The second is a question to a prototype, `summing_in_grad`: it keeps the sums where autograd adds to them by itself, so that it
has no accumulators and the second pass no gradients of its own. But the sums and the first pass's gradients exist at once, in
that form as in ours, and that is where a step's peak is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.baselines import ascent_scale, gradient, make_base
from benchmarks.cases import ParameterSet
from benchmarks.endtoend import Step, timed
from benchmarks.measure import Gradients
from benchmarks.memory import peak_bytes
from benchmarks.micro_batch_endtoend import by_closure, pieces
from benchmarks.micro_batch_variants import GRADIENT_SETS, headline, ours
from benchmarks.nets import NETS, Task
from benchmarks.suite import extra_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOW_MEMORY_MICRO_BATCHES = 4


@dataclass(frozen=True)
class MemoryRow:
    """Peak of two steps above parameters, gradients and the base optimizer's state."""

    set: str
    dtype: str
    variant: str
    title: str
    parameters: int
    micro_batches: int
    extra_bytes: int
    bytes_per_parameter: float


def measure_memory(parameter_set: ParameterSet, base: str, counts: list[int], seed: int) -> list[MemoryRow]:
    """Ours in both call forms, with every number of micro-batches and dtype."""
    rows = []
    for name, dtype in DTYPES.items():
        gradients = Gradients.make(parameter_set.shapes(), seed, GRADIENT_SETS, dtype)
        for count in counts:
            closure = headline(count)
            for variant in (closure, ours(closure.backend, "micro_batch", count)):
                size = extra_bytes(variant.forms[0], parameter_set, base, gradients, seed)
                fixed = parameter_set.name, name, variant.name, variant.title, parameter_set.parameters
                rows.append(MemoryRow(*fixed, count, size, size / parameter_set.parameters))
    return rows


@dataclass(frozen=True)
class LowMemoryRow:
    """Peak of whole training steps above the parameters: activations, gradients, the base's state, backup and sums."""

    net: str
    dtype: str
    micro_batches: int
    parameter_bytes: int
    accumulators_peak_bytes: int
    sums_in_grad_peak_bytes: int


def summing_in_grad(task: Task, micro_batches: int) -> Step:
    """Micro-batch SAM without accumulators: autograd adds each second pass's gradients, of a weighted loss, to the sums.

    The sums have the parameters' dtype, for the only place that autograd adds to is `.grad`.
    """
    params: list[Tensor] = list(task.model.parameters())
    optimizer = make_base(params, "sgd", fused=True)
    backup = [torch.empty_like(p.data) for p in params]

    def perturb(first: bool) -> None:
        with torch.no_grad():
            grads = [gradient(p) for p in params]
            alpha = ascent_scale(grads)
            if first:
                torch._foreach_copy_(backup, params)
            torch._foreach_add_(params, grads, alpha=alpha)

    def step() -> None:
        sums: list[Tensor | None] = [None] * len(params)
        for number, piece in enumerate(pieces(task, micro_batches)):
            task.loss(task.model, *piece).backward()
            perturb(number == 0)
            for p, total in zip(params, sums, strict=True):
                p.grad = total
            (task.loss(task.model, *piece) / micro_batches).backward()
            with torch.no_grad():
                torch._foreach_copy_(params, backup)
            sums = [p.grad for p in params]
            if number < micro_batches - 1:
                optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)


def wide_mlp(dtype: torch.dtype) -> Task:
    """Parameters far larger than activations: the case in which gradients decide the peak."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, 10)).to(dtype)
    batch = torch.randn(32, 512, dtype=dtype), torch.randint(0, 10, (32,))
    return Task(model, batch, lambda model, x, y: nn.functional.cross_entropy(model(x), y))


LOW_MEMORY_CASES: dict[str, tuple[str, Callable[[], Task]]] = {
    "wide_mlp": ("fp32", lambda: wide_mlp(torch.float32)),
    "wide_mlp_bf16": ("bf16", lambda: wide_mlp(torch.bfloat16)),
    "resnet20": ("fp32", NETS["resnet20"].make),
}


def measure_low_memory(seed: int, names: list[str] | None = None) -> list[LowMemoryRow]:
    """Both forms on nets whose peak is the gradients' (wide_mlp) and the activations' (resnet20)."""
    rows = []
    for name in names or list(LOW_MEMORY_CASES):
        dtype, make = LOW_MEMORY_CASES[name]
        peaks = []
        parameter_bytes = 0
        for form in (by_closure, summing_in_grad):
            torch.manual_seed(seed)
            task = make()
            parameter_bytes = sum(p.numel() * p.element_size() for p in task.model.parameters())
            peaks.append(peak_bytes(lambda form=form, task=task: _two_steps(form, task)))  # type: ignore[misc]
        rows.append(LowMemoryRow(name.removesuffix("_bf16"), dtype, LOW_MEMORY_MICRO_BATCHES, parameter_bytes, *peaks))
    return rows


def _two_steps(form: Callable[[Task, int], Step], task: Task) -> object:
    step = form(task, LOW_MEMORY_MICRO_BATCHES)
    step()
    step()
    return step


def print_memory(console: Console, rows: list[MemoryRow], low: list[LowMemoryRow]) -> None:
    """Bytes per parameter with each K, and the prototype's peaks."""
    if rows:
        table = Table(title="peak extra memory of ours, bytes per parameter", title_justify="left")
        for column in ("set", "dtype", "form"):
            table.add_column(column)
        counts = list(dict.fromkeys(row.micro_batches for row in rows))
        for count in counts:
            table.add_column(f"K = {count}", justify="right")
        for key in dict.fromkeys((row.set, row.dtype, row.title) for row in rows):
            cells = [f"{row.bytes_per_parameter:.2f}" for row in rows if (row.set, row.dtype, row.title) == key]
            table.add_row(*key, *cells)
        console.print(table)
    for entry in low:
        console.print(
            f"{entry.net} {entry.dtype}, {entry.micro_batches} micro-batches, peak of a training step above "
            f"{entry.parameter_bytes / 2**20:.2f} MiB of parameters: {entry.accumulators_peak_bytes / 2**20:.2f} MiB with "
            f"accumulators, {entry.sums_in_grad_peak_bytes / 2**20:.2f} MiB with the sums in .grad"
        )
