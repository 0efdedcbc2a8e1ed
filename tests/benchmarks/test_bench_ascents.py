"""What the variants cost: that each of them is what it says, and the table."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import ascents
from benchmarks.ascents import ASCENTS, NOT_PUBLISHED, ascents_section, expected_ratio, make_optimizer
from benchmarks.cases import SETS, make_gradients, make_parameters

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(8, 4), (8,), (3, 8)]


@pytest.mark.parametrize("name", ASCENTS)
def test_a_variant_perturbs_as_it_says(name: str) -> None:
    params, grads = make_parameters(SHAPES, 0), make_gradients(SHAPES, 1)
    optimizer = make_optimizer(ASCENTS[name], list(params))
    clean = [p.detach().clone() for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    with optimizer.perturbed():
        moves = [p.detach() - w for p, w in zip(params, clean, strict=True)]
    flat, steps = torch.cat([g.flatten() for g in grads]), torch.cat([e.flatten() for e in moves])
    along = torch.nn.functional.cosine_similarity(flat, steps, dim=0).item()
    moved = [bool(e.any()) for e in moves]
    assert moved == [False, True, False] if name == "sam_on" else all(moved)
    if name == "sam":
        assert steps.norm().item() == pytest.approx(0.05, rel=1e-5) and along == pytest.approx(1, abs=1e-6)
    elif name == "unnormalised":
        assert steps.norm().item() == pytest.approx(0.05 * flat.norm().item(), rel=1e-3)
    elif name == "inf":
        assert steps.abs().max().item() == pytest.approx(0.05, rel=1e-5) == steps.abs().min().item()
    elif name != "decay":  # whose lambda is small
        assert along < 0.99


def test_accesses_are_of_what_is_perturbed_and_of_the_base_step() -> None:
    assert expected_ratio(ASCENTS["sam"], SHAPES) == 1
    assert expected_ratio(ASCENTS["eta"], SHAPES) == pytest.approx((19 + 5) / 10)
    assert expected_ratio(ASCENTS["sam_on"], SHAPES) == pytest.approx((5 * 8 / 64 + 5) / 10)
    # docs/variants.md has the same figures in a row of each.
    page = (Path(__file__).resolve().parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")
    for keyword, name in (("eta=0.01", "eta"), ('adaptive="layerwise"', "layerwise"), ("p=math.inf", "inf")):
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{keyword}`" in line)
        assert row.endswith(f"| {ASCENTS[name].accesses} |")


def test_the_command_and_its_section(tmp_path: Path) -> None:
    assert ascents.main(["--smoke", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "ascents-2threads-smoke.json").read_text(encoding="utf-8"))
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == list(ASCENTS) and rows["sam"]["ratio"] == 1
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows.values())
    # The direction, and with eta its scale, beside the backup; of the 198 vectors' elements out of 12,716.
    copies = {"sam": 1, "all": 1, "eta": 3, "layerwise": 2, "inf": 2, "decay": 2, "sam_on": 129 / SETS["smoke"].parameters}
    for name, expected in copies.items():
        assert rows[name]["buffer_copies"] == pytest.approx(expected, abs=0.03)
    for row in report["rows"]:
        row.update(set="tiny", ratio=1.234, expected=1.5, median_ms=2.0, buffer_copies=2.0)
    text = ascents_section(report)
    assert "| SAM | 2 ms | 2.00x |" in text and "| `p=math.inf` | 1.23 (1.50) | 2.00x |" in text
    assert ascents_section(None) == NOT_PUBLISHED
