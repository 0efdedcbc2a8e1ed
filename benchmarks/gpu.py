"""What does SAM cost on a GPU? `python -m benchmarks.gpu`.

Three kinds of figures, each for fp32 and bf16: every operation by itself (CUDA events, second-level cache cold, beside a copy
of the same size on the same card in the same rounds), the optimizer side of one step (device idle before and after; the part
that the host waits for is given apart), and launches and peak memory of that step. Baselines are those of the CPU benchmark.

What was predicted before anything was measured. Bytes are `accesses` of `sam_fused.ops.schema` times the dtype's size times
the parameters; with the 161 tensors of ResNet-50 (25.56 M parameters) in fp32 one access is 102 MB, with the billion 4.05 GB:

    operation        reads + writes   ResNet-50, fp32    1 B, fp32    launches: native, triton
    grad_norm            1 + 0             102 MB          4.0 GB                 1, 2
    perturb_             2 + 2             409 MB         16.2 GB                 1, 1
    restore_             1 + 1             204 MB          8.1 GB                 1, 1
    restore_sgd_         3 + 2             511 MB         20.2 GB                 1, 1
    restore_adamw_       4 + 3             716 MB         28.3 GB                 1, 1

bf16 halves the bytes. A step is norm, perturb and one last pass: 3 launches native and 4 Triton for one dtype, no copies,
whatever the number of tensors up to 3,712 (native: that many gradient addresses fit into a launch's arguments; above it every
operation takes ceil(tensors / 3,712)). Extra memory above parameters, gradients and the base's state is one backup.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.baselines import BASES, RHO
from benchmarks.cases import SETS, ParameterSet, make_gradients, make_parameters
from benchmarks.gpu_kernels import KernelBench
from benchmarks.gpu_measure import Clock, Device, StepDriver, fresh_gradients, launches, with_peak
from benchmarks.gpu_report import KernelRow, StepRow, Target, as_json, print_tables, targets, write_csv, write_png
from benchmarks.machine import describe_machine
from benchmarks.measure import alternate, quartiles, runner
from benchmarks.report import write_json
from benchmarks.variants import BASE_STATE_COPIES, BASELINES, Form, Variant
from sam_fused import SAM
from sam_fused.ops.backends import available_backends

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_SETS = ("resnet50", "lora", "tiny", "gpt_1b")
REHEARSAL_SETS = ("smoke",)
COMPILED = ("native", "triton")
# Beside AdamW and in bf16 the step is that of the headline, the naive loop and torch's strongest calls at stable addresses.
SHORT = ("naive", "foreach_inplace")
# A compiler takes this long over two graphs of a few hundred tensors; with less time left it is not started.
COMPILE_SECONDS = 45.0
# torch.compile goes on specialising for some steps.
WARM_STEPS = 10

# An optimizer with `first_step` and `second_step`, over these parameters, around this base.
Make = Callable[[list[torch.Tensor], str], Any]


class StepBench:
    """One set, dtype and base: ours, which stays, beside one variant after the other."""

    def __init__(self, parameter_set: ParameterSet, dtype: str, base: str, device: Device, backend: str) -> None:
        self.set, self.dtype, self.base, self.device, self.backend = parameter_set, dtype, base, device, backend
        shapes = parameter_set.shapes()
        if "torch._dynamo" in sys.modules:  # graphs of other sets would be tried first at every call
            torch.compiler.reset()

        def make(seed: int) -> list[torch.Tensor]:
            return make_gradients(shapes, seed, device.name, DTYPES[dtype])

        self.gradients = fresh_gradients(make, 0)
        self.ours = self.build(_our_maker(backend))

    def build(self, optimizer: Make) -> StepDriver:
        """The optimizer over parameters of its own."""
        params: list[torch.Tensor] = list(make_parameters(self.set.shapes(), 0, self.device.name, DTYPES[self.dtype]))
        return StepDriver(params, optimizer(params, self.base), self.device)

    def row(self, variant: str, title: str) -> StepRow:
        """A row without figures."""
        return StepRow(self.set.name, self.dtype, self.base, variant, title, self.set.tensors, self.set.parameters)

    def beside_ours(self, row: StepRow, make: Make, rounds: int, seconds: float) -> None:
        """Fills the row; what cannot run gives its reason, and costs the table nothing else."""
        try:
            driver, peak = with_peak(lambda: self._warm(make), self.device)
            if peak is not None:
                owned = (1 + BASE_STATE_COPIES[self.base]) * self.set.parameters * DTYPES[self.dtype].itemsize
                row.peak_extra_bytes = max(0, peak - owned)
            ours, theirs = runner(self.ours, self.gradients), runner(driver, self.gradients)
            ours()
            found = alternate(theirs, ours, rounds, time.perf_counter() + seconds, seconds / (6 * rounds))
            row.q1_ms, row.median_ms, row.q3_ms = (1e3 * value for value in quartiles([theirs for theirs, _ in found.used]))
            row.ratio_to_ours = statistics.median(found.ratios)
            row.rounds, row.noisy = len(found.used), found.noisy
            row.host_ms = 1e3 * driver.host_seconds()
            self._count(row, driver)
        except Exception as error:  # whatever a foreign package, a compiler or a full memory raises belongs into its row
            row.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]

    def _count(self, row: StepRow, driver: StepDriver) -> None:
        """Launches, where the profiler may count them: a container may forbid it, and the times are known by now."""
        try:
            counted = launches(lambda: driver.step(self.gradients.next()), self.device)
        except Exception as error:
            row.remark = f"launches not counted: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
            return
        if counted is not None:
            row.kernels, row.copies = counted.kernels, counted.copies

    def _warm(self, make: Make) -> StepDriver:
        """Built, compiled, its buffers allocated: the steps that do so are over."""
        driver = self.build(make)
        for _ in range(WARM_STEPS):
            driver.step(self.gradients.next())
        driver.host.clear()
        return driver


def _our_maker(backend: str) -> Make:
    def make(params: list[torch.Tensor], base: str) -> SAM:
        optimizer_class, settings = BASES[base]
        return SAM(params, optimizer_class, rho=RHO, backend=backend, **settings)

    return make


def _maker(form: Form) -> Make:
    """The form's optimizer; its driver is the CPU's, whose clock does not wait."""
    return lambda params, base: form.build(params, base).optimizer  # type: ignore[attr-defined]


class Run:
    """Everything that is measured, within the time that is given."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console, self.started = options, console, time.perf_counter()
        self.device = Device("cpu" if options.rehearse else "cuda")
        self.clock = Clock(self.device)
        self.sets = REHEARSAL_SETS if options.rehearse else tuple(options.sets or GPU_SETS)
        self.rounds = 2 if options.rehearse or options.quick else 5
        served = available_backends(torch.device(self.device.name))
        self.backends = [name for name in COMPILED if served[name] is None] or ["foreach"]
        self.missing = {name: reason for name in COMPILED if (reason := served[name]) is not None}
        self.kernels: list[KernelRow] = []
        self.steps: list[StepRow] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.options.seconds) - (time.perf_counter() - self.started)

    def say(self, text: str) -> None:
        """A line per thing, so that a log tells that it lives."""
        self.console.print(f"{time.perf_counter() - self.started:6.1f} s  {text}")

    def measure(self) -> None:
        """What matters most comes first: where the time is up, the rest says so in its rows."""
        for dtype in DTYPES:
            for name in self.sets:
                self._kernels(SETS[name], dtype)
        for dtype in DTYPES:
            for name in self.sets:
                for base in BASES:
                    self._steps(SETS[name], dtype, base, [v for v in BASELINES if self._is_asked_for(v, dtype, base)])

    def measure_compiled(self) -> None:
        """Apart and last: nobody knows how long a compiler takes."""
        compiled = [variant for variant in BASELINES if variant.name == "torch_compile"]
        for name in sorted(self.sets, key=lambda name: SETS[name].tensors):
            self._steps(SETS[name], "fp32", "sgd", compiled, ours=False)

    def _is_asked_for(self, variant: Variant, dtype: str, base: str) -> bool:
        if variant.name in ("torch_compile", "pytorch_optimizer_loop"):
            return False
        return variant.name in SHORT or (dtype == "fp32" and base == "sgd" and not self.options.quick)

    def _kernels(self, parameter_set: ParameterSet, dtype: str) -> None:
        self.say(f"{parameter_set.name} {dtype}: operations")
        bench = KernelBench(parameter_set, dtype, DTYPES[dtype], self.device, self.backends)
        if self.left <= 0:
            self.kernels += bench.not_measured("not measured: the time was up")
            return
        self.kernels += bench.measure(self.clock, self.rounds, repeats=4 if self.options.quick else 10)
        self._free()

    def _steps(
        self, parameter_set: ParameterSet, dtype: str, base: str, baselines: Sequence[Variant], ours: bool = True
    ) -> None:
        self.say(f"{parameter_set.name} {dtype} {base}: steps")
        wanted = list(self._wanted(baselines, ours))
        bench = StepBench(parameter_set, dtype, base, self.device, self.backends[0]) if self.left > 0 else None
        for number, (name, title, variant, make) in enumerate(wanted):
            row = StepRow(parameter_set.name, dtype, base, name, title, parameter_set.tensors, parameter_set.parameters)
            self.steps.append(row)
            needed = COMPILE_SECONDS if name == "torch_compile" else 0.0
            row.reason = variant.why_not() if variant else None
            if name == "torch_compile" and self.options.rehearse:
                row.reason = "not measured: a rehearsal compiles nothing"
            if row.reason is None and (bench is None or self.left <= needed):
                row.reason = f"not measured: {max(0.0, self.left):.0f} s were left"
            if row.reason is None and bench is not None:
                share = min(1.0, self.left / (4 * (len(wanted) - number)))
                bench.beside_ours(row, make, self.rounds, max(0.1, share if not self.options.rehearse else 0.1))
        del bench
        self._free()

    def _wanted(self, baselines: Sequence[Variant], ours: bool) -> Iterator[tuple[str, str, Variant | None, Make]]:
        if ours:
            for backend in self.backends:  # the headline beside itself too: the ratio of that row is the noise
                yield f"ours_{backend}", f"sam_fused {backend}", None, _our_maker(backend)
        # Every form a row: which one is a baseline's best differs from the CPU, and a ratio to a weaker one would flatter us.
        for variant in baselines:
            for form in variant.forms:
                title = variant.title if len(variant.forms) == 1 else f"{variant.title}, {form.name}"
                yield variant.name, title, variant, _maker(form)

    def _free(self) -> None:
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def judged(self) -> list[Target]:
        """Targets are about a GPU: a rehearsal has none."""
        if self.options.rehearse:
            return []
        return targets(self.kernels, self.steps, [f"ours_{backend}" for backend in self.backends])


