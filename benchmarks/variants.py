"""What is measured: every baseline and every form of ours behind one interface, with its element accesses.

A variant is a row of the table; a form is one way to run it. Where a variant has several forms, a short trial picks the
fastest for each parameter set, so that a baseline stands in its best form.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.baselines import BASES, RHO, ForeachInPlaceSAM, NaiveSAM, PytorchOptimizerSAM, SwapSAM
from benchmarks.compiled import CompiledSAM

# Element accesses per parameter of the base step alone (reads + writes), by base and form. One pass over the parameter,
# the gradient and the state, against one torch call per term of the formula.
FUSED_BASE = {"sgd": 5, "adamw": 7}
UNFUSED_BASE = {"sgd": 11, "adamw": 20}
# fp32 copies of the parameters that the base optimizer keeps: the momentum; the two moments.
BASE_STATE_COPIES = {"sgd": 1, "adamw": 2}


class Driver(Protocol):
    """Runs one step and returns the seconds spent in optimizer code."""

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """One step: takes the gradients of one pass after the other, and assigns them outside the clock."""


class PhaseOptimizer(Protocol):
    """The call form that all baselines share."""

    def first_step(self) -> None:
        """The ascent."""

    def second_step(self) -> None:
        """The restore and the base step."""


def assign_gradients(params: list[Tensor], grads: list[Tensor]) -> None:
    """`p.grad = g` for all."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g


class PhaseDriver:
    """`first_step()`, `second_step()`. Gradients are replaced, not cleared: the same for every variant in this form."""

    def __init__(self, params: list[Tensor], optimizer: PhaseOptimizer) -> None:
        self.params, self.optimizer = params, optimizer

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        first, second = next(passes), next(passes)
        assign_gradients(self.params, first)
        start = time.perf_counter()
        self.optimizer.first_step()
        middle = time.perf_counter()
        assign_gradients(self.params, second)
        resumed = time.perf_counter()
        self.optimizer.second_step()
        return (middle - start) + (time.perf_counter() - resumed)


class ClosureDriver:
    """`step(closure)`: the closure's own time is taken off, the clearing of gradients by `step` is not."""

    def __init__(self, params: list[Tensor], optimizer: Any) -> None:
        self.params, self.optimizer = params, optimizer
        self.loss = torch.ones(())

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        both = iter((next(passes), next(passes)))
        outside = 0.0

        def closure() -> Tensor:
            nonlocal outside
            entered = time.perf_counter()
            assign_gradients(self.params, next(both))
            outside += time.perf_counter() - entered
            return self.loss

        start = time.perf_counter()
        self.optimizer.step(closure)
        return time.perf_counter() - start - outside


class PerturbedDriver:
    """`with optimizer.perturbed(): ...`, then `optimizer.step()`."""

    def __init__(self, params: list[Tensor], optimizer: Any) -> None:
        self.params, self.optimizer = params, optimizer

    def step(self, passes: Iterator[list[Tensor]]) -> float:
        """See `Driver`."""
        first, second = next(passes), next(passes)
        assign_gradients(self.params, first)
        start = time.perf_counter()
        with self.optimizer.perturbed():
            entered = time.perf_counter()
            assign_gradients(self.params, second)
            outside = time.perf_counter() - entered
        self.optimizer.step()
        return time.perf_counter() - start - outside


@dataclass(frozen=True)
class Form:
    """One way to run a variant. `accesses` are SAM's own per parameter; `base_accesses` those of the base step."""

    name: str
    build: Callable[[list[Tensor], str], Driver]
    accesses: int | None
    base_accesses: dict[str, int] = field(default_factory=lambda: FUSED_BASE)


@dataclass(frozen=True)
class Variant:
    """One row: `why_not` gives the reason why it cannot run here, or None."""

    name: str
    title: str
    call_form: str
    forms: tuple[Form, ...]
    backend: str = "torch"
    ours: bool = False
    why_not: Callable[[], str | None] = lambda: None


def _phases(build: Callable[[list[Tensor], str], PhaseOptimizer]) -> Callable[[list[Tensor], str], Driver]:
    return lambda params, base: PhaseDriver(params, build(params, base))


def _pytorch_optimizer_missing() -> str | None:
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed: pip install --no-deps pytorch-optimizer==4.1.0"
    return None


