"""Every operation of the Triton backend, both doors, in Triton's interpreter; see ``triton_arithmetic`` for its fma.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_triton_interpreted.py`, in a process of its own: the variable decides when
Triton is imported whether kernels are interpreted.
"""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from sam_fused.ops import native
from sam_fused.ops.dtypes import arithmetic_dtype
from sam_fused.ops.triton import KERNELS, reason_not, table, transfer
from sam_fused.ops.triton import door as triton_door
from tests.kernels import triton_arithmetic
from tests.kernels.triton_doors import CPU, DOORS, Set, by_lists
from tests.ops import cases, runner, test_matrix, test_range
from tests.ops.cases import (
    ACCUMULATE_CASES,
    ADAM_CASES,
    CASES,
    FITTING,
    LAYOUTS,
    NORM_CASES,
    PERTURB_CASES,
    SGD_CASES,
    STORAGES,
    WIDEST,
    Case,
    Entry,
)
from tests.ops.runner import Call, Lists, make_lists, period, takes

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    triton_arithmetic.mend(monkeypatch)
    torch.set_num_threads(1)


@pytest.fixture(params=DOORS)
def door(request, monkeypatch):
    """A door, which the checks of ``tests/ops`` then run their cases through."""
    run = DOORS[request.param]
    monkeypatch.setattr(test_matrix, "run", lambda case, _runner, lists: run(case, lists))
    return run


def check(case: Case, lists: Lists) -> None:
    """Against the oracle, with the bounds that hold for the native backend."""
    (test_matrix.check_norm if case.op == "grad_norm" else test_matrix.check)(case, "triton", lists)


def test_it_serves_the_cpu_here():
    assert reason_not(CPU) is None
    assert "TRITON_INTERPRET" in reason_not(torch.device("cuda", 0))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_of_cases(case, storage, door):
    check(case, make_lists(FITTING, [storage.dtype], case))


