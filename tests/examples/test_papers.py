"""The reproductions run as a user runs them, in short, and bear out what they print; what they measure with is right."""

import json
import math

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from tests.examples.running import run_example  # noqa: E402
from tests.optim.test_micro_batch_papers import SignalAndNoise  # noqa: E402

pytestmark = pytest.mark.cpu_only
# Two processes of a reproduction, beside another test's: on two cores that takes longer than tests are given.
minutes = pytest.mark.timeout(400)


def smoke(name, folder):
    """What `--smoke` wrote down; every claim was printed with its verdict, and holds."""
    run = run_example(f"papers/{name}.py", "--smoke", "--output", str(folder), cwd=folder, timeout=380)
    assert run.returncode == 0, run.stderr
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert [claim["text"] for claim in record["claims"] if not claim["holds"]] == []
    printed = run.stdout.splitlines()
    for claim in [*record["claims"], *record["reported"]]:
        assert f"{'' if claim['holds'] else 'not '}reproduced: {claim['text']} ({claim['margin']})" in printed
    assert len(record["claims"]) > 1 and (folder / f"{name}.png").stat().st_size > 10_000
    return record["results"]


# ---- where SAM ends --------------------------------------------------------------------------------------------------


@minutes
@pytest.mark.slow
def test_each_method_ends_at_the_sharpness_it_minimises(tmp_path):
    """SAM for mSAM, or a perturbation left out, ends somewhere else."""
    results = smoke("toy_surfaces", tmp_path)
    runs = {run["method"]: run for run in results["runs"]}
    assert runs["gradient descent"]["end"] == pytest.approx([0.539, 0.493, 0, 0], abs=1e-3)
    assert runs["SAM, full batch"]["end"][:2] == pytest.approx([0, 0], abs=1e-3)
    assert abs(runs["SAM, full batch"]["end"][2]) == pytest.approx(0.025, abs=1e-3)
    assert runs["mSAM, m = |B|"]["end"][:2] == pytest.approx([0.7892, 0.1338], abs=5e-4)
    assert runs["SAM, batch of 1"]["tail"][:2] == pytest.approx([0.8, 1 / 7], abs=0.1)
    assert (tmp_path / "toy_surfaces.png").stat().st_size > 20_000


def test_a_quadratic_ends_in_the_papers_cycle(script):
    toy = script("toy_surfaces")
    assert toy.cycle_length() == pytest.approx(0.0125, abs=1e-15)
    paths = [toy.descend_quadratic([0.3, -0.7])]
    assert all(claim.holds for claim in toy.check_quadratic(paths))
    half_as_long = [[[x / 2 for x in point] for point in path] for path in paths]
    assert [claim.holds for claim in toy.check_quadratic(half_as_long)] == [False, True]
    without_a_flip = [[*path[:-1], [-x for x in path[-1]]] for path in paths]
    assert [claim.holds for claim in toy.check_quadratic(without_a_flip)] == [True, False]


def test_gradient_descent_passes_for_no_kind_of_sam(script, monkeypatch):
    toy = script("toy_surfaces")
    monkeypatch.setitem(toy.SETTINGS, "gradient descent", toy.SETTINGS["gradient descent"]._replace(steps=500))
    run = toy.descend("gradient descent", [0.5, 0.5, 0.3, 0.3], seed=0)
    claims = toy.check_surface([run._replace(method=method) for method in toy.SETTINGS])
    assert [claim.holds for claim in claims] == [True, False, False, False, False]


def test_the_angle_to_the_top_eigenvector(script):
    """On the floor's axes the eigenvectors are the axes': along x_3 with F_1 = 8 > F_2 = 6, across it along x_4."""
    toy = script("toy_surfaces")
    point = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    assert toy.misalignment(point(0, 0, 1e-6, 0)) < 1e-15
    assert toy.misalignment(point(0, 0, 0, 1e-6)) == pytest.approx(1, abs=1e-9)
    assert toy.misalignment(point(0, 0, 8e-6, 8e-6)) == pytest.approx(1 - 0.8, abs=1e-9)  # the gradient is (8, 6) * 8e-6
    assert math.isnan(toy.misalignment(point(0, 0, 0, 0)))


