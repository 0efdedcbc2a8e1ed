"""The current stream of the right device, and one norm over two."""

import pytest
import torch

from sam_fused import SAM
from tests.gpu.problems import BASES, DEVICE, Problem, values


def busy(milliseconds=50):
    """Keeps the current stream's device waiting for about so long, at 1 to 2 GHz, before what is launched next begins."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.parametrize("base", BASES)
def test_a_side_stream_alone_is_used(kernels, base):
    """The gradients are written late on a side stream: only a step in that stream's order reads them, and the stream's own
    synchronisation is enough for the results."""
    side, plain = Problem(base, kernels), Problem(base, kernels)
    for problem in (side, plain):
        problem.step()
        problem.renew(7)
    wanted_first, wanted_second = ([g.clone() for g in grads] for grads in (side.first, side.second))
    plain.step()
    stream = torch.cuda.Stream()
    for grad in (*side.first, *side.second):
        grad.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        for grads, wanted in ((side.first, wanted_first), (side.second, wanted_second)):
            for grad, value in zip(grads, wanted, strict=True):
                grad.copy_(value)
        side.step()
        found = [tensor.detach().clone() for tensor in side.state()]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, plain.state(), strict=True))


def test_tables_made_on_one_stream_serve_another(kernels):
    """A set keeps device memory; it was written on another stream than it is read on."""
    moving, plain = Problem("SGD", kernels), Problem("SGD", kernels)
    for number in range(4):
        for problem in (moving, plain):
            problem.renew(number + 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            moving.step()
        torch.cuda.current_stream().wait_stream(stream)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(moving.state(), plain.state(), strict=True))


def test_a_device_that_is_not_current(kernels, two_devices):
    """Parameters on the second card while the first is current: launched there, and the first stays current."""
    first, second = two_devices
    there, here = Problem("AdamW", kernels, device=second), Problem("AdamW", kernels, device=first)
    with torch.cuda.device(first):
        for _ in range(3):
            there.step()
            here.step()
        assert torch.cuda.current_device() == first.index
    torch.cuda.synchronize(second)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(there.state(), here.state(), strict=True))


def test_one_norm_over_two_devices(kernels, two_devices):
    """||(3, 4)|| = 5 with the 3 on one card and the 4 on the other."""
    params = [torch.nn.Parameter(torch.zeros(1, device=device)) for device in two_devices]
    optimizer = SAM(params, torch.optim.SGD, rho=1.0, lr=0.1, perturb_eps=0.0, backend=kernels)
    for param, value in zip(params, (3.0, 4.0), strict=True):
        param.grad = torch.full((1,), value, device=param.device)
    with optimizer.perturbed():
        assert [float(param) for param in params] == pytest.approx([0.6, 0.8])
        for param in params:
            param.grad = torch.ones(1, device=param.device)
    optimizer.step()
    assert [float(param) for param in params] == pytest.approx([-0.1, -0.1])


def test_parameters_on_the_cpu_and_on_a_card():
    """One norm over both, each by its own device's kernels."""
    params = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1, device=DEVICE))]
    optimizer = SAM(params, torch.optim.SGD, rho=1.0, lr=0.1, perturb_eps=0.0)
    for param, value in zip(params, (3.0, 4.0), strict=True):
        param.grad = torch.full((1,), value, device=param.device)
    with optimizer.perturbed():
        assert [float(param) for param in params] == pytest.approx([0.6, 0.8])


def test_a_set_beyond_two_to_the_31_elements(kernels):
    """bf16: 2^31 + 17 elements are 4.3 GB; the last one is perturbed like the first."""
    from sam_fused import ops

    count = 2**31 + 17
    needed = 3 * 2 * count
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    w, backup, grad = (torch.zeros(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    grad[-1] = 2.0
    hyper = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    norm, _ = ops.grad_norm([grad], backend=kernels)
    ops.perturb_([w], [backup], [grad], norm, hyper, backend=kernels)
    assert float(norm) == 2.0 and float(w[-1]) == 1.0 and float(w[0]) == 0.0
    ops.restore_([w], [backup], backend=kernels)
    assert float(w[-1]) == 0.0


def test_values_are_what_the_cpu_draws():
    """Two devices are compared by the numbers they start from."""
    assert all(torch.equal(a.cpu(), b) for a, b in zip(values(), values(device="cpu"), strict=True))
