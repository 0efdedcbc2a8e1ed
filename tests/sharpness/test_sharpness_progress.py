"""Bars: one at a time, with totals that are reached, for whoever watches."""

import sys

import pytest

from sam_fused.sharpness import ascent_sharpness, average_sharpness, measure, top_eigenvalues, worst_sharpness
from tests.optim.helpers import assert_one_sentence
from tests.sharpness.problems import Net, quadratic

pytestmark = pytest.mark.cpu_only


class Bar:
    made: list = []  # noqa: RUF012

    def __init__(self, total, desc, disable, **kwargs):
        self.total, self.first_total, self.names, self.disable = total, total, [desc], disable
        self.n, self.closed = 0, False
        Bar.made.append(self)

    def update(self):
        self.n += 1

    def set_description(self, name):
        self.names.append(name)

    def close(self):
        self.closed = True


class tqdm_notebook(Bar):
    pass


@pytest.fixture(autouse=True)
def made(monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def test_bars_count_batches_and_are_closed():
    case = Net()
    average_sharpness(case.surface(), 0.1, directions=3)
    (bar,) = Bar.made
    assert (bar.names, bar.total, bar.n, bar.closed) == (["average direction"], 16, 16, True)
    case.batches[2] = (case.x[:3], case.y[:3])
    case.loss = lambda outputs, targets: case.y / 0 if len(targets) == 3 else outputs.sum()
    with pytest.raises(ValueError, match="0-dim"):
        case.surface().loss()
    assert Bar.made[1].closed and Bar.made[1].n == 2 and Bar.made[1].names == ["pass"]


def test_totals_are_upper_bounds():
    surface = Net().surface()
    point = surface.gradient()
    ascent_sharpness(surface, 0.1, point=point)
    top_eigenvalues(surface, 2)
    worst_sharpness(surface, 0.1, starts=["gradient", "random"], random_starts=2, steps=2, point=point)
    found = [(bar.names, bar.first_total) for bar in Bar.made[1:]]
    assert found == [(["ascent direction"], 4), (["eigenvalues"], 4 * 20), (["worst direction"], 4 * 3 * 2)]
    assert Bar.made[1].n == 4 and Bar.made[3].n <= 24


def test_a_report_has_one_bar_that_arrives():
    case = Net()
    report = measure(case.model, case.loss, case.batches, points=3, worst_steps=2, average_directions=2, trace_samples=2)
    (bar,) = Bar.made
    kinds = ["eigenvalues", "worst direction", "ascent direction", "average direction", "trace", "line", "line", "line"]
    assert bar.names == ["sharpness", *(f"sharpness: {kind}" for kind in kinds)]
    assert bar.first_total == 4 * (20 + 1 + 4 * 2 + 1 + 2 + 1 + 9)
    assert bar.n == bar.total == 4 * report.passes and bar.closed


@pytest.mark.parametrize(("shown", "disable"), [(None, None), (True, False)])
def test_a_bar_may_be_forced(shown, disable):
    quadratic([1.0], progress=shown).loss()
    assert [bar.disable for bar in Bar.made] == [disable]


def test_or_be_left_out():
    quadratic([1.0], progress=False).loss()
    assert Bar.made == []


def test_in_a_notebook_nobody_needs_a_terminal(monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", tqdm_notebook)
    quadratic([1.0]).loss()
    assert [bar.disable for bar in Bar.made] == [False]


def test_without_tqdm_there_is_no_bar_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert quadratic([4.0, 1.0]).loss() == 0.0
    with pytest.raises(ModuleNotFoundError) as raised:
        quadratic([1.0], progress=True)
    assert_one_sentence(raised.value, "tqdm", "sam_fused[sharpness]")
    with pytest.raises(TypeError) as raised:
        quadratic([1.0], progress="yes")
    assert_one_sentence(raised.value, "progress", "str")