def test_the_expected_end_tends_to_the_least_trace(script):
    toy = script("toy_surfaces")
    assert toy.minimiser_at(lr=1e-9, share=0.5) == pytest.approx(toy.TRACE_MINIMISER, abs=1e-8)
    assert toy.minimiser_at(lr=0.01, share=0.5) == pytest.approx((0.7886, 0.1345), abs=1e-4)  # rho 0.1 after 1e6 steps


# ---- signal and noise ------------------------------------------------------------------------------------------------


@minutes
@pytest.mark.slow
def test_sgd_learns_the_noise_and_more_perturbations_more_of_the_signal(tmp_path):
    """Two seeds. mSAM 5 with the mini-batch's perturbation is SAM, 0.7; without any it is SGD, 0.5."""
    results = smoke("signal_and_noise", tmp_path)
    accuracy = {method: [run["accuracy"] for run in results["cell"] if run["method"] == method] for method in COLOURS}
    assert all(0.42 < value < 0.58 for value in accuracy["SGD"])
    assert all(0.6 < value < 0.8 for value in accuracy["SAM"])
    assert all(0.8 < value < 1.0 for value in accuracy["mSAM 5"])
    sam, sgd = results["matched"]["SAM"][:2]
    assert (sam["method"], sgd["method"]) == ("SAM", "SGD")
    assert 0 < sgd["loss"] <= sam["loss"] and sgd["steps"] < 40 and sam["steps"] == 300
    assert len(results["grid"]) == 2 * 2 * 3


COLOURS = ("SGD", "SAM", "mSAM 5")


@pytest.mark.parametrize(("method", "micro_batches"), [("SAM", 0), ("mSAM 5", 5)])
def test_data_and_net_are_those_of_the_optimizers_test(script, method, micro_batches):
    from torch.optim import SGD

    from sam_fused import SAM, MicroBatchSAM

    task = SignalAndNoise(seed=1, dimension=500, mu=0.5)
    settings = {"num_micro_batches": micro_batches} if micro_batches else {}
    task.train((MicroBatchSAM if micro_batches else SAM)([task.w], SGD, lr=0.01, rho=0.03, **settings))
    example = script("signal_and_noise")
    run = example.train(method, seed=1, dimension=500, strength=0.5)
    assert run.accuracy == task.accuracy()
    assert run.loss == example.loss_of(task.w, example.Data(task.x, task.y, place=None)).item()
    assert len(run.on_noise) == len(run.on_signal) == 101


def test_a_run_stops_at_the_first_step_that_is_at_the_loss(script):
    example = script("signal_and_noise")
    one = example.train("SGD", seed=0, dimension=500, strength=1.0, stop_at_loss=0.55)
    next_one = example.train("SGD", seed=0, dimension=500, strength=1.0, stop_at_loss=0.999 * one.loss)
    assert one.loss <= 0.55 and next_one.loss <= 0.999 * one.loss
    assert next_one.steps == one.steps + 1 < 200  # so that one of them stops inside an epoch, of two steps


def test_a_benign_region_that_is_not_on_the_grid_is_not_seen_to_move(script):
    example = script("signal_and_noise")

    def verdict(sgd, sam):
        grid = []
        for method, accuracies in zip(COLOURS, (sgd, sam, sam), strict=True):
            for strength, accuracy in enumerate(accuracies):
                grid.append(example.Run(method, 0, 500, float(strength), 0.0, 1, 0.5, accuracy, [0.0], [0.0]))
        return example.check_region(grid).holds

    assert verdict(sgd=(0.5, 0.6, 1.0), sam=(0.6, 1.0, 1.0))
    assert not verdict(sgd=(0.5, 0.6, 0.7), sam=(0.6, 1.0, 1.0))
    assert not verdict(sgd=(0.5, 0.6, 1.0), sam=(0.6, 0.7, 1.0))
    assert not verdict(sgd=(0.5, 0.6, 1.0), sam=(1.0, 1.0, 0.9))