def _compiler_missing() -> str | None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on the PATH to make CPU code: install g++"
    return None


def _phase_form(name: str, build: Callable[[list[Tensor], str], PhaseOptimizer], *accesses: Any) -> Form:
    return Form(name, _phases(build), *accesses)


BASELINES: tuple[Variant, ...] = (
    Variant("naive", "naive SAM", "first/second", (_phase_form("loop", NaiveSAM, 12, UNFUSED_BASE),)),
    Variant(
        "pytorch_optimizer_foreach",
        "pytorch_optimizer 4.1, foreach",
        "first/second",
        (_phase_form("foreach", lambda p, b: PytorchOptimizerSAM(p, b, foreach=True), 12, UNFUSED_BASE),),
        why_not=_pytorch_optimizer_missing,
    ),
    Variant(
        "pytorch_optimizer_loop",
        "pytorch_optimizer 4.1, loop, fused base",
        "first/second",
        (_phase_form("loop", lambda p, b: PytorchOptimizerSAM(p, b, foreach=False), 12),),
        why_not=_pytorch_optimizer_missing,
    ),
    Variant("foreach_inplace", "foreach in place", "first/second", (_phase_form("alpha=item", ForeachInPlaceSAM, 8),)),
    Variant(
        "foreach_swap",
        "foreach, p.data swapped",
        "first/second",
        (
            _phase_form("fresh copy", lambda p, b: SwapSAM(p, b, "fresh"), 4),
            _phase_form("kept copy", lambda p, b: SwapSAM(p, b, "kept"), 6),
            _phase_form("add(out=) loop", lambda p, b: SwapSAM(p, b, "loop"), 4),
        ),
    ),
    Variant(
        "torch_compile",
        "torch.compile",
        "first/second",
        (
            _phase_form("swapped", lambda p, b: CompiledSAM(p, b, swap=True), 4),
            _phase_form("in place", lambda p, b: CompiledSAM(p, b, swap=False), 5),
        ),
        why_not=_compiler_missing,
    ),
)

CALL_FORMS: dict[str, tuple[Callable[[list[Tensor], Any], Driver], int]] = {
    "first/second": (PhaseDriver, 5),
    "closure": (ClosureDriver, 5),
    "perturbed": (PerturbedDriver, 7),  # its exit restores
}


def backend_missing(backend: str) -> str | None:
    """None if this backend of sam_fused serves the CPU here, else why not."""
    from sam_fused.ops.backends import available_backends

    return available_backends(torch.device("cpu")).get(backend, f"sam_fused has no backend {backend!r}")


def ours(backend: str, call_form: str) -> Variant:
    """One form of ours. Accesses as `sam_fused.ops.schema` states them for the native kernels."""
    driver, accesses = CALL_FORMS[call_form]

    def build(params: list[Tensor], base: str) -> Driver:
        from sam_fused import SAM

        optimizer_class, settings = BASES[base]
        return driver(params, SAM(params, optimizer_class, rho=RHO, backend=backend, **settings))

    # foreach: 1 for the norm, 2 for the backup, 3 for the addition, 2 to copy back. The reference is no one's choice.
    known = {"native": accesses, "foreach": 8}.get(backend)
    return Variant(
        f"ours_{backend}_{call_form.replace('/', '_')}",
        f"sam_fused {backend}, {call_form}",
        call_form,
        (Form(call_form, build, known),),
        backend=backend,
        ours=True,
        why_not=lambda: backend_missing(backend),
    )


def headline() -> Variant:
    """Ours in the form that every ratio refers to: native where it was built, else foreach."""
    return ours("native" if backend_missing("native") is None else "foreach", "first/second")


def all_variants() -> list[Variant]:
    """Baselines, then every form of ours but the headline itself, in the table's order."""
    forms = [ours("native", form) for form in CALL_FORMS]
    rest = [*forms, ours("foreach", "first/second"), ours("reference", "first/second")]
    return [*BASELINES, *(variant for variant in rest if variant.name != headline().name)]


def by_name(names: Iterable[str]) -> list[Variant]:
    """The variants of these names. Raises ValueError on a name that is none of them."""
    known = {variant.name: variant for variant in all_variants()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--variants: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in names]
