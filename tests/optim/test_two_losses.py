"""Another loss or another batch in the first pass: ``step(closure, ascent_closure=...)``, and Bi-SAM [2407.12993] by it."""

import math

import pytest
import torch
from torch.optim import SGD

from sam_fused import SAM, MicroBatchSAM, bisam_ascent_loss
from tests.optim.helpers import (
    Regression,
    assert_one_sentence,
    assert_same_bits,
    backward_of,
    parameter,
    snapshot,
)
from tests.optim.variants import trained

ABS = 1e-11


def test_two_steps_of_two_losses_by_hand(backend):
    """Perturbed along the gradient of w_1 + 2 w_2: e = .5 (1, 2) / sqrt(5); stepped along that of |w|^2 / 2, which is w + e."""
    w = parameter([3.0, 4.0])
    slopes = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, backend=backend)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for _ in range(2):
        loss = optimizer.step(backward_of(lambda: 0.5 * (w * w).sum()), ascent_closure=backward_of(lambda: (slopes * w).sum()))
        moved = expected + 0.5 * slopes / math.sqrt(5)
        assert loss.item() == pytest.approx(0.5 * (moved**2).sum().item(), abs=ABS)
        expected = expected - 0.1 * moved
        assert w.tolist() == pytest.approx(expected.tolist(), abs=ABS)


@pytest.mark.parametrize("cls", [SAM, MicroBatchSAM])
def test_the_same_loss_twice_is_sam(backend, cls):
    kwargs = {"num_micro_batches": 1} if cls is MicroBatchSAM else {}
    task = Regression(torch.float32)
    optimizer = cls(task.params, SGD, lr=0.1, rho=0.2, backend=backend, **kwargs)
    for _ in range(3):
        optimizer.step(task.evaluate, ascent_closure=task.evaluate)
    assert_same_bits(snapshot(task.params), trained(backend))


def test_each_pass_has_its_batch_and_its_loss(backend):
    """The first pass sees the other half of the data; against both passes by hand."""
    task, by_hand = Regression(torch.float32), Regression(torch.float32)
    optimizer = SAM(task.params, SGD, lr=0.1, rho=0.2, momentum=0.9, backend=backend)
    reference = SAM(by_hand.params, SGD, lr=0.1, rho=0.2, momentum=0.9, backend=backend)

    def on(task, rows, criterion):
        return backward_of(lambda: criterion(task.model(task.x[rows]), task.y[rows]))

    first, second = slice(0, 8), slice(8, 16)
    l1, mse = torch.nn.functional.l1_loss, torch.nn.functional.mse_loss
    for _ in range(3):
        loss = optimizer.step(on(task, second, mse), ascent_closure=on(task, first, l1))
        reference.zero_grad()
        on(by_hand, first, l1)()
        with reference.perturbed():
            expected = on(by_hand, second, mse)()
        reference.step()
        assert torch.equal(loss, expected.detach()) and torch.equal(optimizer.losses.perturbed, loss)
        assert optimizer.losses.rise is None
    assert_same_bits(snapshot(task.params), snapshot(by_hand.params))


def test_two_losses_over_micro_batches_may_be_one_and_the_first_is_not_looked_at(backend):
    """As with SAM: the returned loss is that at w + e, whoever computes it, and the ascent's own is thrown away."""
    found = []
    for cls, count in ((SAM, None), (MicroBatchSAM, 1), (MicroBatchSAM, 2)):
        w = parameter([1.0, 2.0])
        optimizer = cls([w], SGD, lr=0.1, rho=0.5, backend=backend, **({} if count is None else {"num_micro_batches": count}))

        def closure(*_, w=w):
            loss = 0.5 * (w * w).sum()
            loss.backward()
            return loss

        def silent(*_, closure=closure):
            closure()

        batch = () if count is None else (torch.ones(2, device=w.device),)
        for ascent in (closure, silent):
            loss = optimizer.step(closure, *batch, ascent_closure=ascent)
            found.append(loss.item())
            assert optimizer.losses.perturbed.item() == loss.item() and optimizer.losses.rise is None
    length = math.sqrt(5) + 0.5
    assert found[::2] == pytest.approx([0.5 * length**2] * 3, abs=ABS)
    assert found[1::2] == pytest.approx([0.5 * (math.sqrt(5) - 0.1 * length + 0.5) ** 2] * 3, abs=ABS)


