"""What each variant of SAM costs beside SAM: `python -m benchmarks.ascents`.

The optimizer side of one step, `first_step` and `second_step` around torch's fused SGD with momentum, over the shapes of real
models; every variant has parameters of its own, all take the same gradients, and a round is one block of steps of each in turn.
What the element accesses would give is beside what is measured: on sets that do not fit into the caches the two should agree.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from torch import Tensor

from benchmarks.baselines import BASES, RHO
from benchmarks.cases import DEFAULT_SETS, SETS, ParameterSet, make_parameters
from benchmarks.command import add_common, begin, check_positive, measure_each
from benchmarks.measure import Gradients, quartiles, rounds_of, runner
from benchmarks.report import set_title
from benchmarks.variants import FUSED_BASE, PhaseDriver

SAM_ACCESSES = 5


@dataclass(frozen=True)
class Ascent:
    """One variant: its keywords, and the accesses of its ascent as `docs/variants.md` has them.

    `only_vectors`: SAM-ON's groups, for which the tensors of one dimension stand (norm layers' gains and shifts, and biases).
    """

    title: str
    accesses: int
    keywords: dict[str, Any] = field(default_factory=dict)
    only_vectors: bool = False


ASCENTS: dict[str, Ascent] = {
    "sam": Ascent("SAM", SAM_ACCESSES),
    "all": Ascent('`adaptive="all"`', 6, {"adaptive": "all"}),
    "weights": Ascent('`adaptive="weights"`', 6, {"adaptive": "weights"}),
    "eta": Ascent('`adaptive="all", eta=0.01`', 19, {"adaptive": "all", "eta": 0.01}),
    "layerwise": Ascent('`adaptive="layerwise"`', 12, {"adaptive": "layerwise"}),
    "inf": Ascent("`p=math.inf`", 9, {"p": math.inf}),
    "unnormalised": Ascent("`normalize=False`", 5, {"normalize": False}),
    "decay": Ascent("`weight_decay_in_ascent=True`", 10, {"weight_decay_in_ascent": True}),
    "sam_on": Ascent("SAM-ON: vectors alone", SAM_ACCESSES, only_vectors=True),
}


@dataclass(frozen=True)
class AscentRow:
    """One variant on one set. `expected` is the ratio of the accesses, its own and the base step's, to SAM's."""

    set: str
    variant: str
    threads: int
    median_ms: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    expected: float
    buffer_copies: float  # what backups and directions hold, in copies of the parameters
    rounds_kept: int
    rounds_discarded: int
    noisy: bool


def make_optimizer(ascent: Ascent, params: list[Tensor]) -> Any:
    """SAM of this kind over the parameters."""
    from sam_fused import SAM

    optimizer_class, settings = BASES["sgd"]
    named = [(f"{number}.{'weight' if p.dim() > 1 else 'bias'}", p) for number, p in enumerate(params)]
    given: Any = named
    if ascent.only_vectors:
        vectors, rest = ([pair for pair in named if (pair[1].dim() > 1) == wide] for wide in (False, True))
        given = [{"params": vectors}, {"params": rest, "perturb": False}]
    return SAM(given, optimizer_class, rho=RHO, **settings, **ascent.keywords)


def expected_ratio(ascent: Ascent, shapes: list[tuple[int, ...]]) -> float:
    """Of accesses: those of the ascent, of what is perturbed, and those of the base step, to SAM's."""
    sizes = [math.prod(shape) for shape in shapes]
    perturbed = sum(size for size, shape in zip(sizes, shapes, strict=True) if not ascent.only_vectors or len(shape) < 2)
    base = FUSED_BASE["sgd"]
    return (ascent.accesses * perturbed / sum(sizes) + base) / (SAM_ACCESSES + base)


