"""The example runs as a user runs it, and its probes leave the nets they look at alone."""

import re

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")
torch = pytest.importorskip("torch")

from tests.examples.running import EXAMPLES, run_example  # noqa: E402


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_digits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the example does: two make nets this small slower
    yield train_digits
    torch.set_num_threads(threads)


def bits(model):
    return [(weight.data_ptr(), weight.detach().clone().view(torch.int32)) for weight in model.parameters()]


def assert_untouched(model, before):
    for (address, old), (new_address, new) in zip(before, bits(model), strict=True):
        assert new_address == address
        assert torch.equal(new, old)


def test_smoke_run_prints_the_table_and_writes_the_picture(tmp_path):
    picture = tmp_path / "new_folder" / "digits.png"
    run = run_example("train_digits.py", "--smoke", "--output", str(picture), cwd=tmp_path)
    assert run.returncode == 0, run.stderr

    number = r"(-?\d+\.\d+) ± (\d+\.\d+)"
    rows = {}
    for method in ("SGD", "SAM"):
        # Four cells: test accuracy, validation accuracy, loss rise at rho, seconds.
        row = re.search(rf"{method}\s*│\s*" + r"\s*│\s*".join([number] * 4), run.stdout)
        assert row, run.stdout
        rows[method] = [float(cell) for cell in row.groups()]
        test, _, validation, _, rise, _, seconds, _ = rows[method]
        # Ten classes: chance is 10 %. Five epochs reach 97 %.
        assert 92 < test <= 100
        assert 92 < validation <= 100
        assert rise > 0
        assert seconds > 0
    assert rows["SGD"][4] != rows["SAM"][4], "both rows show the same nets"
    free = re.search(rf"last epoch: {number}", run.stdout)
    assert free, run.stdout
    assert float(free[1]) > 0

    assert picture.stat().st_size > 20_000
    pixels = image.imread(picture)  # [height, width, RGBA]
    assert pixels.shape[:2] == (480, 1560)
    for panel in (pixels[:, :520], pixels[:, 520:1040], pixels[:, 1040:]):
        saturation = panel[..., :3].max(axis=2) - panel[..., :3].min(axis=2)
        assert (saturation > 0.5).sum() > 500, "a panel without coloured curves"


def test_splits_are_disjoint_and_fixed_by_the_seed(example):
    splits = example.load_splits(3)
    assert [len(part.labels) for part in splits] == [1078, 359, 360]
    assert len(splits[0].labels) % example.BATCH_SIZE == 54  # an uneven last batch is part of the example
    rows = [{tuple(row) for row in part.images.flatten(1).tolist()} for part in splits]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    for part, again in zip(splits, example.load_splits(3), strict=True):
        assert torch.equal(part.images, again.images) and torch.equal(part.labels, again.labels)
    assert not torch.equal(splits[0].labels, example.load_splits(4)[0].labels)


def test_direction_has_the_norm_of_every_filter(example):
    net = example.make_net()
    direction = example.filter_normalised_direction(net, seed=7)
    for weight, towards in zip(net.parameters(), direction, strict=True):
        assert towards.shape == weight.shape
        if weight.dim() == 1:
            assert not towards.any()
        else:
            torch.testing.assert_close(towards.flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
    for towards, again in zip(direction, example.filter_normalised_direction(net, seed=7), strict=True):
        assert torch.equal(towards, again)
    assert not torch.equal(direction[0], example.filter_normalised_direction(net, seed=8)[0])


def test_landscape_probe_leaves_the_weights_bit_identical(example):
    net = example.make_net()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = -0.0  # adding the step and taking it away again would turn the sign
    data = example.load_splits(0)[1]
    direction = example.filter_normalised_direction(net, seed=0)
    before = bits(net)
    left, centre, right = example.loss_along(net, data, direction, [-1.0, 0.0, 1.0])
    assert_untouched(net, before)
    assert centre == example.evaluate(net, data)[0]
    assert len({left, centre, right}) == 3, "the probe never moved"


def test_landscape_probe_restores_after_an_exception(example, monkeypatch):
    net = example.make_net()
    before = bits(net)

    def fail(model, data):
        assert not torch.equal(model[0].weight.view(torch.int32), before[0][1])
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        example.loss_along(net, None, example.filter_normalised_direction(net, seed=0), [0.5])
    assert_untouched(net, before)


def test_sharpness_moves_nothing_and_agrees_with_a_hand_made_ascent(example):
    net = example.make_net()
    data = example.load_splits(0)[1]
    before = bits(net)
    rise = example.sharpness(net, data, rho=0.1)
    assert_untouched(net, before)

    weights = list(net.parameters())
    clean = torch.nn.functional.cross_entropy(net(data.images), data.labels)
    gradients = torch.autograd.grad(clean, weights)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight += 0.1 / norm * gradient
    # fp32 losses of about 2.3: their difference carries a few 1e-7 of rounding.
    assert rise == pytest.approx(example.evaluate(net, data)[0] - clean.item(), abs=2e-6)
    assert rise > 0.01