def check_bits(case: Case, lists: Lists, want: Lists) -> None:
    """Against the native backend. Norms are summed in another order."""
    if native.status().reason is not None:
        pytest.skip(f"no native library: {native.status().reason}")
    found, wanted = by_lists(case, lists), runner.run(case, "native", want)
    for role in (*takes(case), "steps"):
        assert all(torch.equal(a, b) for a, b in zip(lists.of(role), want.of(role), strict=True)), role
    if found is not None:
        tolerance = max(cases.STORAGE_OF[grad.dtype].norm_tolerance for grad in lists.grads)
        assert float(found[0]) == pytest.approx(float(wanted[0]), rel=tolerance, abs=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_native_backend(case):
    """The same scalars, the same bits."""
    for storage in STORAGES:
        check_bits(case, *(make_lists(FITTING, [storage.dtype], case, seed=3) for _ in range(2)))


@pytest.mark.parametrize("case", [*WIDEST, *(case for case in NORM_CASES if "weight" in case.scalars)], ids=str)
def test_any_operand_may_be_the_one_that_is_aligned_to_nothing(case):
    """Large enough for whole blocks, which are read 16 bytes at a time: no address may go without being asked."""
    for role in takes(case):
        lists, want = (make_lists([Entry((9001,))], [torch.float32], case) for _ in range(2))
        for of in (lists, want):
            of.of(role)[0] = LAYOUTS["offset"](of.of(role)[0])[0]
        check_bits(case, lists, want)


RESTORE = Case("restore", "restore_")

# Around a chunk and two; one whose whole blocks are read 16 bytes at a time and one that is aligned to nothing.
LARGE = (*(Entry((size,)) for size in (32767, 32768, 32769, 65537)), Entry((40001,), "offset"), Entry((150, 219), "transposed"))


@pytest.mark.parametrize("case", WIDEST, ids=str)
@pytest.mark.parametrize("turn", [0, 2])
def test_large(case, turn, door):
    dtypes = [STORAGES[(i + turn) % 4].dtype for i in range(4)]
    lists = make_lists(LARGE, dtypes, case, periodic=True)
    if case.op == "grad_norm":
        test_matrix.check_norm(case, "triton", lists)
        return
    door(case, lists)
    for index, param in enumerate(lists.params):
        before = Lists(**{role: [period(role, param.dtype)] for role in takes(case)})
        for role, expected in test_matrix._expected(case, before, index, "triton").items():
            ratios = expected.ratios(lists.of(role)[index].reshape(-1))
            assert ratios.max() <= 1, f"{role}[{index}] {param.dtype} {tuple(param.shape)} from {ratios.argmax()} on"
    assert lists.gaps_are_untouched()


@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_many_small_tensors(case, door):
    """Of all dtypes in turn, every twenty-third one empty."""
    check(case, make_lists(cases.MANY_SMALL[:70], [s.dtype for s in STORAGES], case))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_all_empty(storage, door):
    """Adam's steps advance all the same."""
    for case in WIDEST:
        check(case, make_lists(cases.ALL_EMPTY, [storage.dtype], case))


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 1000, 65537])
def test_the_search_for_a_chunks_tensor(rows):
    """From one round to three, inside a longer table, and reading nothing beside its range, which would look as if it began."""
    chunks = torch.randint(1, 4, (rows,), generator=torch.Generator().manual_seed(rows))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
    first_chunk = torch.zeros(rows + 300, dtype=torch.int64)
    first_chunk[5 : 5 + rows] = starts[:-1] + 10
    found = torch.zeros((), dtype=torch.int64)
    for row in {0, 1, rows // 3, rows // 2, rows - 2, rows - 1} & set(range(rows)):
        for chunk in (int(starts[row]), int(starts[row + 1]) - 1):
            triton_arithmetic.write_row[(1,)](found, chunk + 10, first_chunk, 5, rows)
            assert int(found) == 5 + row


def test_more_tensors_than_one_round_of_the_search(door):
    """Every third tensor is empty, and one has two chunks."""
    entries = [Entry((index % 3,)) for index in range(400)]
    entries[301] = Entry((32769,))
    lists = make_lists(entries, [torch.float32], RESTORE)
    door(RESTORE, lists)
    assert all(torch.equal(p, b) for p, b in zip(lists.params, lists.backups, strict=True))
    assert lists.gaps_are_untouched()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixed_dtypes_in_a_list(case, door):
    check(case, make_lists(FITTING[1:9], [s.dtype for s in STORAGES], case))


@pytest.mark.parametrize("weight", STORAGES, ids=lambda s: f"w-{s.name}")
@pytest.mark.parametrize("other", STORAGES, ids=lambda s: f"other-{s.name}")
def test_mixed_dtypes_of_one_parameter(weight, other, monkeypatch):
    monkeypatch.setattr(test_matrix, "run", lambda case, _runner, lists: by_lists(case, lists))
    monkeypatch.setattr(cases, "ENTRIES", FITTING)
    monkeypatch.setattr(cases, "PERTURB_CASES", PERTURB_CASES[2:5])
    test_matrix.test_mixed_dtypes_of_one_parameter(weight, other, "triton")


def test_restore_is_bitwise_for_every_value(door):
    test_matrix.test_restore_is_bitwise_for_every_value("triton")


def test_unused_state_may_be_missing_or_empty(monkeypatch, door):
    monkeypatch.setattr(cases, "ENTRIES", FITTING)
    test_matrix.test_unused_state_may_be_missing_or_empty("triton")


def test_later_steps(monkeypatch, door):
    """Bias corrections far from one: beta^t by binary powering, held to the same bounds."""
    late = Case("adamw", "restore_adamw_", ((0.01, 0.9, 0.99999, 1e-8, 0.1, 1, 0, 0),), steps=(12345.0, 10.0**6, 16777214.0))
    for storage in (cases.FP32, cases.FP64):
        check(late, make_lists(FITTING, [storage.dtype], late))


# ---- accumulators ------------------------------------------------------------------------------------------------------------

ACCUMULATED = [case for case in CASES if "weight" in case.scalars]
FRESH = ACCUMULATE_CASES[1]


@pytest.mark.parametrize("weight", STORAGES, ids=lambda s: f"w-{s.name}")
@pytest.mark.parametrize("grad", STORAGES, ids=lambda s: f"g-{s.name}")
def test_accumulators_of_mixed_dtypes(weight, grad):
    """What accumulators are follows from the weight, whatever the gradient is; for the norm, from the gradient."""
    for case in ACCUMULATED:
        lists, want = (make_lists([Entry((size,)) for size in (1, 17, 5000)], [weight.dtype], case) for _ in range(2))
        for of in (lists, want):
            of.grads = [g.to(grad.dtype) for g in of.grads]
            if case.op == "grad_norm":
                of.accumulators = [a.to(arithmetic_dtype(grad.dtype)) for a in of.accumulators]
        check_bits(case, lists, want)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", [case for case in ACCUMULATED if case.hyper], ids=str)
def test_the_last_micro_batch_with_a_step_is_an_accumulation_and_a_step(case, storage, door):
    """To the last bit, in whole blocks and in what is left of them."""
    lists, apart = (make_lists(LARGE[2:5], [storage.dtype], case) for _ in range(2))
    door(case, lists)
    weight = case.scalars["weight"]
    door(replace(case, op="restore_accumulate_", hyper=(), first=(), scalars={"weight": weight}), apart)
    apart.backups, apart.grads, apart.accumulators = apart.params, apart.accumulators, []
    door(replace(case, scalars={name: value for name, value in case.scalars.items() if name != "weight"}), apart)
    for role in (*runner.TAKES[case.op], "steps"):
        if role not in ("backups", "grads"):
            assert all(torch.equal(a, b) for a, b in zip(lists.of(role), apart.of(role), strict=True)), role


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_fresh_accumulators_are_not_read(storage, door):
    lists = make_lists(LARGE[2:5], [storage.dtype], FRESH)
    for accumulator in lists.accumulators:
        accumulator.fill_(math.nan)
    door(FRESH, lists)
    weight = torch.tensor(FRESH.scalars["weight"])
    for accumulator, grad in zip(lists.accumulators, lists.grads, strict=True):
        assert torch.equal(accumulator, weight.to(accumulator.dtype) * grad.to(accumulator.dtype))
    assert lists.gaps_are_untouched()


def test_a_weight_of_fp64_is_rounded_once(monkeypatch):
    """To what the accumulators are."""
    call_of = Call.of

    def with_wide_scalars(case, count):
        call = call_of(case, count)
        call.scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in case.scalars.items()}
        return call

    monkeypatch.setattr(Call, "of", staticmethod(with_wide_scalars))
    for case in ACCUMULATED:
        for storage in STORAGES:
            check_bits(case, *(make_lists([Entry((33,))], [storage.dtype], case) for _ in range(2)))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_norms_that_are_not_finite_are_counted(storage):
    """Of what the step will take, as the norm is stored: fp64 holds many a sum of squares that fp32 has no root of."""
    case = Case("norm", "grad_norm", scalars={"weight": 0.5})
    lists = make_lists([Entry((5,)), Entry((0,)), Entry((3000,))], [storage.dtype], case)
    rows, largest = Set(case, lists), torch.finfo(lists.accumulators[2].dtype).max
    for value, counted in ((1.0, 0), (largest, 1), (math.nan, 2), (0.0, 2), (-math.inf, 3)):
        lists.accumulators[2].fill_(value)
        norm, found_inf = rows.run(lists.grads)
        assert math.isfinite(norm) == (float(found_inf) == 0) == (value in (0.0, 1.0))
        assert int(rows.overflows) == 7 + counted