def measure(parameter_set: ParameterSet, threads: int, rounds: int, seconds: float, seed: int) -> list[AscentRow]:
    """Every variant that the set has tensors for."""
    shapes = parameter_set.shapes()
    gradients = Gradients.make(shapes, seed)
    runs: dict[str, Callable[[], float]] = {}
    optimizers: dict[str, Any] = {}
    for name, ascent in ASCENTS.items():
        if ascent.only_vectors and all(len(shape) > 1 for shape in shapes):
            continue
        params: list[Tensor] = list(make_parameters(shapes, seed))
        optimizers[name] = make_optimizer(ascent, params)
        runs[name] = runner(PhaseDriver(params, optimizers[name]), gradients)
    kept, discarded = rounds_of(runs, rounds, seconds, 0.15)
    used, rows = kept or discarded, []
    for name, optimizer in optimizers.items():
        low, ratio, high = quartiles([figures[name] / figures["sam"] for figures in used])
        rows.append(
            AscentRow(
                set=parameter_set.name,
                variant=name,
                threads=threads,
                median_ms=1e3 * statistics.median(figures[name] for figures in used),
                ratio=ratio,
                ratio_q1=low,
                ratio_q3=high,
                expected=expected_ratio(ASCENTS[name], shapes),
                buffer_copies=optimizer.buffer_bytes / (4 * parameter_set.parameters),
                rounds_kept=len(kept),
                rounds_discarded=len(discarded),
                noisy=not kept,
            )
        )
    return rows


def show(rows: list[AscentRow]) -> Table:
    """The table of a run."""
    table = Table("set", "variant", title="the optimizer side of a step, against SAM's")
    for heading in ("ms", "times SAM", "quartiles", "by accesses", "buffers, copies", "rounds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.set,
            ASCENTS[row.variant].title,
            f"{row.median_ms:.3g}",
            f"{row.ratio:.2f}",
            f"{row.ratio_q1:.2f} to {row.ratio_q3:.2f}",
            f"{row.expected:.2f}",
            f"{row.buffer_copies:.2f}",
            f"{row.rounds_kept} of {row.rounds_kept + row.rounds_discarded}{', noisy' if row.noisy else ''}",
        )
    return table


NOT_PUBLISHED = "The variants have not been measured on a quiet machine yet: `python -m benchmarks.ascents`."


def ascents_section(report: dict[str, Any] | None) -> str:
    """The Markdown of `docs/choosing.md` between its two marks; one sentence where nothing has been published."""
    if report is None:
        return NOT_PUBLISHED
    machine, rows = report["machine"], report["rows"]
    names = list(dict.fromkeys(row["set"] for row in rows))
    found = {(row["set"], row["variant"]): row for row in rows}
    kept = ", ".join(
        f"{found[name, 'sam']['rounds_kept']}{' (noisy)' if found[name, 'sam']['noisy'] else ''}" for name in names
    )
    lines = [
        "The optimizer side of one step, fp32, SGD with momentum, as a multiple of SAM's (in brackets what the accesses would "
        f"give), {machine['torch_threads']} threads, medians of {kept} rounds, {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; `{report['run']['command']}`:",
        "",
        f"| | {' | '.join(set_title(SETS[name]) for name in names)} | memory |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for variant, ascent in ASCENTS.items():
        cells = []
        for name in names:
            row = found.get((name, variant))
            milliseconds = f"{row['median_ms']:.3g} ms" if row and variant == "sam" else None
            cells.append(milliseconds or (f"{row['ratio']:.2f} ({row['expected']:.2f})" if row else "-"))
        largest = found.get((names[-1], variant))
        cells.append(f"{largest['buffer_copies']:.2f}x" if largest else "-")
        lines.append(f"| {ascent.title} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Memory: backups and directions, in copies of the parameters, {SETS[names[-1]].title}. All that was measured: "
        "`benchmarks/results/published/ascents-2threads.json`.",
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.ascents", description=(__doc__ or "").split("\n\n")[0])
    add_common(made, "9", "60 for each set")
    made.add_argument(
        "--sets", nargs="+", choices=list(SETS), default=list(reversed(DEFAULT_SETS)), help="default: %(default)s"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    begun = begin(parser(), lambda o: check_positive(o, ("threads", "rounds", "seconds")), arguments)
    options = begun[1]
    rounds, seconds = options.rounds or (1 if options.smoke else 9), options.seconds or 60.0
    titles = {name: SETS[name].title for name in (["smoke"] if options.smoke else options.sets)}

    def measured(name: str) -> list[AscentRow]:
        return measure(SETS[name], options.threads, rounds, seconds, options.seed)

    return measure_each("ascents", "ascents", begun, titles, measured, show)


if __name__ == "__main__":
    sys.exit(main())
