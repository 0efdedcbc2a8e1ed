"""Bad input: one sentence that names the argument, what was expected and what came, and nothing written before it."""

import pytest
import torch

from sam_fused import ops
from sam_fused.ops import schema
from tests.devices import default
from tests.ops.runner import table

HERE = str(default())
PERTURB, SGD = [0.05, 1e-12], [0.1, 0.9, 0.0, 0.0, 0.0, 0.0]
ADAM = [0.01, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0, 0.0]


def good(op):
    """Arguments of ``op`` that work, over two parameters."""

    def two(value=1.0):
        return [torch.full((3,), value), torch.full((2, 2), value)]

    arguments = {
        "grad_norm": {"grads": two(), "params": two(), "scaling": [1, 1]},
        "perturb_": {
            "params": two(), "backups": two(5.0), "grads": two(), "norm": torch.tensor(1.0), "hyper": table([PERTURB]),
        },
        "restore_": {"params": two(), "backups": two(5.0)},
        "restore_accumulate_": {
            "params": two(), "backups": two(5.0), "grads": two(), "accumulators": two(), "weight": torch.tensor(0.5),
        },
        "restore_sgd_": {
            "params": two(), "backups": two(5.0), "grads": two(), "momentum_buffers": two(), "hyper": table([SGD]),
        },
        "restore_adamw_": {
            "params": two(), "backups": two(5.0), "grads": two(), "exp_avgs": two(), "exp_avg_sqs": two(),
            "max_exp_avg_sqs": two(), "steps": [torch.tensor(0.0), torch.tensor(0.0)], "hyper": table([ADAM]),
        },
    }  # fmt: skip
    return arguments[op]


def second(arguments, name, tensor):
    """The arguments with the second entry of one list replaced."""
    return {**arguments, name: [arguments[name][0], tensor]}


def mutable(arguments):
    return [t for value in arguments.values() if isinstance(value, list) for t in value if isinstance(t, torch.Tensor)]


def refused(op, arguments, error, *words, backend=None):
    """Asserts that the call is refused in a sentence with all ``words``, before anything is written."""
    strided = [t for t in mutable(arguments) if t.layout == torch.strided and not t.is_meta and not t.is_quantized]
    before = [t.clone() for t in strided]
    versions = [t._version for t in strided]
    with pytest.raises(error) as caught:
        getattr(ops, op)(**arguments, backend=backend)
    sentence = str(caught.value)
    for word in words:
        assert word in sentence, f"{word!r} not in {sentence!r}"
    assert "expected" in sentence and "got" in sentence and ": " in sentence and sentence.endswith(".") and "\n" not in sentence
    assert all(torch.equal(t, b) for t, b in zip(strided, before, strict=True)) and [t._version for t in strided] == versions


LISTS = [
    (op, name)
    for op in schema.OPS
    for name, value in good(op).items()
    if isinstance(value, list) and isinstance(value[0], torch.Tensor)
]
PER_PARAMETER = [(op, name) for op, name in LISTS if name != "steps"]


def ids(value):
    return value if isinstance(value, str) else None


@pytest.mark.parametrize("op, name", PER_PARAMETER, ids=ids)
def test_what_is_no_supported_tensor(op, name, backend):
    """Each list by its own name: a gradient must not be called a parameter."""
    arguments, word = good(op), f"{name}[1]"
    refused(op, second(arguments, name, 1.0), TypeError, word, "torch.Tensor", "float", backend=backend)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        tensor = torch.zeros((2, 2)).to(dtype)
        with_it = second(arguments, name, tensor)
        strided = {k: v for k, v in with_it.items() if k != name}
        before = [t.clone() for t in mutable(strided)]
        with pytest.raises(TypeError) as caught:
            getattr(ops, op)(**with_it, backend=backend)
        for part in (word, "expected float32, float64, bfloat16 or float16", f"got {dtype}"):
            assert part in str(caught.value)
        assert all(torch.equal(t, b) for t, b in zip(mutable(strided), before, strict=True))
    sparse = torch.ones((2, 2)).to_sparse()
    refused(op, second(arguments, name, sparse), TypeError, word, "strided", "torch.sparse_coo", backend=backend)
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    refused(op, second(arguments, name, quantized), TypeError, word, "float32", "qint8", backend=backend)


# Lists that are held to another one, which decides what is expected.
HELD = [(op, name) for op, name in PER_PARAMETER if name != "params" and (op, name) != ("grad_norm", "grads")]


@pytest.mark.parametrize("op, name", HELD, ids=ids)
def test_lists_that_do_not_match(op, name, backend):
    arguments = good(op)
    refused(op, {**arguments, name: arguments[name][:1]}, ValueError, name, "expected 2", "got 1", backend=backend)
    refused(op, second(arguments, name, torch.ones(4)), ValueError, f"{name}[1]", "(2, 2)", "(4,)", backend=backend)
    refused(
        op, second(arguments, name, torch.ones(2, 2, device="meta")), ValueError, f"{name}[1]", HERE, "meta", backend=backend
    )


