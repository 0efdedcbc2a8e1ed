"""The tables, verdicts and commands of README.md, made from the JSONs in results/; and what docs/choosing.md takes from them.

    python examples/papers/page.py

What stands between `<!-- name:begin -->` and `<!-- name:end -->` is rewritten, by the functions that the script of that name
prints with. All else on the pages is prose, and stays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import RESULTS, Reproduction, Table

PAGE = Path(__file__).with_name("README.md")
CHOOSING = PAGE.parents[2] / "docs" / "choosing.md"
SCRIPTS = ("toy_surfaces", "signal_and_noise", "diagonal_nets", "late_sam", "late_adversarial", "micro_batches")
BAR = r"\|"  # in a cell
# For docs/choosing.md: of a script's tables some columns, each by the number of its table, its heading there and here.
EXCERPTS = {
    "papers-late": (
        "late_sam",
        [
            (0, "top eigenvalue", "top eigenvalue, mnist1d"),
            (0, "of the way", "of the way to SAM's"),
            (1, "top eigenvalue", "top eigenvalue, digits"),
            (1, "of the way", "of the way to SAM's"),
            (0, "test error %", "test error %, mnist1d"),
        ],
    ),
    "papers-micro-batches": (
        "micro_batches",
        [
            (0, "samples a perturbation", "samples a perturbation"),
            (0, "test error %", "test error %"),
            (0, "top eigenvalue", "top eigenvalue"),
        ],
    ),
}


def reproduction_of(name: str) -> Reproduction:
    return importlib.import_module(name).REPRODUCTION


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " | ".join(["", *(cell.replace("|", BAR) for cell in cells), ""]).strip()

    rule = ["---"] * len(table.headings)
    return "\n".join(["", f"{table.title}:", "", *map(line, [table.headings, rule, *table.rows])])


def section(name: str, results: Path) -> str:
    """Everything on the page that a run decides."""
    record = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    reproduction = reproduction_of(name)
    runs = reproduction.restore(record["results"])
    verdicts = [f"- {claim}" for claim in [*reproduction.check(runs), *reproduction.report(runs)]]
    time = f"{record['seconds']:.0f} s, {record['processes']} processes of {record['threads per process']} thread"
    command = f"`{record['command']}`: {time}; torch {record['torch']}."
    picture = f"![{name}](results/{name}.png)"
    return "\n".join([*map(markdown, reproduction.tables(runs)), "", *verdicts, "", picture, "", command, ""])


def excerpt(name: str, results: Path) -> str:
    """Some columns of a script's tables, side by side."""
    script, columns = EXCERPTS[name]
    record = json.loads((results / f"{script}.json").read_text(encoding="utf-8"))
    reproduction = reproduction_of(script)
    tables = reproduction.tables(reproduction.restore(record["results"]))
    cells = [[row[list(tables[number].headings).index(there)] for row in tables[number].rows] for number, there, _ in columns]
    methods = [row[0] for row in tables[0].rows]
    title = f"{record['seeds']} seeds, mean ± standard error, `{record['command']}`"
    headings = ["method", *(here for _, _, here in columns)]
    return markdown(Table(title, headings, list(zip(methods, *cells, strict=True)))).lstrip()


def with_results(text: str, sections: Mapping[str, str]) -> str:
    """The page `text` with every section replaced."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected one {begin} and one {end} on the page: put them where the section belongs.")
        made = f"{begin}\n{section}\n{end}"
        text = re.sub(f"{begin}.*{end}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def pages(results: Path) -> dict[Path, str]:
    """Both pages, as the runs in `results` make them."""
    sections = {
        PAGE: {name: section(name, results) for name in SCRIPTS},
        CHOOSING: {name: excerpt(name, results) for name in EXCERPTS},
    }
    return {page: with_results(page.read_text(encoding="utf-8"), made) for page, made in sections.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the JSONs (default: {RESULTS})")
    options = parser.parse_args()
    for page, text in pages(options.results).items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