def describe_card(device: Device) -> dict[str, Any]:
    """The card as torch sees it; the driver is in what `python -m tools.gpu` adds."""
    if not device.is_cuda:
        return {"name": "none: rehearsed on the CPU"}
    found = torch.cuda.get_device_properties(0)
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size", "major", "minor")
    return {name: getattr(found, name, None) for name in names} | {"cuda": torch.version.cuda}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What does SAM cost on a GPU?")
    made.add_argument("--sets", nargs="+", choices=list(SETS), help=f"parameter sets (default: {' '.join(GPU_SETS)})")
    made.add_argument("--seconds", type=float, default=230.0, help="when nothing more is begun (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="two rounds, and fewer baselines")
    made.add_argument("--rehearse", action="store_true", help="on the CPU, over a tiny set: does everything run?")
    made.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files go")
    made.add_argument("--name", help="of the files (default: the card's and the date)")
    return made


def file_name(card: str) -> str:
    """`<card>-<date>`, for every tool that writes results of this card."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in card.lower()).split())
    return f"{slug}-{time.strftime('%Y-%m-%d', time.gmtime())}"


def report_of(run: Run, card: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """What was measured so far, and where."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *command]),
        "rehearsal": bool(run.options.rehearse),
        "card": card,
        "machine": describe_machine(torch.get_num_threads()),
        "seconds": round(time.perf_counter() - run.started, 1),
        "headline": f"ours_{run.backends[0]}",
        "backends_missing": run.missing,
        "operations": as_json(run.kernels),
        "steps": as_json(run.steps),
        "targets": as_json(run.judged()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 whether or not the targets were reached, 2 where there is no GPU."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    options = made.parse_args(command)
    if not options.rehearse and not torch.cuda.is_available():
        made.error("expected a CUDA device, found none; --rehearse goes through the same steps on the CPU")
    if options.rehearse:
        torch.set_num_threads(1)  # tiny tensors: two threads would only wait for each other
    console = Console(width=160)
    run = Run(options, console)
    card = describe_card(run.device)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / (options.name or file_name("rehearsal" if options.rehearse else card["name"]))
    run.measure()
    write_json(stem.with_name(f"{stem.name}.json"), report_of(run, card, command))  # or a stopped compiler would take it along
    run.measure_compiled()
    report = report_of(run, card, command)
    print_tables(console, run.kernels, run.steps, run.judged())
    files = {suffix: stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "csv", "png")}
    write_json(files["json"], report)
    write_csv(files["csv"], run.kernels, run.steps)
    reason = write_png(files["png"], run.kernels, run.steps, f"{card['name']}, torch {torch.__version__}")
    console.print(reason or f"written: {files['json']} and beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