# ---- the ends of the range ---------------------------------------------------------------------------------------------------


@pytest.fixture
def in_range(monkeypatch):
    """``tests/ops/test_range.py`` over this backend, whose cases differ in what ``Case`` cannot say."""

    def through(_runner, op, lists, *args, **kwargs):
        if op == "grad_norm":
            return KERNELS[op](lists.grads, lists.params if any(kwargs.get("scaling", ())) else (), **kwargs)
        return KERNELS[op](lists.params, lists.backups, lists.grads, *args, **kwargs)

    monkeypatch.setattr(test_range, "through", through)
    return test_range


@pytest.mark.parametrize("name, storage, element, count, norm", test_range.NORMS, ids=[n[0] for n in test_range.NORMS])
def test_norm_over_the_range(name, storage, element, count, norm, in_range):
    in_range.test_norm_over_the_range(name, storage, element, count, norm, "triton")


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_perturbations_over_the_range(storage, in_range):
    in_range.test_perturbation_has_length_rho_over_the_range(storage, "triton")
    in_range.test_tiny_gradients_still_move(storage, "triton")
    in_range.test_zeros_among_gradients(storage, "triton")
    for perturb_eps in (0.0, 1e-12):
        in_range.test_zero_gradients_move_nothing(storage, perturb_eps, "triton")
    if storage.dtype in (torch.float16, torch.bfloat16):
        in_range.test_adaptive_products_of_halves_do_not_vanish(storage, "triton")
    else:
        in_range.test_one_huge_among_tiny(storage, "triton")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_not_finite_is_seen_anywhere_and_moves_nothing(bad, storage, in_range):
    in_range.test_not_finite_is_seen_anywhere_and_moves_nothing(bad, storage, "triton")


