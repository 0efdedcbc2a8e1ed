"""The host's work in a step: the command, and the page that quotes it."""

import json
from pathlib import Path

from benchmarks import host

ROOT = Path(__file__).parents[2]


def test_a_run_writes_a_row_for_each_set_and_base(tmp_path, capsys):
    file = tmp_path / "host.json"
    assert host.main(["--steps", "10", "--output", str(file)]) == 0
    report = json.loads(file.read_text())
    found = {(row["tensors"], row["base"]): row["median_ms"] for row in report["rows"]}
    assert set(found) == {(tensors, base) for tensors in host.TENSORS for base in host.BASES}
    assert all(ms > 0 for ms in found.values()) and found[512, "SGD"] > found[120, "SGD"]
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_the_page_quotes_the_published_run():
    rows = json.loads(host.RESULTS.read_text())["rows"]
    page = (ROOT / "docs" / "gpu.md").read_text()
    for base in host.BASES:
        (ms,) = [row["median_ms"] for row in rows if row["tensors"] == 161 and row["base"] == base]
        assert f"{base} {ms:.2f} ms" in page