def test_activations_are_those_of_the_right_patch_and_sign(script):
    example = script("signal_and_noise")
    generator = torch.Generator().manual_seed(0)
    data = example.draw(20, 50, 2.0, 0.0, generator)
    filters = torch.zeros(2, example.FILTERS, 50)
    filters[0, :, 0], filters[1, :, 0] = 3.0, -1.0  # both signs' filters along their own signal, and on no noise
    on_noise, on_signal = example.activations(filters, data)
    positive = (data.y > 0).double().mean().item()
    assert on_noise == 0
    assert on_signal == pytest.approx(2 * (3 * positive + (1 - positive)))
    assert example.accuracy_of(filters, data) == 1


def test_flipped_labels_leave_the_patches_as_they_are(script):
    example = script("signal_and_noise")
    clean, flipped = (example.draw(1000, 5, 1.0, flips, torch.Generator().manual_seed(0)) for flips in (0.0, 0.1))
    assert torch.equal(clean.x, flipped.x) and torch.equal(clean.place, flipped.place)
    assert (clean.y != flipped.y).double().mean().item() == pytest.approx(0.1, abs=0.03)


# ---- diagonal nets ---------------------------------------------------------------------------------------------------


@minutes
@pytest.mark.slow
def test_one_perturbation_per_example_finds_the_sparser_solution(tmp_path):
    """Two seeds, 250 steps. Normalised or full-batch perturbations come nowhere near."""
    results = smoke("diagonal_nets", tmp_path)
    losses = {(run["method"]["name"], run["method"]["rho"]): [] for run in results}
    for run in results:
        losses[run["method"]["name"], run["method"]["rho"]].append(run["ends"][-1]["test_loss"])
    best_full_batch = [min(seed) for seed in zip(*(v for k, v in losses.items() if "full batch" in k[0]), strict=True)]
    for seed, per_example in enumerate(losses["SAM per example", 0.3]):
        assert per_example < 0.5 * losses["gradient descent", 0.0][seed]
        assert per_example < 0.5 * best_full_batch[seed]


def test_a_step_per_example_is_the_papers(script):
    """u - lr mean_i grad l_i(u + rho grad_u l_i, v + rho grad_v l_i), by hand; two steps, as v = 0 hides half of the first."""
    example = script("diagonal_nets")
    method, (x, y, _) = example.PER_EXAMPLE[-1], example.draw(seed=3)
    net = torch.nn.Parameter(torch.full((2, example.DIMENSION), 0.1, dtype=torch.float64))
    u, v = net.detach().clone()
    step = example.make_step(method, net, x, y)
    for _ in range(2):
        step()
        slope = x * (x @ (u * v) - y)[:, None]  # [example, dimension], of l_i by the product u v
        near_u, near_v = u + method.rho * slope * v, v + method.rho * slope * u
        slope = x * ((x * near_u * near_v).sum(dim=1) - y)[:, None]
        u, v = u - example.LR * (slope * near_v).mean(dim=0), v - example.LR * (slope * near_u).mean(dim=0)
    torch.testing.assert_close(net.detach(), torch.stack([u, v]), rtol=1e-12, atol=1e-14)


def test_counts_are_over_the_seeds_that_went_as_far(script):
    """Four seeds to step 10, one of them to step 30. Per example lower in three of four, and in the one."""
    example = script("diagonal_nets")
    runs = []
    for seed, per_example in enumerate((0.1, 0.2, 0.3, 5.0)):
        for method in example.METHODS:
            loss = per_example if method in example.PER_EXAMPLE else 1.0 + method.rho
            ends = [example.End(step, loss, 0.5 if loss > 4 else 0.0, 0.0) for step in ((10, 30) if seed == 0 else (10,))]
            runs.append(example.Run(method, seed, ends, [1], [loss]))
    main = example.check(runs)
    assert [claim.holds for claim in main] == [True] * 4
    assert [claim.margin.partition(";")[0] for claim in main] == ["in 1 of 1", "in 1 of 1", "in 3 of 4", "in 3 of 4"]
    assert [claim.holds for claim in example.report(runs)] == [True] * 4 + [False] * 6
    assert [len(table.rows[0]) for table in example.tables(runs)] == [6, 6, 2]


