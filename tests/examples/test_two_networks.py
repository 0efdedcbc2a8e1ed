"""The example runs as a user runs it, in both of its forms, and what it prints about the samples is so."""

import re
import sys

import pytest

pytest.importorskip("rich")
torch = pytest.importorskip("torch")

from tests.examples.running import EXAMPLES, run_example  # noqa: E402


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import two_networks

    torch.set_num_threads(1)  # as the example does: two make nets this small slower
    return two_networks


def options(example, **changes):
    return example.Options(**{"steps": 5, "lr": 2e-3, "rho": 0.05, "functions": False, **changes})


def sam_of(example, form):
    return {"optimizer": example.sam_step, "functions": example.sam_step_with_functions}[form]


def weights_of(*nets):
    return [weight.detach().clone() for net in nets for weight in net.parameters()]


def test_small_run_prints_the_table_and_a_verdict(tmp_path):
    run = run_example("two_networks.py", "--seeds", "2", "--steps", "100", cwd=tmp_path)
    assert run.returncode == 0, run.stderr

    number = r"(-?\d+\.\d+) ± (\d+\.\d+)"
    rows = {}
    for method in ("Adam", "Adam, 2x steps", "SAM"):
        # Three cells: modes covered, samples in a mode, seconds.
        row = re.search(rf"│ {method}\s*│\s*" + r"\s*│\s*".join([number] * 3), run.stdout)
        assert row, run.stdout
        rows[method] = [float(cell) for cell in row.groups()]
        covered, _, quality, _, seconds, _ = rows[method]
        assert 0 <= covered <= 8 and 0 <= quality <= 100 and seconds > 0
    assert rows["SAM"][:4] != rows["Adam"][:4], "SAM's row is Adam's"
    gap = re.search(r"samples in a mode, %: ([+-]\d+\.\d+) ± \d+\.\d+, too few seeds to tell", run.stdout)
    assert gap, run.stdout
    assert float(gap[1]) == pytest.approx(rows["SAM"][2] - rows["Adam, 2x steps"][2], abs=0.11)


@pytest.mark.parametrize("flags", [[], ["--functions"]], ids=["optimizer", "functions"])
def test_the_flag_chooses_the_form_and_both_end_in_a_table(example, monkeypatch, capsys, flags):
    used = []
    for name in ("sam_step", "sam_step_with_functions"):
        make = getattr(example, name)
        monkeypatch.setattr(example, name, lambda *arguments, make=make, name=name: used.append(name) or make(*arguments))
    in_this_process = lambda seeds, options: [example.train(m, s, options) for s in range(seeds) for m in example.METHODS]  # noqa: E731
    monkeypatch.setattr(example, "train_all", in_this_process)
    monkeypatch.setattr(sys, "argv", ["two_networks.py", "--seeds", "1", "--steps", "3", *flags])
    example.main()
    assert used == ["sam_step_with_functions" if flags else "sam_step"] * 2  # two networks
    assert "│ SAM" in capsys.readouterr().out


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_the_ring_has_eight_modes_and_its_own_samples_belong_to_them(example):
    centres = example.centres()
    torch.testing.assert_close(centres.norm(dim=1), torch.full((8,), 2.0))
    assert torch.pdist(centres).min().item() > 2 * 3 * example.SPREAD, "modes overlap: a sample would belong to two"
    covered, quality = example.judge(example.draw_ring(4000))
    assert covered == 8
    assert quality == pytest.approx(1 - 0.0111, abs=0.006)  # 1 - exp(-9/2) of a plane Gaussian lies within three deviations


def test_judge_counts_modes_and_samples(example):
    centres = example.centres()
    samples = torch.cat([centres[:3].repeat(20, 1), centres[3:4], torch.zeros(39, 2)])  # 60 in three modes, 1 in a fourth
    assert example.judge(samples) == (4, pytest.approx(0.61))
    many = torch.cat([samples, torch.zeros(100, 2)])
    assert example.judge(many) == (3, pytest.approx(61 / 200))  # one in two hundred is no covered mode
    edge = centres[:1] + torch.tensor([[3 * example.SPREAD + 0.01, 0.0]])
    assert example.judge(edge) == (0, 0.0)
    assert example.judge(torch.zeros(10, 2)) == (0, 0.0)


