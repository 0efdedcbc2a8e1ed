"""What the reproductions recorded: their claims hold, the pages are made of it, error bars are worked out right."""

import json
import math

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torch")

from tests.examples.running import EXAMPLES

pytestmark = pytest.mark.cpu_only

PAPERS, ROOT = EXAMPLES / "papers", EXAMPLES.parent
SCRIPTS = ("toy_surfaces", "signal_and_noise", "diagonal_nets", "late_sam", "late_adversarial", "micro_batches")


def recorded(name):
    return json.loads((PAPERS / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_main_claim_of_the_recorded_run_holds(name):
    record = recorded(name)
    assert len(record["claims"]) > 1 and [claim["text"] for claim in record["claims"] if not claim["holds"]] == []
    assert record["command"] == f"python examples/papers/{name}.py" and record["seconds"] < 300


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_recorded_verdicts_are_those_of_the_recorded_numbers(script, name):
    reproduction, record = script("page").reproduction_of(name), recorded(name)
    runs = reproduction.restore(record["results"])
    assert [claim._asdict() for claim in reproduction.check(runs)] == record["claims"]
    assert [claim._asdict() for claim in reproduction.report(runs)] == record["reported"]
    assert (PAPERS / "results" / f"{name}.png").is_file()


def test_the_pages_are_what_the_recorded_runs_make_of_them(script):
    """Whatever is changed by hand between the marks, a figure or a verdict, is not what comes out."""
    page = script("page")
    assert page.SCRIPTS == SCRIPTS
    made = page.pages(PAPERS / "results")
    assert [path.relative_to(ROOT).as_posix() for path in made] == ["examples/papers/README.md", "docs/choosing.md"]
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text


def test_an_excerpt_has_the_cells_of_its_tables(script):
    page, late_sam = script("page"), script("late_sam")
    record = recorded("late_sam")
    first, second, _ = late_sam.tables(late_sam.restore(record["results"]))
    lines = page.excerpt("papers-late", PAPERS / "results").splitlines()
    row = [cell.strip() for cell in lines[-2].strip("|").split("|")]
    assert row == [
        "SAM, last quarter",
        *(table.rows[2][column] for table in (first, second) for column in (1, 2)),
        first.rows[2][3],
    ]


def test_a_section_replaces_what_stood_there_and_nothing_else(script):
    page = script("page")
    sections = {name: f"made of {name}" for name in SCRIPTS}
    text = (
        "before\n" + "between\n".join(f"<!-- {name}:begin -->\nby hand\n<!-- {name}:end -->\n" for name in SCRIPTS) + "after\n"
    )
    made = page.with_results(text, sections)
    assert made.replace("by hand", "") == made and made.count("made of") == made.count("between") + 1 == len(SCRIPTS)
    assert made.startswith("before\n") and made.endswith("after\n") and page.with_results(made, sections) == made
    with pytest.raises(ValueError, match="expected one <!-- late_sam:begin -->"):
        page.with_results(text.replace("<!-- late_sam:begin -->", ""), sections)


def test_a_table_is_the_same_on_the_terminal_and_on_the_page(script, capsys):
    """Bars of a norm are cells' text on the page, and brackets are no colours on the terminal."""
    common, page = script("common"), script("page")
    table = common.Table("What", ["a", "|b|"], [["[red]x", "1.5 ± 0.5"], ["y", ""]])
    assert page.markdown(table) == "\nWhat:\n\n| a | \\|b\\| |\n| --- | --- |\n| [red]x | 1.5 ± 0.5 |\n| y |  |"
    common.print_table(table)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("What", "|b|", "[red]x", "1.5 ± 0.5"))


def test_the_json_is_read_back_as_it_was(script):
    common = script("common")
    record = {"a": [1.5, 2, 1e-300], "b": [[1, 2], []], "c": [{"text": "x [1, 2] y", "e": ["p", "q"]}], "f": None}
    text = common.as_json(record)
    assert json.loads(text) == record and '"a": [1.5, 2, 1e-300]' in text


# ---- error bars and verdicts -----------------------------------------------------------------------------------------


def test_standard_errors(script):
    verdicts = script("verdicts")
    assert verdicts.summary([1.0, 2.0, 3.0, 4.0], 4) == "2.5000 ± 0.6455"  # sqrt(5 / 3) / 2
    assert verdicts.standard_errors_above([2.0, 4.0], [1.0, 1.0]) == pytest.approx(2.0)
    assert verdicts.standard_errors_above([1.0, 1.0], [2.0, 2.0]) == -math.inf
    assert verdicts.standard_errors_above([1.0, 1.0], [1.0, 1.0]) == 0
    assert math.isnan(verdicts.standard_error([1.0])) and verdicts.summary([1.0], 1) == "1.0"


def test_paired_by_seed_what_the_seeds_share_is_left_out(script):
    verdicts = script("verdicts")
    higher, lower = [1.0, 2.0, 3.0], [0.4, 1.5, 2.6]  # differences .6 .5 .4, mean .5, standard error .1 / sqrt(3)
    assert verdicts.paired_errors_above(higher, lower) == pytest.approx(5 * math.sqrt(3))
    assert verdicts.standard_errors_above(higher, lower) < 1
    claim = verdicts.claim_above("up", higher, lower)
    assert not claim.holds and claim.margin == "by 0.6 standard errors, bound 2; paired by seed 8.7"


def test_the_share_of_the_way_and_its_jackknife(script):
    """From 0 to 2, own (1, 2): without the first seed 1, without the second .5, of which sqrt((n - 1) var) is .25."""
    share = script("verdicts").share_of_the_way([0.0, 0.0], [2.0, 2.0], [1.0, 2.0])
    assert share == pytest.approx((0.75, 0.25)) and str(share) == "75 ± 25 %"
    # All of a seed's runs moved together: the share does not move.
    moved = script("verdicts").share_of_the_way([0.0, 5.0], [2.0, 7.0], [1.0, 6.0])
    assert moved == pytest.approx((0.5, 0.0))


def test_a_claim_that_fails_is_printed_as_such(script, capsys):
    common, verdicts = script("common"), script("verdicts")
    common.print_claims([verdicts.Claim("up", True, "by 3"), verdicts.Claim("down", False, "by 1")])
    assert capsys.readouterr().out == "reproduced: up (by 3)\nnot reproduced: down (by 1)\n"
