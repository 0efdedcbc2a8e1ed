"""The tables, verdicts and commands of README.md, made from the JSONs in results/.

    python examples/papers/page.py

What stands between `<!-- name:begin -->` and `<!-- name:end -->` is rewritten, by the functions that the script of that name
prints with. All else on the page is prose, and stays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, Reproduction, Table

PAGE = Path(__file__).with_name("README.md")
SCRIPTS = ("toy_surfaces", "signal_and_noise", "diagonal_nets", "late_sam", "late_adversarial", "micro_batches")
BAR = r"\|"  # in a cell


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


def with_results(text: str, results: Path) -> str:
    """The page `text` with every section made anew."""
    for name in SCRIPTS:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md: expected one {begin} and one {end}: put them where the section belongs.")
        made = f"{begin}\n{section(name, results)}\n{end}"
        text = re.sub(f"{begin}.*{end}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSONs (default: results/)")
    parser.add_argument("--output", type=Path, default=PAGE, help="where the page goes (default: README.md)")
    options = parser.parse_args()
    options.output.write_text(with_results(PAGE.read_text(encoding="utf-8"), options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