def runs_of(example, sam, adam):
    """Runs in which eight modes were covered, with these per cent of the samples."""
    rows = [("SAM", sam), ("Adam, 2x steps", adam)]
    return [example.Run(method, 8, value / 100, 1.0) for method, values in rows for value in values]


def test_the_verdict_says_whichever_way_it_came_out(example):
    better = example.verdict(runs_of(example, [90, 91, 92, 93], [80, 82, 81, 83]))
    assert "samples in a mode, %: +10.00 ± 0.41, SAM is better" in better
    assert "modes covered: +0.00 ± 0.00, no clear difference" in better
    assert "-10.00 ± 0.41, SAM is worse" in example.verdict(runs_of(example, [80, 82, 81, 83], [90, 91, 92, 93]))
    assert "+2.50 ± 1.44, no clear difference" in example.verdict(runs_of(example, [90, 80, 90, 80], [90, 80, 85, 75]))
    assert "+9.00 ± 1.00, too few seeds to tell" in example.verdict(runs_of(example, [90, 90], [80, 82]))


# ---- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["optimizer", "functions"])
def test_a_step_perturbs_its_own_network_by_rho_and_no_other(example, form):
    mine, other = example.make_net(3, 2), example.make_net(2, 1)
    x, seen = torch.randn(32, 3), []

    def loss():
        seen.append((weights_of(mine), weights_of(other)))
        return other(mine(x)).exp().mean()

    step = sam_of(example, form)(mine, options(example, rho=0.3))
    for _ in range(2):
        seen.clear()
        before = weights_of(mine), weights_of(other)
        step(loss)
        (clean, other_clean), (sharp, other_sharp) = seen
        for expected, actual in zip((*before[0], *before[1], *before[1]), (*clean, *other_clean, *other_sharp), strict=True):
            assert torch.equal(expected, actual)
        distance = torch.stack([(a - b).norm() for a, b in zip(clean, sharp, strict=True)]).norm()
        assert distance.item() == pytest.approx(0.3, rel=1e-4)
        after = weights_of(mine)
        # Adam's step is about lr for every weight that has a gradient: from the clean weights, not from the perturbed ones.
        assert 0 < max((a - b).abs().max().item() for a, b in zip(clean, after, strict=True)) < 0.01


def test_both_forms_take_the_same_step_and_adam_takes_another(example):
    x = torch.randn(32, 3)
    ends = {}
    for form in ("optimizer", "functions", "adam"):
        torch.manual_seed(5)
        net, other = example.make_net(3, 2), example.make_net(2, 1)
        step = (example.adam_step if form == "adam" else sam_of(example, form))(net, options(example, rho=0.3))
        for _ in range(3):
            step(lambda: other(net(x)).exp().mean())  # noqa: B023
        ends[form] = weights_of(net)
    # Adam divides by the gradient's size: where that is tiny, the last digits of two ways of computing it show.
    torch.testing.assert_close(ends["optimizer"], ends["functions"], rtol=1e-4, atol=2e-6)
    assert max((a - b).abs().max().item() for a, b in zip(ends["optimizer"], ends["adam"], strict=True)) > 1e-4


@pytest.mark.parametrize("functions", [False, True])
def test_a_run_is_fixed_by_its_seed(example, functions):
    runs = [example.train("SAM", seed, options(example, steps=30, functions=functions)) for seed in (1, 1, 2)]
    assert runs[0][:3] == runs[1][:3]
    assert runs[0].quality != runs[2].quality or runs[0].covered != runs[2].covered


def test_only_adam_in_twice_the_steps_takes_twice_the_steps(example, monkeypatch):
    counts = {}
    for method in example.METHODS:
        taken = []
        monkeypatch.setattr(example, "step_of", lambda *_, taken=taken: lambda loss: taken.append(loss().item()))
        example.train(method, 0, options(example))
        counts[method] = len(taken)
    assert counts == {"Adam": 10, "Adam, 2x steps": 20, "SAM": 10}
