"""Bad input on a card: one sentence, and nothing written before it."""

import pytest
import torch

from sam_fused import SAM, ops
from sam_fused.ops.prepared import TensorSet
from tests.gpu.problems import DEVICE, Problem

HYPER = {
    "perturb_": [[0.5, 0.0]],
    "restore_sgd_": [[0.1, 0.9, 0.0, 0.0, 0.0, 0.0]],
    "restore_adamw_": [[0.1, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.0, 0.0]],
}


def table(op):
    return torch.tensor(HYPER[op], dtype=torch.float64)


def ones(count=2, device=DEVICE):
    return [torch.ones(4, device=device) for _ in range(count)]


def good(op):
    lists = {"params": ones(), "backups": ones(), "grads": ones()}
    if op == "perturb_":
        return {**lists, "norm": torch.ones((), device=DEVICE), "hyper": table(op)}
    if op == "restore_sgd_":
        return {**lists, "momentum_buffers": ones(), "hyper": table(op)}
    moments = {"exp_avgs": ones(), "exp_avg_sqs": ones(), "max_exp_avg_sqs": []}
    return {**lists, **moments, "steps": [torch.zeros((), device=DEVICE) for _ in range(2)], "hyper": table(op)}


def assert_refused(call, tensors, error, *words):
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(error) as raised:
        call()
    sentence = str(raised.value)
    assert sentence.endswith(".") and "\n" not in sentence and "expected" in sentence and "got" in sentence, sentence
    assert all(word in sentence for word in words), sentence
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


WRONG = {
    "on the CPU": (lambda: torch.ones(4), ValueError, ("cpu", "cuda:0")),
    "sparse": (lambda: torch.ones(4, device=DEVICE).to_sparse(), TypeError, ("strided", "sparse")),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64, device=DEVICE), TypeError, ("float32", "complex64")),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(4, device=DEVICE), 0.1, 0, torch.qint8),
        TypeError,
        ("float32", "qint8"),
    ),
    "of integers": (lambda: torch.ones(4, dtype=torch.int32, device=DEVICE), TypeError, ("float32", "int32")),
    "too short": (lambda: torch.ones(3, device=DEVICE), ValueError, ("(4,)", "(3,)")),
}


@pytest.mark.parametrize("op", HYPER)
@pytest.mark.parametrize(("make", "error", "words"), WRONG.values(), ids=WRONG)
def test_a_gradient_that_cannot_be_read(kernels, op, make, error, words):
    arguments = good(op)
    arguments["grads"][1] = make()
    written = [t for name in ("params", "backups", "momentum_buffers", "exp_avgs") for t in arguments.get(name, [])]
    assert_refused(lambda: getattr(ops, op)(**arguments, backend=kernels), written, error, "grads[1]", *words)


@pytest.mark.parametrize(("make", "error", "words"), WRONG.values(), ids=WRONG)
def test_a_gradient_that_a_set_cannot_read(kernels, make, error, words):
    params, backups = ones(), ones()
    tensors = TensorSet(params, backups, backend=kernels)
    assert_refused(lambda: tensors.checked([ones()[0], make()]), [*params, *backups], error, "gradient 1", *words)


@pytest.mark.parametrize("op", HYPER)
def test_parameters_on_two_devices_in_a_list(kernels, op):
    arguments = good(op)
    arguments["params"][1] = torch.ones(4)
    call = lambda: getattr(ops, op)(**arguments, backend=kernels)  # noqa: E731
    assert_refused(call, [*arguments["params"], *arguments["backups"]], ValueError, "params[1]", "cpu", "cuda:0")


def test_step_counts_on_the_cpu(kernels):
    arguments = good("restore_adamw_")
    arguments["steps"][1] = torch.zeros(())
    call = lambda: ops.restore_adamw_(**arguments, backend=kernels)  # noqa: E731
    assert_refused(call, [*arguments["params"], *arguments["steps"]], ValueError, "steps[1]", "cpu", "cuda:0")


@pytest.mark.parametrize("name", ["norm", "inv_scale"])
def test_a_scalar_on_the_cpu(kernels, name):
    arguments = {**good("perturb_"), name: torch.ones(())}
    call = lambda: ops.perturb_(**arguments, backend=kernels)  # noqa: E731
    assert_refused(call, arguments["params"], ValueError, name, "cpu", "cuda:0")


def test_an_optimizer_over_a_sparse_gradient(kernels):
    problem = Problem("SGD", kernels, shapes=[(4,), (5,)])
    problem.give(problem.first)
    problem.params[1].grad = problem.first[1].to_sparse()
    assert_refused(problem.optimizer.first_step, problem.params, TypeError, "gradient", "sparse")
    problem.step()  # and goes on


def test_an_optimizer_over_unsupported_parameters(kernels):
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        param = torch.nn.Parameter(torch.zeros(4, device=DEVICE).to(dtype), requires_grad=dtype.is_complex)
        with pytest.raises(TypeError, match="expected float32, float64, bfloat16 or float16"):
            SAM([param], torch.optim.SGD, lr=0.1, backend=kernels)


def test_a_loaded_step_count_from_the_cpu_is_moved(kernels):
    """A checkpoint of torch's Adam has its step counts on the CPU: they go to the card once, not every step."""
    problem = Problem("AdamW", kernels)
    problem.step()
    for param in problem.params:
        problem.optimizer.state[param]["step"] = problem.optimizer.state[param]["step"].cpu()
    problem.step()
    steps = [problem.optimizer.state[param]["step"] for param in problem.params]
    assert all(step.is_cuda and float(step) == 2 for step in steps)