@pytest.mark.parametrize("op", ["perturb_", "restore_", "restore_sgd_", "restore_adamw_"])
def test_parameters_on_two_devices(op, backend):
    arguments = second(good(op), "params", torch.ones(2, 2, device="meta"))
    refused(op, arguments, ValueError, "params[1]", HERE, "meta", "one call per device", backend=backend)


@pytest.mark.parametrize("op", ["perturb_", "restore_", "restore_sgd_", "restore_adamw_"])
def test_a_backup_of_another_dtype(op, backend):
    """It cannot hold every weight's bits; and a kernel that copies bytes would run past its end."""
    for dtype in (torch.float64, torch.bfloat16):
        arguments = second(good(op), "backups", torch.full((2, 2), 5.0, dtype=dtype))
        refused(op, arguments, (TypeError, ValueError), "backups[1]", "float32", str(dtype).split(".")[1], backend=backend)


@pytest.mark.parametrize("op, columns", [("perturb_", 2), ("restore_sgd_", 6), ("restore_adamw_", 8)])
def test_hyper_and_groups(op, columns, backend):
    arguments, row = good(op), good(op)["hyper"][0].tolist()
    for hyper, got in (
        (table([row]).float(), "torch.float32"),
        (table([row])[0], f"({columns},)"),
        (table([row[:-1]]), f"(1, {columns - 1})"),
        (table([row * 2])[:, ::2], f"(1, {columns})"),
    ):
        refused(op, {**arguments, "hyper": hyper}, ValueError, "hyper", "float64", f"[groups, {columns}]", got, backend=backend)
    refused(op, {**arguments, "hyper": table([row])[:0]}, ValueError, "hyper", "at least one row", backend=backend)
    for groups in ([0], [0, 1], [0, -1], [0, 0, 0]):
        refused(
            op, {**arguments, "groups": groups}, ValueError, "groups", "2 row numbers below 1", str(groups), backend=backend
        )


@pytest.mark.parametrize("op", ["perturb_", "restore_sgd_", "restore_adamw_"])
def test_hyper_as_a_list(op, backend):
    rows = good(op)["hyper"].tolist()
    refused(op, {**good(op), "hyper": rows}, (TypeError, ValueError), "hyper", "list", backend=backend)


@pytest.mark.parametrize("op, name", [("grad_norm", "scaling"), ("perturb_", "scaling"), ("restore_sgd_", "first")])
def test_numbers_per_tensor(op, name, backend):
    for values in ([1], [0, 2], [0, -1], [0, 0, 0]):
        refused(op, {**good(op), name: values}, ValueError, name, "2 numbers out of (0, 1)", str(values), backend=backend)


SCALARS = {
    "grad_norm": ("inv_scale",),
    "perturb_": ("norm", "inv_scale"),
    "restore_sgd_": ("inv_scale", "found_inf", "clip"),
    "restore_adamw_": ("inv_scale", "found_inf", "clip"),
}


@pytest.mark.parametrize("op, name", [(op, name) for op, names in SCALARS.items() for name in names])
def test_scalars(op, name, backend):
    for scalar, got in (
        (0.5, "float"),
        (torch.ones(2), "(2,)"),
        (torch.ones((), dtype=torch.int64), "torch.int64"),
        (torch.ones((), dtype=torch.float16), "torch.float16"),
    ):
        refused(
            op, {**good(op), name: scalar}, TypeError, name, "float32 or float64 tensor of one element", got, backend=backend
        )
    assert getattr(ops, op)(**{**good(op), name: torch.ones(1)}, backend=backend) is None or op == "grad_norm"


@pytest.mark.parametrize("op", SCALARS)
def test_a_scalar_on_another_device(op, backend):
    """It would be read through an address of that device, or send the whole operation there, where it does nothing."""
    for name in (*SCALARS[op], "hyper"):
        if name != "hyper" or "hyper" in good(op):
            elsewhere = (good(op)["hyper"] if name == "hyper" else torch.ones(())).to("meta")
            refused(op, {**good(op), name: elsewhere}, (TypeError, ValueError), name, HERE, "meta", backend=backend)


def test_steps(backend):
    arguments = good("restore_adamw_")
    refused(
        "restore_adamw_",
        {**arguments, "steps": [torch.tensor(0.0)]},
        ValueError,
        "steps",
        "expected 2",
        "got 1",
        backend=backend,
    )
    for step, got in ((1, "int"), (torch.tensor(1), "torch.int64"), (torch.zeros(3), "(3,)")):
        refused("restore_adamw_", second(arguments, "steps", step), TypeError, "steps[1]", got, backend=backend)


def test_state_that_is_missing(backend):
    refused(
        "restore_sgd_",
        {**good("restore_sgd_"), "momentum_buffers": []},
        ValueError,
        "momentum_buffers",
        "got none",
        backend=backend,
    )
    amsgrad = {**good("restore_adamw_"), "hyper": table([[*ADAM[:6], 1.0, 0.0]]), "max_exp_avg_sqs": []}
    refused("restore_adamw_", amsgrad, ValueError, "max_exp_avg_sqs", "got none", backend=backend)