def test_the_rest_of_the_range(in_range):
    in_range.test_accumulators_of_fp64_meet("triton")
    in_range.test_rho_zero_is_bit_identical_whatever_the_gradients("triton")
    in_range.test_a_group_that_does_not_move_among_ones_that_do("triton")
    in_range.test_perturb_eps("triton")
    in_range.test_numbers_by_hand("triton")
    in_range.test_inv_scale_undoes_a_loss_scale("triton")
    in_range.test_inv_scale_saves_what_overflows_unscaled("triton")


def test_not_finite_gradients_in_the_last_pass(door):
    """They spoil the weights that they belong to and no others. A maximum with NaN on either side is NaN."""
    for case in (SGD_CASES[5], ADAM_CASES[2], ADAM_CASES[3]):
        lists = make_lists([Entry((33,))], [torch.float32], case)
        lists.grads[0][:3] = torch.tensor([math.inf, -math.inf, math.nan])
        if case is ADAM_CASES[3]:
            lists.max_exp_avg_sqs[0][7] = math.nan
        door(case, lists)
        finite = lists.params[0].isfinite()
        if case is ADAM_CASES[3]:
            assert lists.max_exp_avg_sqs[0].isnan().nonzero().reshape(-1).tolist() == [2, 7]
            finite[7] = True
        assert not bool(finite[:3].any()) and bool(finite[3:].all())


def test_a_norm_of_zero_moves_nothing_whatever_the_gradients(door):
    case = Case("zero", "perturb_", ((0.05, 1e-12),), norm=0.0)
    lists = make_lists([Entry((33,))], [torch.float32], case)
    before = lists.params[0].clone()
    door(case, lists)
    assert torch.equal(lists.params[0], before) and torch.equal(lists.backups[0], before)


def test_the_sign_of_zero(door):
    """A learning rate of 0 is -0 in front of the update, which leaves -0 what it is."""
    case = Case("still", "restore_sgd_", ((0.0, 0, 0, 0, 0, 0),))
    lists = make_lists([Entry((4,))], [torch.float32], case)
    lists.backups[0].fill_(-0.0)
    lists.grads[0].fill_(1.0)
    door(case, lists)
    assert bool(torch.signbit(lists.params[0]).all())


# ---- launches, and what is kept between them ---------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    names = []
    launch = triton_door._launch

    def record(kernel, *arguments, **constants):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_door, "_launch", record)
    return names


