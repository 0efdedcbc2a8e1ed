"""The CUDA library's own sources, run on the CPU: the same bits as the CPU's kernels in any order, launches, tables, errors.

What each operation computes is tested by `pytest tests/ops --backends emulated`, with and without sanitizers; this is about
what only these kernels have.
"""

import itertools
import math

import pytest
import torch

from sam_fused import SAM, ops
from sam_fused.ops import prepared
from sam_fused.ops.hyper import HyperTable
from sam_fused.ops.prepared import Factors, TensorSet
from sam_fused.ops.rows import CHUNK, FIRST, ROW_WORDS, build_rows
from tests.kernels import emulated_backend
from tests.kernels.build_emulated import ORDERS
from tests.ops.cases import CASES, ENTRIES, FITTING, LARGE, STORAGES, WIDEST, Entry
from tests.ops.digest import digest, lists_for
from tests.ops.runner import make_lists, run, table, takes
from tests.optim.helpers import Regression, take_step

# With SAM_FUSED_SMALL_ARGUMENTS (csrc/cuda/arguments.h): gradients and words a launch takes, elements of a block's chunk, and
# blocks of a norm.
GRADIENTS, WORDS, BLOCK_CHUNK, NORM_SUMS = 37, 53, 1024, 5
EVERY_ORDER = list(itertools.product(ORDERS, ORDERS))
SGD, ADAM = [[0.1, 0.9, 0.3, 0.01, 0, 0]], [[0.01, 0.9, 0.999, 1e-8, 0.1, 1, 1, 0]]
PERTURB = table([[0.05, 1e-12]])


