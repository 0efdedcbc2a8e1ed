"""What torch must know of the operations: schemas, fake kernels, versions, compilation, autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_fused import ops
from sam_fused.ops import schema
from sam_fused.ops.prepared import TensorSet
from tests.ops.cases import FITTING, WIDEST
from tests.ops.runner import Call, make_lists, operate, prepare, run, table, takes
from tests.ops.test_bad_input import good

SOME = FITTING[1:4]


@pytest.mark.parametrize("op", schema.OPS)
def test_opcheck(op, backend):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {
            name: [t.to(dtype) for t in value]
            if isinstance(value, list) and name not in ("steps", "scaling", "accumulators")
            else value
            for name, value in good(op).items()
        }
        arguments = schema.OPS[op].complete(arguments)
        results = torch.library.opcheck(schema.overload(op, backend), (), arguments)
        assert set(results) == {
            "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
        } and set(results.values()) == {"SUCCESS"}  # fmt: skip


@pytest.mark.parametrize("op", schema.OPS)
def test_fake_kernels_agree(op):
    """Dtype and shape of what the fake kernels promise, where opcheck's own inputs do not tell them apart."""
    with FakeTensorMode():
        if op == "grad_norm":
            for dtypes, wide in (((torch.float16, torch.float64), True), ((torch.float16, torch.bfloat16), False)):
                norm, found_inf = ops.grad_norm([torch.ones(3, dtype=d) for d in dtypes], backend="reference")
                assert norm.dtype == (torch.float64 if wide else torch.float32) and norm.shape == found_inf.shape == ()
                assert found_inf.dtype == torch.float32
        else:
            assert schema.overload(op, "reference")(**schema.OPS[op].complete(good(op))) is None


def _functional(op, backend):
    """A function of tensors only, that copies, calls and returns everything that may have changed."""
    arguments = good(op)
    lists = [name for name, value in arguments.items() if isinstance(value, list) and isinstance(value[0], torch.Tensor)]
    scalars = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    rest = {name: value for name, value in arguments.items() if name not in lists and name not in scalars}

    def function(*tensors):
        copies = [t.clone() for t in tensors]
        given = {name: copies[2 * i : 2 * i + 2] for i, name in enumerate(lists)}
        given |= dict(zip(scalars, copies[2 * len(lists) :], strict=True))
        result = getattr(ops, op)(**given, **rest, backend=backend)
        return (*copies, *(result or ()))

    return function, [t for name in lists for t in arguments[name]] + [arguments[name] for name in scalars]


@pytest.mark.parametrize("op", schema.OPS)
def test_compile(op, backend):
    torch._dynamo.reset()
    function, inputs = _functional(op, backend)
    wanted = function(*inputs)
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_compile_of_layouts_that_differ(backend):
    """The kernels see blocks of memory: a gradient that lies differently must be rearranged under a compiler too."""
    torch._dynamo.reset()

    def function(w, g, norm, hyper):
        w, backup = w.clone(), torch.zeros_like(w)
        ops.perturb_([w], [backup], [g], norm, hyper, backend=backend)
        return w

    inputs = torch.zeros(2, 3), torch.arange(6.0).reshape(3, 2).t(), torch.tensor(1.0), table([[1.0, 0.0]])
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs), inputs[1])


def test_compile_of_sgd_without_momentum(backend):
    """Whether a group has momentum is read from the table: the compiler cannot."""
    torch._dynamo.reset()

    def function(w, g, hyper):
        w = w.clone()
        ops.restore_sgd_([w], [w], [g], [], hyper, backend=backend)
        return w

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3), torch.ones(3), table([[0.5, 0, 0, 0, 0, 0]])), torch.full((3,), -0.5))


# ---- versions and autograd ---------------------------------------------------------------------------------------------

WRITTEN = {
    "perturb_": ("params", "backups"),
    "restore_": ("params",),
    "restore_accumulate_": ("params", "accumulators"),
    "restore_sgd_": ("params", "momentum_buffers"),
    "restore_adamw_": ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
}


@pytest.mark.parametrize("case", [c for c in WIDEST if c.op in WRITTEN], ids=str)
def test_versions_of_everything_written_increase(case, runner):
    prepared = runner.startswith("prepared")
    lists = make_lists(SOME, [torch.float32], case)
    before = {role: [t._version for t in lists.of(role)] for role in (*takes(case), "steps")}
    run(case, runner, lists)
    for role, versions in before.items():
        after = [t._version for t in lists.of(role)]
        if role not in WRITTEN[case.op]:
            assert after == versions, role
        elif not (prepared and role in ("backups", "accumulators")):  # a TensorSet's own, no graph has saved them
            assert all(a > b for a, b in zip(after, versions, strict=True)), role


def test_versions_of_what_lies_differently(backend):
    """Written through a copy and back: still visible."""
    w, backup = torch.zeros(2, 6)[:, ::2], torch.ones(2, 3)
    version = w._version
    ops.restore_([w], [backup], backend=backend)
    assert w._version > version and bool((w == 1).all())


@pytest.mark.parametrize("door", ["list", "prepared"])
def test_autograd_sees_a_weight_that_was_perturbed_in_between(door, backend):
    w = torch.nn.Parameter(torch.randn(4))
    x = torch.randn(4, requires_grad=True)
    loss = (w * x).sum()
    backup, grad, norm, hyper = torch.zeros(4), torch.ones(4), torch.tensor(2.0), table([[0.1, 0.0]])
    if door == "list":
        ops.perturb_([w], [backup], [grad], norm, hyper, backend=backend)
    else:
        tensors = TensorSet([w], [backup], backend=backend)
        tensors.perturb_(tensors.checked([grad]), norm, hyper)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_that_require_grad_are_written_without_a_graph(runner):
    for case in (WIDEST[1], *WIDEST[3:]):
        lists = make_lists(SOME, [torch.float32], case)
        lists.params = [torch.nn.Parameter(p) for p in lists.params]
        run(case, runner, lists)
        assert all(p.requires_grad and p.is_leaf and p.grad is None and p.grad_fn is None for p in lists.params)


# ---- modes --------------------------------------------------------------------------------------------------------------


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_a_dispatch_mode_sees_lists_and_no_addresses(case, needs_native):
    lists = make_lists(SOME, [torch.float32], case)
    again = make_lists(SOME, [torch.float32], case)
    call = Call.of(case, len(SOME))
    tensors = prepare(case, call, lists)
    with _Recorder() as recorder:
        operate(case, call, tensors, lists.grads)
    assert any(f"sam_fused.{case.op}.native" in name for name in recorder.seen)
    assert not any("prepared" in name for name in recorder.seen)
    run(case, "prepared", again)
    assert all(torch.equal(a, b) for role in takes(case) for a, b in zip(lists.of(role), again.of(role), strict=True))


def test_an_operation_is_one_call(needs_native):
    """Where everything fits nothing is copied: beside the kernels only what reads the hyper-parameters' table runs."""
    reads_the_table = {
        "any.default",
        "ne.Scalar",
        "select.int",
        "slice.Tensor",
        "is_nonzero.default",
        "_local_scalar_dense.default",
    }
    allowed = {f"aten.{name}" for name in (*reads_the_table, "detach.default", "lift_fresh.default")}
    for case in WIDEST:
        lists = make_lists(SOME, [torch.float32], case)
        with _Recorder() as recorder:
            run(case, "native", lists)
        assert [n for n in recorder.seen if n not in allowed] == [f"sam_fused.{case.op}.native"]
