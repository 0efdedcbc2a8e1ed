"""Micro-batches in the CUDA library's own sources, run on the CPU: what no test of every operation looks for.

`tests/ops` and `test_emulated_kernels.py` have accumulators in their cases; this is about addresses, what may not be read,
launches and failures. The tests that take a backend run under the sanitizers too (`test_emulated_suite.py`).
"""

import ctypes
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sam_fused import ops
from sam_fused.ops.dtypes import CODES, arithmetic_dtype
from sam_fused.ops.prepared import Factors, TensorSet
from sam_fused.ops.rows import COLUMNS, FIRST, ROLES, ROW_WORDS
from tests.kernels import emulated_backend
from tests.kernels.build_emulated import Build
from tests.kernels.test_emulated_kernels import (
    ADAM,
    BLOCK_CHUNK,
    EVERY_ORDER,
    GRADIENTS,
    PERTURB,
    SGD,
    FailingDoor,
    adam_set,
    launches,
    rows_on_the_device,
    same_bits,
    sgd_set,
    written,
)
from tests.ops.cases import CASES, STORAGES, Entry
from tests.ops.runner import make_lists, run, table, uses_amsgrad

SUMMED = [case for case in CASES if "weight" in case.scalars]
STEPS = [case for case in SUMMED if case.op in ("restore_sgd_", "restore_adamw_") and "found_inf" not in case.scalars]
ACCUMULATE = next(case for case in SUMMED if case.op == "restore_accumulate_" and not case.fresh and not case.in_place)
# Tails of every width, several chunks of a block, nothing.
ENTRIES = tuple(Entry((size,)) for size in (0, 1, 7, 8, 9, 1000, BLOCK_CHUNK + 1, 3 * BLOCK_CHUNK + 5, 0))
BY_STORAGE = pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
WEIGHT = torch.tensor(0.3)


def like(tensors, value):
    return [torch.full_like(t, value, dtype=arithmetic_dtype(t.dtype)) for t in tensors]


def agrees_with_the_cpu(case, ours, theirs):
    """Runs both. Norms agree to their last digits alone."""
    found, wanted = run(case, "emulated", ours), run(case, "native", theirs)
    if found is not None:
        assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6, abs=0)
    return same_bits(written(case, ours), written(case, theirs))


# ---- addresses and values --------------------------------------------------------------------------------------------------