EXPECTED_LAUNCHES = {
    "grad_norm": ["sum_of_squares", "finish_norm"],
    "perturb_": ["perturb"],
    "restore_": ["restore"],
    "restore_accumulate_": ["restore_accumulate"],
    "restore_sgd_": ["restore_sgd"],
    "restore_adamw_": ["restore_adamw"],
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_set_of_one_dtype_is_four_launches_a_step_or_micro_batch(case, door, launched):
    """Whatever groups, options, sizes, alignments and missing buffers it mixes: two for the norm, one for each other pass."""
    lists = make_lists(FITTING, [torch.bfloat16], case)
    if case.op == "restore_sgd_" and len(case.hyper) == 3:
        lists.momentum_buffers[1::3] = [torch.empty(0)] * len(lists.momentum_buffers[1::3])
    door(case, lists)
    assert launched == EXPECTED_LAUNCHES[case.op]


def test_a_launch_for_each_signature(door, launched):
    """Four storage dtypes, dealt out in turn and twice over, are four launches; a copy asks for the size of an element only."""
    for case in WIDEST:
        launched.clear()
        door(case, make_lists(FITTING[1:9], [s.dtype for s in STORAGES], case))
        names = EXPECTED_LAUNCHES[case.op]
        assert launched == names[:1] * 4 + names[1:]


def step_rows(case: Case, entries=FITTING, **changes):
    lists = make_lists(entries, [torch.float32], case, **changes)
    return lists, Set(case, lists)


def test_first_steps_end_with_the_step_that_was_taken():
    """The table remembers on the device: not after a step that was skipped, and for all tensors."""
    entries = (Entry((5,)), Entry((32769,)), Entry((0,)), Entry((40000,)))
    case = Case("sgd", "restore_sgd_", ((0.1, 0.9, 0.5, 0, 0, 0),), first=(1, 1, 1, 0))
    lists, rows = step_rows(case, entries)
    for buffer in lists.momentum_buffers:
        buffer.fill_(100.0)
    ones = [torch.ones_like(param) for param in lists.params]
    rows.call.scalars["found_inf"] = torch.tensor(1.0)
    rows.run(ones)
    assert all(bool((buffer == 100).all()) for buffer in lists.momentum_buffers)
    rows.call.scalars["found_inf"].fill_(0.0)
    rows.run(ones)
    assert [float(b.amin()) for b in lists.momentum_buffers if b.numel()] == [1.0, 1.0, 90.5]
    assert [float(b.amax()) for b in lists.momentum_buffers if b.numel()] == [1.0, 1.0, 90.5]
    rows.run(ones)
    assert [float(b.amin()) for b in lists.momentum_buffers if b.numel()] == pytest.approx([1.4, 1.4, 81.95])
    assert int(rows.table.ticket()) == 0


def test_a_first_step_without_found_inf_is_remembered_too():
    case = Case("sgd", "restore_sgd_", ((0.1, 0.9, 0.5, 0, 0, 0),), first=(1,))
    lists, rows = step_rows(case)
    ones = [torch.ones_like(param) for param in lists.params]
    rows.run(ones)
    rows.run(ones)
    assert all(b.reshape(-1).tolist() == pytest.approx([1.4] * b.numel()) for b in lists.momentum_buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_advance_once_however_many_programs_read_them(dtype):
    case = Case("adamw", "restore_adamw_", ((0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0),), steps=(3.0, 7.0, 11.0))
    entries = (Entry((65537,)), Entry((0,)), Entry((3,)))
    lists = make_lists(entries, [torch.float32, torch.float32, torch.float64], case)
    lists.steps = [step.to(dtype) for step in lists.steps]
    rows = Set(case, lists)
    for taken in (1, 2):
        rows.run(lists.grads)
        assert [float(step) for step in lists.steps] == [3 + taken, 7 + taken, 11 + taken]
    rows.call.scalars["found_inf"] = torch.tensor(math.nan)
    rows.run(lists.grads)
    assert [float(step) for step in lists.steps] == [5, 9, 13] and int(rows.table.ticket()) == 0


def test_the_norm_is_the_same_on_every_run_and_through_both_doors():
    case = cases.NORM_CASES[2]
    lists = make_lists(LARGE, [torch.float32], case)
    rows = Set(case, lists)
    norms = {rows.run(lists.grads)[0].item() for _ in range(2)} | {by_lists(case, lists)[0].item()}
    assert len(norms) == 1


def test_addresses_and_hyper_parameters_are_uploaded_when_they_are_new(monkeypatch):
    uploads = []
    to_device = table.to_device
    monkeypatch.setattr(table, "to_device", lambda words, device: uploads.append(words.numel()) or to_device(words, device))
    lists, rows = step_rows(SGD_CASES[4])
    count = len(lists.params)
    rows.run(lists.grads)
    assert sorted(uploads) == sorted([count * 13 + count + 1, count, 6])
    rows.run(lists.grads)
    other = [grad.clone() for grad in lists.grads]
    assert len(uploads) == 3
    rows.run(other)
    rows.run(lists.grads)
    assert uploads[3:] == [count]
    rows.call.hyper[0, 0] = 0.25
    before, momentum = lists.params[4].clone(), lists.momentum_buffers[4]
    lists.backups[4].copy_(before)
    rows.run(lists.grads)
    assert uploads[3:] == [count, 6]
    assert torch.allclose(lists.params[4], before - 0.25 * momentum)
    for _ in range(2 * table._ADDRESS_VECTORS):
        other.append([grad.clone() for grad in lists.grads])  # kept alive, so that every vector is a new one
        rows.run(other[-1])
    assert len(rows.table._grads) == table._ADDRESS_VECTORS


def test_words_travel_as_arguments():
    """What a graph capture uses: any 64 bits, in launches of one compilation."""
    words = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 - 1, -(2**31), 16, 0x7F8DCAFE1230]
    bits = torch.tensor([0.1, -0.0, math.nan, math.inf], dtype=torch.float64).view(torch.int64).tolist()
    for count in (1, 64, 65, 200):
        values = torch.tensor(((words + bits) * 15)[:count], dtype=torch.int64)
        assert torch.equal(transfer.by_value(values, CPU), values)


@pytest.mark.parametrize("after", [False, True], ids=["before the launch", "after the launch"])
def test_an_interrupt_at_a_launch_leaves_the_weights_clean(after, monkeypatch):
    """The first signature's weights have moved at the second one's launch, and that one's own with it or not."""
    case = PERTURB_CASES[0]
    lists = make_lists(FITTING[1:9], [torch.float32, torch.bfloat16], case)
    before = lists.copies()
    rows = Set(case, lists)
    launch, kernels = triton_door._launch, []

    def fail_at_the_second(kernel, *arguments, **constants):
        kernels.append(kernel.fn.__name__)
        interrupted = len(kernels) == 2
        if after or not interrupted:
            launch(kernel, *arguments, **constants)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(triton_door, "_launch", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rows.run(lists.grads)
    assert kernels == ["perturb", "perturb"] + ["restore"] * (1 + after) and int(rows.cell) == 0
    assert all(torch.equal(a, b) for a, b in zip(lists.params, before.params, strict=True))


def test_tables_that_do_not_fit_are_refused_before_anything_is_written():
    case = Case("groups", "restore_sgd_", ((0.1, 0.9, 0, 0, 0, 0), (0.1, 0, 0, 0, 0, 0)))
    lists, rows = step_rows(case)
    before = lists.copies()
    for hyper in (rows.call.hyper[:1], rows.call.hyper[:, :5], rows.call.hyper.float(), rows.call.hyper[0]):
        rows.call.hyper, kept = hyper, rows.call.hyper
        with pytest.raises(ValueError, match=r"hyper: expected a float64 table \[2 or more, 6\] of lr, momentum"):
            rows.run(lists.grads)
        rows.call.hyper = kept
    lists.momentum_buffers[2] = torch.empty(0)
    with pytest.raises(ValueError, match=r"tensor 2: .*because its group has momentum"):
        Set(case, lists).run(lists.grads)
    assert all(torch.equal(a, b) for a, b in zip(lists.params, before.params, strict=True))


@pytest.mark.parametrize("case", ACCUMULATED, ids=str)
def test_accumulators_that_do_not_fit_are_refused_before_anything_is_written(case, door):
    lists = make_lists(FITTING, [torch.bfloat16], case)
    before, accumulators = lists.copies(), lists.accumulators
    halves = [accumulator.bfloat16() for accumulator in accumulators]
    for wrong in ([], [torch.empty(0)] * len(accumulators), halves, [*accumulators[:-1], accumulators[-1].double()]):
        lists.accumulators = wrong
        with pytest.raises(ValueError, match=r"accumulators: expected torch.float32 for tensor \d+"):
            door(case, lists)
    lists.accumulators = accumulators
    if case.op != "restore_accumulate_":
        without = {name: value for name, value in case.scalars.items() if name != "weight"}
        with pytest.raises(ValueError, match="accumulators: expected none for tensor 1 because there is no weight"):
            door(replace(case, scalars=without), lists)
    for role in (*takes(case), "steps"):
        assert all(torch.equal(a, b) for a, b in zip(lists.of(role), before.of(role), strict=True))


def test_powers_are_rounded_once():
    """Against exact rationals: the correctly rounded power, but for what is too close to the middle between two numbers."""
    bases = [0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 1.0, 0.0]
    for exponent in (0, 1, 2, 3, 10, 1000, 4097):
        for base in bases:
            found = torch.full((), math.nan, dtype=torch.float64)
            triton_arithmetic.write_power[(1,)](found, torch.tensor(base, dtype=torch.float64), exponent)
            assert float(found) == float(Fraction(base) ** exponent), (base, exponent)