def test_two_losses_over_micro_batches(backend):
    task, by_hand = Regression(torch.float32), Regression(torch.float32)
    optimizer = MicroBatchSAM(task.params, SGD, num_micro_batches=2, lr=0.1, rho=0.2, backend=backend)
    reference = MicroBatchSAM(by_hand.params, SGD, num_micro_batches=2, lr=0.1, rho=0.2, backend=backend)

    def over(task, criterion):
        def closure(x, y):
            loss = criterion(task.model(x), y)
            loss.backward()
            return loss

        return closure

    l1, mse = torch.nn.functional.l1_loss, torch.nn.functional.mse_loss
    for _ in range(2):
        loss = optimizer.step(over(task, mse), task.x, task.y, ascent_closure=over(task, l1))
        losses = []
        for rows in (slice(0, 8), slice(8, 16)):
            reference.zero_grad()
            over(by_hand, l1)(by_hand.x[rows], by_hand.y[rows])
            with reference.micro_batch(weight=0.5):
                losses.append(over(by_hand, mse)(by_hand.x[rows], by_hand.y[rows]).item())
        reference.step()
        assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-6)
        assert torch.equal(optimizer.losses.perturbed, loss) and optimizer.losses.clean is None
    assert_same_bits(snapshot(task.params), snapshot(by_hand.params))


@pytest.mark.parametrize("count", [None, 1, 2])
def test_switched_off_the_ascent_closure_is_never_called(count):
    task = Regression()
    kwargs = {} if count is None else {"num_micro_batches": count}
    optimizer = (SAM if count is None else MicroBatchSAM)(task.params, SGD, lr=0.1, **kwargs)
    optimizer.enabled = False
    batch = () if count is None else (task.x, task.y)

    def closure(*rows):
        return task.evaluate()

    def never(*rows):
        raise AssertionError("called")

    loss = optimizer.step(closure, *batch, ascent_closure=never)
    assert task.calls == (count or 1) and loss is not None


def test_an_ascent_closure_without_a_first_pass_is_refused(backend):
    task = Regression()
    optimizer = SAM(task.params, SGD, lr=0.1, backend=backend)
    before = snapshot(task.params)
    for arguments in (
        {"closure": None, "ascent_closure": task.evaluate},
        {"closure": task.evaluate, "ascent_closure": task.evaluate, "first_pass_done": True},
    ):
        with pytest.raises(RuntimeError) as error:
            optimizer.step(**arguments)
        assert_one_sentence(error.value, "ascent_closure")
    assert_same_bits(snapshot(task.params), before)
    task.evaluate()
    with optimizer.perturbed():
        task.evaluate()
    with pytest.raises(RuntimeError) as error:
        optimizer.step(task.evaluate, ascent_closure=task.evaluate)
    assert_one_sentence(error.value, "ascent_closure")
    optimizer.step()
    assert task.calls == 2


def test_the_ascent_loss_of_bisam():
    """Two classes behind by 10 and ahead by 10: tanh(1) and -tanh(1), and phi(0) = 0 of the class itself."""
    logits = torch.tensor([[0.0, 10.0, -10.0]], dtype=torch.float64)
    target = torch.tensor([0])
    t = math.tanh(1.0)
    assert bisam_ascent_loss(logits, target).item() == pytest.approx(math.log(1 + math.exp(t) + math.exp(-t)))
    expected = math.log(1 + math.exp(10 * t) + math.exp(-10 * t)) / 10
    assert bisam_ascent_loss(logits, target, mu=10).item() == pytest.approx(expected)
    gamma = math.log(math.e - 1)
    phi = [1 - math.log(1 + math.exp(gamma - x)) for x in (0.0, 10.0, -10.0)]
    assert phi[0] == pytest.approx(0)
    assert bisam_ascent_loss(logits, target, phi="log").item() == pytest.approx(math.log(sum(map(math.exp, phi))))
    two = bisam_ascent_loss(logits.repeat(2, 1), torch.tensor([0, 1]))
    ahead = [math.tanh(-1), 0, math.tanh(-2)]
    assert two.item() == pytest.approx((math.log(1 + math.exp(t) + math.exp(-t)) + math.log(sum(map(math.exp, ahead)))) / 2)