def placed(values, past):
    """A copy that starts so many bytes past a multiple of 32."""
    held = torch.empty(values.numel() + 64 // values.element_size(), dtype=values.dtype)
    start = (past - held.data_ptr()) % 32 // values.element_size()
    view = held[start : start + values.numel()]
    assert view.numel() == 0 or view.data_ptr() % 32 == past
    return view.copy_(values)


@pytest.mark.parametrize("past", ["an element", "16 bytes", "16 bytes and an element"])
@pytest.mark.parametrize("case", SUMMED, ids=str)
@pytest.mark.parametrize("backend", [emulated_backend.NAME])
def test_accumulators_at_any_address(case, past, backend, emulated):
    """Beside operands that are aligned. A float's accumulators of eight halves are 32 bytes, read and written as twice 16."""
    for storage in STORAGES:
        ours, theirs = (make_lists(ENTRIES, [storage.dtype], case, seed=4) for _ in range(2))
        bytes_past = 16 * ("16" in past) + ours.accumulators[0].element_size() * ("element" in past)
        ours.accumulators = [placed(values, bytes_past) for values in ours.accumulators]
        assert agrees_with_the_cpu(case, ours, theirs), storage.name


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """``survey`` of `csrc/cuda/access.h`: of operands given as (role, dtype, address), whether they share a dtype, whether they
    may be accessed 16 bytes at a time, and that dtype."""
    source, flags = Path(__file__).with_name("survey.cu"), [f"-I{emulated_backend.CSRC}", "-Wno-unknown-pragmas"]
    library = ctypes.CDLL(str(Build(tmp_path_factory.mktemp("survey"), "survey", [source], flags=flags).finish()))

    def asked(operands, used):
        row, found = (ctypes.c_int64 * ROW_WORDS)(), (ctypes.c_int32 * 3)()
        for role, dtype, address in operands:
            row[COLUMNS.index("dtypes")] |= CODES[dtype] << (8 * ROLES.index(role))
            row[len(COLUMNS) + ROLES.index(role)] = address
        bits = sum(1 << ROLES.index(role) for role in used)
        library.survey(row, ctypes.c_void_p(row[len(COLUMNS) + ROLES.index("grad")]), ctypes.c_uint32(bits), found)
        (dtype,) = (dtype for dtype, code in CODES.items() if code == found[0])
        return bool(found[1]), bool(found[2]), dtype

    return asked


@BY_STORAGE
def test_accumulators_keep_nobody_from_wide_accesses_but_by_their_address(storage, survey):
    """What no bit of a result shows: beside halves they would make every operand one that is converted by itself."""
    own, t = storage.dtype, arithmetic_dtype(storage.dtype)
    others = [(role, own, 0x1000 * (index + 1)) for index, role in enumerate(("weight", "backup", "grad", "state0"))]
    used = [role for role, _, _ in others]
    for address, aligned in ((0x8000, True), (0x8010, True), (0x8000 + t.itemsize, False), (0x8010 + t.itemsize, False)):
        operands = [*others, ("accumulator", t, address)]
        assert survey(operands, [*used, "accumulator"]) == (True, aligned, own)
        assert survey(operands, used) == (True, True, own)
    mixed = [("grad", t if own != t else torch.bfloat16, 0x3000)]
    assert survey([*others[:2], *mixed, ("accumulator", t, 0x8000)], ["weight", "grad", "accumulator"])[:2] == (False, True)


@pytest.mark.parametrize("grads", STORAGES, ids=lambda s: f"grads-{s.name}")
@pytest.mark.parametrize("case", [case for case in SUMMED if case.op != "grad_norm"], ids=str)
@pytest.mark.parametrize("backend", [emulated_backend.NAME])
def test_accumulators_beside_gradients_of_another_dtype(case, grads, backend, emulated):
    """The parameter alone decides an accumulator's dtype."""
    for storage in STORAGES:
        ours, theirs = (make_lists(ENTRIES[:6], [storage.dtype], case, seed=6) for _ in range(2))
        for lists in (ours, theirs):
            lists.grads = [g.to(grads.dtype) for g in lists.grads]
        assert agrees_with_the_cpu(case, ours, theirs), storage.name


@contextmanager
def scalars_in(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_the_weight_is_rounded_once_to_the_arithmetics_type(case, dtype, emulated):
    """An fp64 weight beside fp32 sums is not what is multiplied, and an fp32 one beside fp64 sums is exact."""
    case = replace(case, scalars={**case.scalars, "weight": 1 / 3})
    for storage in STORAGES:
        ours, theirs = (make_lists(ENTRIES, [storage.dtype], case, seed=8) for _ in range(2))
        with scalars_in(dtype):
            assert agrees_with_the_cpu(case, ours, theirs), storage.name


@pytest.mark.parametrize("grads", STORAGES, ids=lambda s: f"grads-{s.name}")
@BY_STORAGE
def test_a_fresh_accumulator_is_written_and_not_read(storage, grads, emulated):
    """More tensors than a launch takes, some of them empty, and rubbish in all of their accumulators."""
    case = replace(ACCUMULATE, fresh=True)
    lists = make_lists(ENTRIES[:7] * 7, [storage.dtype], case)
    lists.grads = [g.to(grads.dtype) for g in lists.grads]
    for accumulator in lists.accumulators:
        accumulator.fill_(math.nan)
    run(case, "emulated", lists)
    t = arithmetic_dtype(storage.dtype)
    assert same_bits(lists.accumulators, [g.to(t) * WEIGHT.to(t) for g in lists.grads])
    assert same_bits(lists.params, lists.backups)


@pytest.mark.parametrize("grads", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_restore_at_its_end_copies_every_bit(dtype, grads, emulated):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    param, accumulator = torch.zeros(2**16, dtype=dtype), torch.zeros(2**16)
    grad = torch.ones(2**16, dtype=grads)
    ops.restore_accumulate_([param], [every.view(dtype).clone()], [grad], [accumulator], WEIGHT, backend="emulated")
    assert torch.equal(param.view(torch.int16), every)
    assert bool((accumulator == WEIGHT).all())


# ---- the fused form is the unfused one -------------------------------------------------------------------------------------


@BY_STORAGE
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_the_last_pass_is_an_accumulation_and_a_base_step(case, storage, emulated):
    fused, apart = (make_lists(ENTRIES, [storage.dtype], case, seed=7) for _ in range(2))
    run(case, "emulated", fused)
    sums = [accumulator.clone() for accumulator in apart.accumulators]
    assert same_bits(fused.accumulators, sums)
    run(replace(ACCUMULATE, scalars={"weight": case.scalars["weight"]}), "emulated", apart)
    assert not any(torch.equal(a, s) for a, s in zip(apart.accumulators, sums, strict=True) if a.numel())
    apart.grads, apart.backups, apart.accumulators = apart.accumulators, apart.params, []
    scalars = {name: value for name, value in case.scalars.items() if name != "weight"}
    run(replace(case, scalars=scalars), "emulated", apart)
    roles = ("params", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "steps")
    for role in (*roles, *(("max_exp_avg_sqs",) if case.op == "restore_adamw_" and uses_amsgrad(case) else ())):
        assert same_bits(fused.of(role), apart.of(role)), role


@BY_STORAGE
@pytest.mark.parametrize("case", [case for case in SUMMED if case.op == "grad_norm"], ids=str)
def test_a_norm_over_accumulators_is_that_of_the_sums(case, storage, emulated):
    """To the bit where the lanes are the same ones: halves have more of them than the sums' fp32."""
    lists = make_lists(ENTRIES, [storage.dtype], case, seed=7)
    fused = run(case, "emulated", lists)[0]
    t = arithmetic_dtype(storage.dtype)
    accumulated = replace(ACCUMULATE, scalars={"weight": case.scalars["weight"]}, in_place=True)
    lists.backups = lists.params
    run(accumulated, "emulated", lists)
    lists.params, lists.grads, lists.accumulators = [p.to(t) for p in lists.params], lists.accumulators, []
    scalars = {name: value for name, value in case.scalars.items() if name != "weight"}
    apart = run(replace(case, scalars=scalars), "emulated", lists)[0]
    assert fused.dtype == apart.dtype
    exact = t == storage.dtype
    assert float(fused) == (float(apart) if exact else pytest.approx(float(apart), rel=storage.norm_tolerance, abs=0))


# ---- launches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, GRADIENTS, GRADIENTS + 1, 3 * GRADIENTS + 1])
@pytest.mark.parametrize(("make", "step", "hyper"), [(sgd_set, "restore_sgd_", SGD), (adam_set, "restore_adamw_", ADAM)])
def test_micro_batches_cost_three_launches_each(make, step, hyper, count, emulated):
    """Norm, perturbation, restore with accumulation; the last one has the base step in place of the accumulation."""
    sizes = [(index % 5) * 7 for index in range(count)] if count > 1 else [9]
    each = -(-count // GRADIENTS)
    tensors = make(sizes)
    summed = make(sizes, accumulators=like(tensors.params, math.nan), perturbed=tensors.perturbed)
    grads = [torch.randn_like(p) for p in tensors.params]

    def ascend():
        norm, _ = tensors.grad_norm(tensors.checked(grads))
        tensors.perturb_(tensors.checked(grads), norm, PERTURB)

    for fresh in (True, False):
        assert launches(emulated, ascend) == 2 * each and summed.is_perturbed
        accumulate = lambda fresh=fresh: summed.restore_accumulate_(summed.checked(grads), WEIGHT, fresh)  # noqa: E731
        assert launches(emulated, accumulate) == each and not summed.is_perturbed
    assert all(torch.allclose(a, 0.6 * g) for a, g in zip(summed.accumulators, grads, strict=True))
    assert launches(emulated, ascend) == 2 * each
    assert launches(emulated, lambda: summed.grad_norm(summed.checked(grads), weight=WEIGHT)) == each
    last = lambda: getattr(summed, step)(summed.checked(grads), table(hyper), Factors(weight=WEIGHT))  # noqa: E731
    assert launches(emulated, last) == each and not summed.is_perturbed


@pytest.mark.parametrize("order", EVERY_ORDER, ids="-".join)
def test_a_norm_that_overflows_is_counted_once(order, emulated):
    """However many launches, blocks and threads look at it. What counts is the norm as it is stored: an fp32 one overflows
    where the fp64 sum of its squares does not."""
    sizes = [3 * BLOCK_CHUNK + 5, 0, 7] + [5] * (2 * GRADIENTS)
    tensors = sgd_set(sizes)
    summed = sgd_set(sizes, accumulators=like(tensors.params, 1.0))
    overflows = torch.tensor(40)

    def norm_of(value, within, **scalars):
        emulated.set_orders(*order, seed=5)
        grads = [torch.ones_like(p) for p in within.params]
        grads[0][-2:] = value
        return within.grad_norm(within.checked(grads), overflows=overflows, **scalars)

    half = torch.tensor(0.5)
    for value, within, scalars, overflowed in (
        (1.0, tensors, {}, False),
        (math.inf, tensors, {}, True),
        (math.nan, tensors, {}, True),
        (2e38, tensors, {}, False),
        (3e38, tensors, {}, True),
        (3e38, tensors, {"inv_scale": half}, False),
        (3e38, summed, {"weight": half}, False),
        (-math.inf, summed, {"weight": half}, True),
        (3e38, summed, {"weight": torch.tensor(1.0)}, True),
    ):
        before = int(overflows)
        _, found_inf = norm_of(value, within, **scalars)
        assert int(overflows) - before == float(found_inf) == overflowed, (value, scalars)
    summed.accumulators[-1][0] = math.nan
    norm_of(1.0, summed, weight=half)
    assert int(overflows) == 46


def test_an_fp64_norm_past_fp32s_range_is_none_that_overflows(emulated):
    params = [torch.ones(5, dtype=torch.float64), torch.ones(5)]
    tensors, overflows = TensorSet(params, params, backend="emulated"), torch.tensor(0)
    norm, _ = tensors.grad_norm(tensors.checked([params[0] * 1e200, params[1]]), overflows=overflows)
    assert float(norm) == pytest.approx(math.sqrt(5) * 1e200) and int(overflows) == 0


def test_a_skipped_last_pass_leaves_all_but_the_weights(emulated):
    """Weights come back; accumulators, state, step counts, and that the momentum is still to be created, stay."""
    sizes = [70, 3, 0, 2 * BLOCK_CHUNK + 2] * 12
    rubbish = [torch.full((size,), math.inf) for size in sizes]
    first = [1, 0, 1, 1] * 12
    skipped = Factors(weight=WEIGHT, found_inf=torch.tensor(1.0))
    for tensors, step, hyper in (
        (sgd_set(sizes, accumulators=rubbish, first=first), "restore_sgd_", SGD),
        (adam_set(sizes, accumulators=rubbish), "restore_adamw_", ADAM),
    ):
        steps = [float(s) for s in tensors.steps]
        for param in tensors.params:
            param.add_(1.0)
        grads = tensors.checked([torch.ones_like(p) for p in tensors.params])
        getattr(tensors, step)(grads, table(hyper), skipped)
        assert same_bits(tensors.params, tensors.backups)
        assert all(bool((state == 0).all()) for states in tensors.states for state in states)
        assert all(bool(accumulator.isinf().all()) for accumulator in tensors.accumulators)
        assert [float(s) for s in tensors.steps] == steps
        if step == "restore_sgd_":
            assert rows_on_the_device(tensors)[:, FIRST].tolist() == first
    tensors = sgd_set(sizes, accumulators=like(rubbish, 1.0), first=first)
    taken = Factors(weight=WEIGHT, found_inf=torch.tensor(0.0))
    tensors.restore_sgd_(tensors.checked([torch.ones_like(p) for p in tensors.params]), table(SGD), taken)
    assert rows_on_the_device(tensors)[:, FIRST].tolist() == [0] * 48
    # Dampening 0.3 where the buffer existed; weight decay moves both by a hundredth of a weight.
    created, existed = tensors.states[0][0].mean(), tensors.states[0][1].mean()
    assert float(created) == pytest.approx(1.3, abs=0.1) and float(existed) == pytest.approx(0.7 * 1.3, abs=0.1)


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_launch_that_fails_leaves_each_tensor_perturbed_or_done(before, emulated):
    """Launches before it have restored and accumulated. The cell says that something may still be perturbed."""
    count = 3 * GRADIENTS
    params, grads = [torch.randn(5) for _ in range(count)], [torch.ones(5) for _ in range(count)]
    clean, perturbed = [p.clone() for p in params], torch.zeros(1, dtype=torch.int64)
    tensors = TensorSet(
        params, [torch.zeros(5) for _ in params], backend="emulated", accumulators=like(params, 1.0), perturbed=perturbed
    )
    tensors.perturb_(tensors.checked(grads), torch.tensor(1.0), PERTURB)
    moved = [p.clone() for p in params]
    emulated.fail_next_launch(FailingDoor.LAUNCH_FAILURE, before)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        tensors.restore_accumulate_(tensors.checked(grads), torch.tensor(0.5))
    done = before * GRADIENTS
    assert same_bits(params, clean[:done] + moved[done:])
    assert [float(a[0]) for a in tensors.accumulators] == [1.5] * done + [1.0] * (count - done)
    assert tensors.is_perturbed
    tensors.restore_()
    assert same_bits(params, clean) and not tensors.is_perturbed


def test_sums_of_another_dtype_are_refused_before_anything_is_written(emulated):
    """A prepared row may say anything; the kernels read the arithmetic's type."""
    for dtype, wrong in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)):
        params, backups, grads = (torch.full((5,), value, dtype=dtype) for value in (1.0, 2.0, 3.0))
        accumulators, momentum = torch.zeros(5, dtype=wrong), torch.zeros(5, dtype=dtype)
        options = {"backend": "emulated", "accumulators": [accumulators]}
        tensors = TensorSet([params], [backups], states=([momentum],), **options)
        checked = tensors.checked([grads])
        adam = TensorSet([params], [backups], states=([momentum],) * 3, steps=[torch.tensor(0.0)], **options)
        for call in (
            lambda: tensors.grad_norm(checked, weight=WEIGHT),  # noqa: B023
            lambda: tensors.restore_accumulate_(checked, WEIGHT),  # noqa: B023
            lambda: tensors.restore_sgd_(checked, table(SGD), Factors(weight=WEIGHT)),  # noqa: B023
            lambda: adam.restore_adamw_(checked, table(ADAM), Factors(weight=WEIGHT)),  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match="accumulator 0 of the dtype that its tensor is computed in"):
                call()
        assert bool((params == 1).all()) and not bool(accumulators.any())


def test_what_does_not_belong_together_is_refused(emulated):
    params, grads = [torch.ones(5)], [torch.ones(5)]
    plain = TensorSet(params, params, backend="emulated")
    summed = TensorSet(params, params, backend="emulated", accumulators=like(params, 0.0))
    checked = plain.checked(grads)
    with pytest.raises(RuntimeError, match="no accumulator for tensor 0"):
        plain.grad_norm(checked, weight=WEIGHT)
    with pytest.raises(RuntimeError, match="no weight for tensor 0"):
        summed.restore_sgd_(checked, table([[0.1, 0, 0, 0, 0, 0]]))
    with pytest.raises(RuntimeError, match="no accumulator for tensor 0"):
        torch.ops.sam_fused.emulated_prepared_restore_accumulate_(
            plain._fast.rows, checked.addresses, WEIGHT, plain.perturbed, False, plain._fast.table
        )
    for wrong in (torch.tensor(0.0), torch.tensor([0, 0]), torch.tensor(0, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="count of overflows to be one int64 on cpu"):
            plain.grad_norm(checked, overflows=wrong)
    assert bool((params[0] == 1).all())