def bits(tensor):
    """With every NaN the same: which payload an operation on two of them keeps is the machine's choice."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).contiguous()
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def same_bits(one, other):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def written(case, lists):
    return [t for role in takes(case) for t in lists.of(role)] + lists.steps


# ---- the same bits as the CPU's kernels ------------------------------------------------------------------------------------

ELEMENTWISE = [case for case in CASES if case.op != "grad_norm"]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_the_same_bits_as_on_the_cpu(case, emulated):
    dtypes = [storage.dtype for storage in STORAGES]
    for entries, dealt in ((ENTRIES, dtypes), (FITTING, dtypes[2:] + dtypes[:2]), *((FITTING, [dtype]) for dtype in dtypes)):
        ours, theirs = (make_lists(entries, dealt, case, seed=5) for _ in range(2))
        run(case, "emulated", ours)
        run(case, "native", theirs)
        assert same_bits(written(case, ours), written(case, theirs))


@pytest.mark.parametrize("case", [c for c in WIDEST if c.op != "grad_norm"], ids=str)
@pytest.mark.parametrize("which", ["large", "mixed"])
def test_the_same_bits_over_chunks_and_conversions(case, which, emulated):
    ours, theirs = lists_for(case, which), lists_for(case, which)
    run(case, "emulated", ours)
    run(case, "native", theirs)
    assert same_bits(written(case, ours), written(case, theirs))


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-310, 6e-8, 65504.0, 3e38, 1.7e308, 2.0**-149]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_the_same_bits_for_what_arithmetic_does_not_like(case, storage, emulated):
    pairs = list(itertools.product(SPECIAL, SPECIAL))
    ours, theirs = (make_lists((Entry((len(pairs),)),) * 6, [storage.dtype], case) for _ in range(2))
    for lists in (ours, theirs):
        for index in range(6):
            lists.params[index].copy_(torch.tensor([a for a, _ in pairs], dtype=torch.float64))
            if lists.grads:
                lists.grads[index].copy_(torch.tensor([b for _, b in pairs], dtype=torch.float64))
            if lists.accumulators:
                lists.accumulators[index].copy_(torch.tensor([a for a, _ in pairs], dtype=torch.float64).roll(index))
            if lists.backups and not case.in_place:
                lists.backups[index].copy_(lists.params[index])
    run(case, "emulated", ours)
    run(case, "native", theirs)
    assert same_bits(written(case, ours), written(case, theirs))


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "grad_norm"], ids=str)
def test_norms_agree_with_the_cpus(case, emulated):
    for storage in STORAGES:
        lists = make_lists(LARGE, [storage.dtype], case, periodic=True)
        ours, theirs = run(case, "emulated", lists)[0], run(case, "native", lists)[0]
        assert ours.dtype == theirs.dtype and float(ours) == pytest.approx(float(theirs), rel=storage.norm_tolerance)


# ---- any order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_no_result_depends_on_the_order_of_threads_or_blocks(case, emulated):
    found = set()
    for seed, (threads, blocks) in enumerate(EVERY_ORDER):
        emulated.set_orders(threads, blocks, seed)
        lists = lists_for(case, "fitting")
        found.add(digest(case, lists, run(case, "emulated", lists)))
    assert len(found) == 1


@pytest.mark.parametrize("case", [c for c in WIDEST if c.op != "grad_norm"], ids=str)
def test_no_element_depends_on_the_size_of_a_block(case, emulated):
    """The norm's sum does, and a block has one size outside of tests."""
    found = set()
    for threads in (32, 64, 256):
        emulated.set_threads_per_block(threads)
        lists = lists_for(case, "fitting")
        found.add(digest(case, lists, run(case, "emulated", lists)))
    assert len(found) == 1


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
def test_the_norm_is_right_for_every_size_of_a_block(threads, emulated):
    emulated.set_threads_per_block(threads)
    grads = [torch.randn(size) for size in (CHUNK + 5, 3, 0, 40_000)] + [torch.randn(50, dtype=torch.float64)]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(ops.grad_norm(grads, backend="emulated")[0]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("chunks", [*range(1, 3 * NORM_SUMS + 2), 40])
def test_the_norm_sums_every_chunk_once_however_they_are_dealt_out(chunks, emulated):
    """Chunks of several tensors, empty ones among them, over fewer blocks: each element is a power of two of its own."""
    for ragged in (0, 1, BLOCK_CHUNK - 1):
        sizes = [0, BLOCK_CHUNK * (chunks // 2) + ragged, 0, 0, BLOCK_CHUNK * (chunks - chunks // 2), 0, 3]
        grads = [torch.randint(1, 9, (size,)).float() for size in sizes]
        wanted = sum(int(g.long().square().sum()) for g in grads)
        assert float(ops.grad_norm(grads, backend="emulated")[0]) == float(
            torch.tensor(wanted, dtype=torch.float64).sqrt().float()
        )


def test_a_norm_after_a_larger_one_adds_nothing_of_it(emulated):
    """The sums are never cleared."""
    ones = [torch.ones(BLOCK_CHUNK * 7 + 1), torch.ones(9, dtype=torch.float64)]
    tensors = TensorSet(ones, ones, backend="emulated")
    for grads, wanted in (([g * 1e200 for g in ones], None), (ones, math.sqrt(BLOCK_CHUNK * 7 + 10))):
        norm, _ = tensors.grad_norm(tensors.checked(grads))
        assert wanted is None or float(norm) == pytest.approx(wanted, rel=1e-15)


# ---- launches and tables ---------------------------------------------------------------------------------------------------


def sgd_set(sizes, **options):
    params = [torch.randn(size) for size in sizes]
    states = ([torch.zeros_like(p) for p in params],)
    return TensorSet(params, [p.clone() for p in params], backend="emulated", states=states, **options)


def adam_set(sizes, **options):
    params = [torch.randn(size) for size in sizes]
    states = tuple([torch.zeros_like(p) for p in params] for _ in range(3))
    steps = [torch.tensor(float(index)) for index in range(len(params))]
    return TensorSet(params, [p.clone() for p in params], backend="emulated", states=states, steps=steps, **options)


def launches(emulated, call):
    emulated.set_orders()
    call()
    return emulated.launches


@pytest.mark.parametrize("count", [1, GRADIENTS, GRADIENTS + 1, 3 * GRADIENTS, 3 * GRADIENTS + 1])
def test_one_launch_an_operation_for_every_table_full_of_tensors(count, emulated):
    sizes = [(index % 5) * 7 for index in range(count)]
    if count == 1:
        sizes = [9]
    wanted = -(-count // GRADIENTS)
    for tensors, step, hyper in ((sgd_set(sizes), "restore_sgd_", SGD), (adam_set(sizes), "restore_adamw_", ADAM)):
        grads = tensors.checked([torch.randn_like(p) for p in tensors.params])
        assert grads.addresses is not None
        assert launches(emulated, lambda t=tensors, g=grads: t.grad_norm(g)) == wanted
        assert launches(emulated, lambda t=tensors, g=grads: t.perturb_(g, torch.tensor(1.0), PERTURB)) == wanted
        assert launches(emulated, lambda t=tensors: t.restore_()) == wanted
        table_of = HyperTable().update(hyper).on(torch.device("cpu"))
        assert launches(emulated, lambda t=tensors, g=grads, s=step, h=table_of: getattr(t, s)(g, h)) == wanted


def test_a_table_is_written_once_for_a_set_and_for_every_call_of_a_list(emulated):
    count = 20
    words = 1 + (count + 1) + count * ROW_WORDS
    writes = -(-words // WORDS)
    assert launches(emulated, lambda: sgd_set([5] * count)) == writes
    params = [torch.ones(5) for _ in range(count)]
    assert launches(emulated, lambda: ops.restore_(params, [torch.zeros(5)] * count, backend="emulated")) == writes + 1


def test_a_large_table_of_hyper_parameters_is_uploaded(emulated):
    """More groups than fit into the arguments: each tensor still gets its own row."""
    count = 30
    params, grads = [torch.zeros(3) for _ in range(count)], [torch.ones(3) for _ in range(count)]
    hyper = table([[float(index + 1), 0, 0, 0, 0, 0] for index in range(count)])
    ops.restore_sgd_(params, params, grads, [], hyper, list(range(count)), backend="emulated")
    assert [p.tolist() for p in params] == [[-float(index + 1)] * 3 for index in range(count)]


@pytest.mark.parametrize("order", EVERY_ORDER, ids="-".join)
def test_step_counts_advance_once_however_many_launches_and_chunks(order, emulated):
    emulated.set_orders(*order, seed=3)
    sizes = [0] * 40 + [CHUNK + 1, 3, 2 * CHUNK, 0, 1] + [0] * 40
    tensors = adam_set(sizes)
    hyper = HyperTable().update(ADAM).on(torch.device("cpu"))
    for taken in (1, 2):
        tensors.restore_adamw_(tensors.checked([torch.ones_like(p) for p in tensors.params]), hyper)
        assert [float(step) for step in tensors.steps] == [float(index + taken) for index in range(len(sizes))]
    skipped = Factors(found_inf=torch.tensor(1.0))
    tensors.restore_adamw_(tensors.checked([torch.ones_like(p) for p in tensors.params]), hyper, skipped)
    assert [float(step) for step in tensors.steps] == [float(index + 2) for index in range(len(sizes))]


def rows_on_the_device(tensors):
    count = len(tensors.params)
    start = 1 + count + 1
    return tensors._fast.table[start : start + count * ROW_WORDS].view(count, ROW_WORDS)


def test_the_device_forgets_by_itself_that_buffers_are_new(emulated):
    """Dampening is ignored in the first step that is taken, and a skipped one is not taken; the host is not asked."""
    tensors = sgd_set([70, 3, 0, CHUNK + 2] * 12, first=[1, 0, 1, 1] * 12)
    hyper = HyperTable().update(SGD).on(torch.device("cpu"))
    grads = [torch.ones_like(p) for p in tensors.params]

    def step(found_inf):
        tensors.restore_sgd_(tensors.checked(grads), hyper, Factors(found_inf=torch.tensor(found_inf)))

    step(math.inf)
    assert rows_on_the_device(tensors)[:, FIRST].tolist() == [1, 0, 1, 1] * 12
    assert all(bool((v == 0).all()) for v in tensors.states[0])
    step(0.0)
    assert rows_on_the_device(tensors)[:, FIRST].tolist() == [0] * 48
    first, later = tensors.states[0][0].mean(), tensors.states[0][1].mean()
    assert float(first) == pytest.approx(1.0, abs=0.1) and float(later) == pytest.approx(0.7, abs=0.1)


def test_tickets_are_back_at_zero(emulated):
    tensors = adam_set([5] * 50)
    grads = tensors.checked([torch.ones_like(p) for p in tensors.params])
    tensors.grad_norm(grads)
    tensors.restore_adamw_(grads, HyperTable().update(ADAM).on(torch.device("cpu")))
    assert int(tensors._fast.table[0]) == 0


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_more_chunks_than_a_launch_can_have_are_refused_before_anything_is_written(emulated):
    numel = BLOCK_CHUNK * 2**31
    rows = build_rows({"weight": [torch.ones(1)], "backup": [torch.zeros(1)]}, [numel])
    with pytest.raises(RuntimeError, match=r"at most 2147483647 chunks of 1024 elements in a call, got 2147483648: split"):
        torch.ops.sam_fused.emulated_device_table(rows, torch.empty(0))
    rows[0, 0] = 2**62
    with pytest.raises(RuntimeError, match="split the tensors"):
        torch.ops.sam_fused.emulated_device_table(rows, torch.empty(0))


def test_a_table_of_other_rows_is_refused(emulated):
    rows = build_rows({"weight": [torch.ones(3)], "backup": [torch.zeros(3)]}, [3])
    cell = torch.zeros(1, dtype=torch.int64)
    made = torch.ops.sam_fused.emulated_device_table(rows, torch.empty(0))
    for wrong in (None, made[1:], made.double(), torch.cat([made, made])):
        with pytest.raises(RuntimeError, match="device table"):
            torch.ops.sam_fused.emulated_prepared_restore_(rows, cell, wrong)


class FailingDoor(emulated_backend.EmulatedDoor):
    """The launch of the operation named by ``at`` fails."""

    LAUNCH_FAILURE = 719

    def __init__(self, library):
        self.library, self.at = library, None

    def __getattr__(self, name):
        if name == self.at:
            self.library.fail_next_launch(self.LAUNCH_FAILURE)
        return super().__getattr__(name)


@pytest.mark.parametrize("at", ["grad_norm_", "perturb_", "restore_sgd_"])
@pytest.mark.parametrize("form", ["closure", "perturbed", "first_second"])
def test_a_launch_that_fails_leaves_clean_weights_and_a_usable_optimizer(at, form, emulated, monkeypatch):
    door = FailingDoor(emulated)
    monkeypatch.setitem(prepared.DOORS, "emulated", door)
    case = Regression(torch.float32)
    optimizer = SAM(case.params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="emulated")
    take_step(optimizer, form, case.evaluate)
    clean = [p.detach().clone() for p in case.params]
    door.at = at
    with pytest.raises(RuntimeError, match=r"unspecified launch failure.*CUDA_LAUNCH_BLOCKING"):
        take_step(optimizer, form, case.evaluate)
    door.at = None
    optimizer.restore()  # by hand, `first_step` may have moved them: that is what this is for
    assert same_bits(case.params, clean)
    optimizer.zero_grad()
    take_step(optimizer, form, case.evaluate)
    assert not same_bits(case.params, clean)


@pytest.mark.parametrize("backup_exists", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_later_launch_that_fails_leaves_no_weight_moved(before, backup_exists, emulated):
    """More tensors than one launch takes: what the launches before it have moved is brought back."""
    count = 3 * GRADIENTS
    params, grads = [torch.randn(5) for _ in range(count)], [torch.ones(5) for _ in range(count)]
    clean = [p.clone() for p in params]
    backups = [p.clone() if backup_exists else torch.zeros(5) for p in params]
    writes = launches(emulated, lambda: ops.restore_(params, params, backend="emulated")) - 3
    emulated.fail_next_launch(FailingDoor.LAUNCH_FAILURE, writes + before)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        ops.perturb_(params, backups, grads, torch.tensor(1.0), PERTURB, backup_exists=backup_exists, backend="emulated")
    assert same_bits(params, clean)
    ops.perturb_(params, backups, grads, torch.tensor(1.0), PERTURB, backend="emulated")
    assert not any(torch.equal(p, c) for p, c in zip(params, clean, strict=True)) and same_bits(backups, clean)