def test_a_run_notes_what_the_net_is_at_each_stop(script):
    example = script("diagonal_nets")
    both, shorter = (example.train(example.DESCENT, 0, stops) for stops in ((20, 60), (20,)))
    assert [end.step for end in both.ends] == [20, 60] and both.ends[:1] == shorter.ends
    assert both.ends[1].test_loss == pytest.approx(both.test_losses[-1], rel=1e-3)


def test_the_target_is_sparse_and_the_data_fit_it(script):
    example = script("diagonal_nets")
    x, y, target = example.draw(seed=0)
    assert x.shape == (20, 30) and target.norm().item() == pytest.approx(1) and (target != 0).sum() == 3
    solution = torch.stack([target, torch.ones_like(target)])
    assert example.half_squared_error(solution, x, y).item() < 1e-28


# ---- SAM late, and adversarial training late --------------------------------------------------------------------------


@minutes
@pytest.mark.slow
def test_sam_late_does_most_of_what_sam_does_and_sam_early_does_not(tmp_path):
    """Digits, two seeds, all epochs. A switch that came early, or never, fails one of the bounds."""
    results = smoke("late_sam", tmp_path)
    runs = {(run["method"], run["seed"]): run for run in results}
    assert len(runs) == 8
    for seed in range(2):
        sgd, sam, late, early = (
            runs[method, seed]["eigenvalue"] for method in ("SGD", "SAM", "SAM, last quarter", "SAM, first quarter")
        )
        assert sam < late < early < sgd
        assert runs["SGD", seed]["line"] == [runs["SGD", seed]["train_loss"]] * 21
        assert runs["SAM", seed]["line"][-1] == pytest.approx(runs["SAM", seed]["train_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "calls"), [({"start": 1.0}, 44), ({}, 88), ({"start": 0.75}, 55), ({"stop": 0.25}, 55), ({"cosine": True}, 88)]
)
def test_late_and_early_have_the_same_budget(script, monkeypatch, recipe, calls):
    """Gradients of four epochs of eleven steps: SAM's quarter is eleven more, wherever it is."""
    training = script("training")
    counted = []
    loss = training.smoothed_loss
    monkeypatch.setattr(training, "smoothed_loss", lambda *batch: counted.append(batch) or loss(*batch))
    training.train("digits", training.Recipe(**recipe), seed=0, epochs=4)
    assert len(counted) == calls


def test_nets_of_a_seed_are_the_same_up_to_the_switch(script):
    """Of four epochs three: the last quarter is SGD's run until then, and another seed is another net."""
    training = script("training")
    three = training.train("digits", training.NEVER, seed=0, epochs=3)
    switched_at_the_end = training.train("digits", training.Recipe(start=1.0), seed=0, epochs=3)
    other = training.train("digits", training.NEVER, seed=1, epochs=3)
    for a, b, c in zip(three.parameters(), switched_at_the_end.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_verdicts_on_late_sam_are_worked_out(script):
    """One run that bears every claim out, and for each claim one that does not."""
    late_sam = script("late_sam")
    setting = late_sam.SETTINGS[0]

    def verdicts(sgd=8.0, sam=2.0, late=3.0, early=6.0, barrier=0.0, elsewhere=0.3):
        runs = []
        for method, value in zip(late_sam.METHODS, (sgd, sam, late, early), strict=True):
            rise = {late_sam.LATE: barrier, late_sam.SAM: elsewhere}.get(method, 0.0)
            for seed in range(3):
                line = (0.5, 0.5 + rise, 0.5)
                runs.append(late_sam.Run(setting, method, seed, 0.0, 0.0, 0.5, value + 0.1 * seed, line))
        return [claim.holds for claim in late_sam.check(runs)]

    assert verdicts() == [True] * 5
    assert verdicts(sam=7.9, late=7.9, early=8.0)[0] is False
    assert verdicts(late=4.0) == [True, False, True, True, True]
    assert verdicts(early=4.0) == [True, True, False, True, True]
    assert verdicts(barrier=0.1) == [True, True, True, False, True]
    assert verdicts(elsewhere=0.01) == [True, True, True, True, False]


@minutes
@pytest.mark.slow
def test_adversarial_training_late_does_most_of_what_it_does(tmp_path):
    """Two seeds. An attack that did not move the images would leave all of them at the clean net's accuracy."""
    results = smoke("late_adversarial", tmp_path)
    clean, quarter, always = (
        sum(run["robust_accuracy"] for run in results if run["method"] == method) / 2
        for method in ("clean", "last quarter", "always")
    )
    assert 0.4 < clean < 0.65 and 0.8 < always < 0.92
    assert 0.8 <= (quarter - clean) / (always - clean) < 1.1
    assert all(run["clean_accuracy"] > 0.95 and run["epochs"] == list(range(3, 61, 3)) for run in results)


def test_lost_accuracy_on_clean_images_is_said_to_be_lost(script):
    example = script("late_adversarial")

    def verdicts(last):
        accuracies = dict.fromkeys(example.METHODS, 0.98) | {"last sixteenth": last}
        runs = [example.Run(m, seed, 0.5, clean + 0.001 * seed, [], []) for m, clean in accuracies.items() for seed in range(3)]
        return [claim.holds for claim in example.report(runs)]

    assert verdicts(last=0.98) == [True] * 3
    assert verdicts(last=0.97) == [False, True, True]


def test_the_attack_stays_within_its_radius_and_raises_the_loss(script):
    adversarial, training = script("late_adversarial"), script("training")
    data = training.digits()
    net = training.train("digits", training.NEVER, seed=0, epochs=20)
    before = [p.detach().clone() for p in net.parameters()]
    inputs, labels = data.test_inputs[:50], data.test_labels[:50]
    attacked = adversarial.attack(net, inputs, labels, torch.Generator().manual_seed(0))
    assert (attacked - inputs).abs().max().item() == pytest.approx(adversarial.RADIUS, abs=1e-6)
    assert attacked.min() >= 0 and attacked.max() <= 1
    with torch.no_grad():
        clean, worse = (training.smoothed_loss(net, x, labels).item() for x in (inputs, attacked))
        noise = (inputs + adversarial.RADIUS * (2 * torch.rand(inputs.shape) - 1)).clamp(0, 1)
        assert worse > clean + 0.3 > training.smoothed_loss(net, noise, labels).item() + 0.1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())


# ---- micro-batches ----------------------------------------------------------------------------------------------------


@minutes
@pytest.mark.slow
def test_micro_batch_sam_is_flatter_and_better_than_sgd(tmp_path):
    """mnist1d, three seeds, SGD and mSAM 2: by two standard errors in test error and top eigenvalue."""
    results = smoke("micro_batches", tmp_path)
    errors = {method: [run["test_error"] for run in results if run["method"] == method] for method in ("SGD", "mSAM 2")}
    assert all(own < sgd for own, sgd in zip(errors["mSAM 2"], errors["SGD"], strict=True)) and all(
        3 < value < 7 for value in errors["SGD"]
    )


def test_data_and_nets_are_of_the_size_that_is_written(script):
    training = script("training")
    mnist1d, digits = training.mnist1d(), training.digits()
    assert [len(part) for part in mnist1d] == [4000, 4000, 10000, 10000] and mnist1d.inputs.shape[1:] == (1, 40)
    assert [len(part) for part in digits] == [1078, 1078, 719, 719] and digits.inputs.shape[1:] == (1, 8, 8)
    assert digits.inputs.min() == 0 and digits.inputs.max() == 1
    sizes = [sum(p.numel() for p in task.make_net().parameters()) for task in training.TASKS.values()]
    assert sizes == [5210, 11810]