def test_two_steps_of_bisam_by_hand(backend):
    """Logits w, class 0. phi_j = tanh(.1 (w_j - w_0)), slope_j = softmax(phi)_j .1 (1 - phi_j^2): e is along (-sum, slope_1,
    slope_2), which the cross-entropy's own gradient, (-1, 1, 0) here, is not. Then w - .1 (softmax(w + e) - (1, 0, 0))."""
    w, y = parameter([[0.0, 10.0, -10.0]]), torch.tensor([0])
    optimizer = SAM([w], SGD, lr=0.1, rho=0.5, backend=backend)
    cross_entropy = torch.nn.functional.cross_entropy

    def softmax(values):
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]

    expected = [0.0, 10.0, -10.0]
    for _ in range(2):
        optimizer.step(backward_of(lambda: cross_entropy(w, y)), ascent_closure=backward_of(lambda: bisam_ascent_loss(w, y)))
        phi = [math.tanh(0.1 * (value - expected[0])) for value in expected]
        slopes = [share * 0.1 * (1 - own**2) for share, own in zip(softmax(phi), phi, strict=True)]
        direction = [-slopes[1] - slopes[2], slopes[1], slopes[2]]
        moved = [value + 0.5 * d / math.hypot(*direction) for value, d in zip(expected, direction, strict=True)]
        shares = softmax(moved)
        expected = [value - 0.1 * (s - (j == 0)) for j, (value, s) in enumerate(zip(expected, shares, strict=True))]
        assert w[0].tolist() == pytest.approx(expected, abs=ABS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bisam_of_half_logits_is_computed_in_fp32(dtype):
    logits, y = torch.randn(4, 100).to(dtype).requires_grad_(), torch.arange(4)
    loss = bisam_ascent_loss(logits, y)
    exact = bisam_ascent_loss(logits.detach().double(), y)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert logits.grad.dtype == dtype and logits.grad.abs().max() > 0
    extreme = torch.tensor([[60000.0, -60000.0]]).to(dtype)
    assert bisam_ascent_loss(extreme, torch.tensor([1]), mu=10).item() == pytest.approx(
        math.log(1 + math.exp(10)) / 10, rel=1e-4
    )


def test_bisam_descends_the_cross_entropy(backend):
    """The two passes of a step on a linear layer, against autograd's own gradients."""
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3).double()
    mirror = torch.nn.Linear(4, 3).double()
    mirror.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    optimizer = SAM(model.parameters(), SGD, lr=0.1, rho=0.5, backend=backend)
    cross_entropy = torch.nn.functional.cross_entropy
    for _ in range(2):
        optimizer.step(
            backward_of(lambda: cross_entropy(model(x), y)), ascent_closure=backward_of(lambda: bisam_ascent_loss(model(x), y))
        )
        params = list(mirror.parameters())
        ascent = torch.autograd.grad(bisam_ascent_loss(mirror(x), y), params)
        norm = torch.cat([g.flatten() for g in ascent]).norm()
        moved = [(p + 0.5 * g / norm).detach().requires_grad_() for p, g in zip(params, ascent, strict=True)]
        descent = torch.autograd.grad(cross_entropy(torch.nn.functional.linear(x, *moved), y), moved)
        with torch.no_grad():
            for p, g in zip(params, descent, strict=True):
                p.sub_(0.1 * g)
    for ours, theirs in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"phi": "sigmoid"}, ("phi", "tanh, log", "sigmoid")),
        ({"mu": 0.0}, ("mu", "0.0")),
        ({"alpha": math.inf}, ("alpha", "inf")),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ("logits", "[samples, classes]")),
        ({"targets": torch.zeros(2)}, ("targets", "int64", "float32")),
        ({"targets": [0, 1]}, ("targets", "list")),
        ({"logits": "x"}, ("logits", "str")),
    ],
)
def test_bad_input_of_the_bisam_loss(arguments, words):
    with pytest.raises((ValueError, TypeError)) as error:
        bisam_ascent_loss(**{"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.int64), **arguments})
    assert_one_sentence(error.value, *words)