def test_state_that_is_empty_but_needed(in_a_process_of_its_own, needs_native):
    """An empty entry stands for a group that has no use for it; one that is used would be read through a null address."""
    in_a_process_of_its_own(
        """
        import torch
        from sam_fused.ops import schema
        from tests.ops.test_bad_input import good, second, refused, ADAM, table
        for backend in schema.BACKENDS:
            for op, name in (("restore_sgd_", "momentum_buffers"), ("restore_adamw_", "max_exp_avg_sqs")):
                print(backend, op, flush=True)  # a crash is told by the last line
                arguments = second(good(op), name, torch.empty(0))
                if op == "restore_adamw_":
                    arguments["hyper"] = table([[*ADAM[:6], 1.0, 0.0]])
                refused(op, arguments, ValueError, f"{name}[1]", backend=backend)
        """
    )


ACCUMULATING = ("grad_norm", "restore_accumulate_", "restore_sgd_", "restore_adamw_")


@pytest.mark.parametrize("op", ACCUMULATING)
def test_accumulators_and_their_weight_come_together(op, backend):
    sums = {"accumulators": [torch.ones(3), torch.ones(2, 2)]}
    without = {name: value for name, value in good(op).items() if name not in ("accumulators", "weight")}
    weight = {"weight": torch.tensor(0.5)}
    refused(op, {**without, **sums, "weight": None}, ValueError, "accumulators", "weight", "both or neither", backend=backend)
    refused(op, {**without, **weight, "accumulators": []}, ValueError, "weight alone", "both or neither", backend=backend)
    good_ones = {**without, **sums, **weight}
    for wrong in (torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.float64)):
        refused(op, second(good_ones, "accumulators", wrong), TypeError, "accumulators[1]", "float32", backend=backend)
    refused(op, second(good_ones, "accumulators", torch.ones(4)), ValueError, "accumulators[1]", "(2, 2)", backend=backend)
    refused(op, {**good_ones, "accumulators": sums["accumulators"][:1]}, ValueError, "accumulators", "got 1", backend=backend)
    for wrong in (0.5, torch.ones(2), torch.tensor(1)):
        refused(op, {**good_ones, "weight": wrong}, TypeError, "weight", backend=backend)
    getattr(ops, op)(**good_ones, backend=backend)


def test_the_registered_native_ops_check_what_could_corrupt_memory(in_a_process_of_its_own, needs_native):
    """torch.ops.sam_fused is reachable by anybody, and by the compiler: a wrong length must not write past an end."""
    in_a_process_of_its_own(
        """
        import torch
        from sam_fused.ops import backends, schema
        assert backends.choose(torch.get_default_device(), "native") == "native"

        def op(name):
            return schema.overload(name, "native")

        def ones(*size):
            return torch.ones(size)

        def hyper(*row):
            return torch.tensor([row], dtype=torch.float64, device="cpu")

        one, ascent, momentum = torch.ones(()), hyper(0.1, 0.0), hyper(0.1, 0.9, 0, 0, 0, 0)
        calls = {
            "a short backup": lambda: op("restore_")([ones(4096)], [ones(1)]),
            "a short gradient": lambda: op("perturb_")([ones(9)], [ones(9)], [ones(1)], one, ascent, [], []),
            "a group out of range": lambda: op("perturb_")([ones(9)], [ones(9)], [ones(9)], one, ascent, [10**9], []),
            "a backup of another dtype": lambda: op("restore_")([ones(4096)], [ones(4096).half()]),
            "another layout": lambda: op("restore_")([ones(2, 3)], [ones(3, 2).t()]),
            "a step count of bf16": lambda: op("restore_adamw_")(
                [ones(9)], [ones(9)], [ones(9)], [ones(9)], [ones(9)], [], [torch.ones((), dtype=torch.bfloat16)],
                hyper(0.1, 0.9, 0.9, 0, 0, 0, 0, 0), [], [],
            ),
            "no momentum": lambda: op("restore_sgd_")([ones(9)], [ones(9)], [ones(9)], [], momentum, [], [], []),
            "a short accumulator": lambda: op("restore_accumulate_")([ones(9)], [ones(9)], [ones(9)], [ones(1)], one),
            "no accumulator": lambda: op("restore_accumulate_")([ones(9)], [ones(9)], [ones(9)], [], one),
            "an accumulator of halves": lambda: op("grad_norm")([ones(9)], [], [], [ones(9).half()], one),
            "accumulators without a weight": lambda: op("grad_norm")([ones(9)], [], [], [ones(9)]),
            "a weight without accumulators": lambda: op("grad_norm")([ones(9)], [], [], [], one),
        }
        for name, call in calls.items():
            print(name, flush=True)  # a crash is told by the last line
            try:
                call()
            except RuntimeError as error:
                assert "expected" in str(error), error
            else:
                raise AssertionError("accepted")
        """
    )
