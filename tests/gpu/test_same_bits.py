"""The CPU's bits: the same inputs through the CPU's native kernels and through a card's, element by element."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from sam_fused.ops import native
from sam_fused.ops.backends import available_backends, choose
from tests.gpu.problems import BACKENDS, DEVICE
from tests.ops import runner
from tests.ops.cases import CASES, ENTRIES, FITTING, LARGE, LISTS, SENTINEL, STORAGES, WIDEST, Entry
from tests.ops.runner import Lists, make_lists, run, takes

DOORS = {"lists": "{}", "prepared": "prepared-{}"}
LAID_OUT = {"any layout": ENTRIES, "fitting": FITTING}
DTYPES = [storage.dtype for storage in STORAGES]


@pytest.fixture(autouse=True)
def _needs_the_cpus_kernels():
    reason = native.status().reason
    assert reason is None, f"nothing to compare with: {reason}"


@pytest.fixture(params=DOORS.values(), ids=DOORS)
def door(request, kernels):
    return request.param.format(kernels)


def moved(lists: Lists, case) -> Lists:
    """The lists on the card: each block of memory as a whole, and the same views into it."""
    there = Lists(steps=[step.to(DEVICE) for step in lists.steps])
    held = iter(lists.held)
    for role in takes(case):
        if role == "backups" and case.in_place:
            there.backups = list(there.params)
            continue
        for tensor in lists.of(role):
            view, block = next(held)
            assert view is tensor
            block = block.to(DEVICE)
            tensor = block.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            there.of(role).append(tensor)
            there.held.append((tensor, block))
    return there


def bits(tensor):
    """As integers, every NaN the same one."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).cpu().contiguous()
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def same(case, door, lists: Lists, on_card=None) -> None:
    """``on_card`` is a context for the card's call."""
    there = moved(lists, case)
    wanted = run(case, "native", lists)
    with DEVICE, on_card or nullcontext():
        found = run(case, door, there)
    if wanted is not None:
        norm, wanted_norm = float(found[0]), float(wanted[0])
        assert norm == pytest.approx(wanted_norm, rel=1e-6, abs=0) and found[0].dtype == wanted[0].dtype
        assert float(found[1]) == float(wanted[1])
    for role in (*takes(case), "steps"):
        for index, (ours, cpu) in enumerate(zip(there.of(role), lists.of(role), strict=True)):
            differ = int((bits(ours) != bits(cpu)).sum())
            assert differ == 0, f"{role}[{index}] {cpu.dtype} {tuple(cpu.shape)} {cpu.stride()}: {differ} elements differ"
    assert there.gaps_are_untouched()


def test_both_backends_serve_this_card_and_native_is_chosen():
    """Elsewhere a backend that is missing is skipped; here it is what is wrong."""
    served = available_backends(DEVICE)
    assert [served[name] for name in BACKENDS] == [None, None]
    assert choose(torch.device("cuda", torch.cuda.current_device())) == "native"


def skip_if_not_prepared(case, door):
    if case.backup_exists and door.startswith("prepared"):
        pytest.skip("the prepared door has no backup_exists")


@pytest.mark.parametrize("entries", LAID_OUT.values(), ids=LAID_OUT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case, entries, door):
    skip_if_not_prepared(case, door)
    for dtype in DTYPES:
        same(case, door, make_lists(entries, [dtype], case))


@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_large(case, door):
    skip_if_not_prepared(case, door)
    for dtypes in (DTYPES, DTYPES[::-1]):
        same(case, door, make_lists(LARGE, dtypes, case, periodic=True))


@pytest.mark.parametrize("name", ["many_small", "all_empty"])
@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_list_lengths(case, name, door):
    skip_if_not_prepared(case, door)
    same(case, door, make_lists(LISTS[name], DTYPES, case))


@pytest.mark.parametrize("case", WIDEST, ids=str)
def test_more_tensors_than_a_launch_has_room_for(case, door):
    """Native: 3,712 gradient addresses; a second launch takes the rest, and the last of them ends the operation."""
    skip_if_not_prepared(case, door)
    same(case, door, make_lists([Entry((1 + index % 3,)) for index in range(3712 + 40)], DTYPES[:1], case))


@pytest.mark.parametrize("case", [case for case in WIDEST if case.op != "restore_"], ids=str)
def test_mixed_dtypes_of_one_parameter(case, kernels):
    """Half weights with gradients and state of other dtypes, through conversions element by element."""
    for weight in DTYPES:
        for other in DTYPES:
            lists = make_lists([Entry((size,)) for size in (1, 7, 513, 1030)], [weight], case)
            for role in ("grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
                setattr(lists, role, [t.to(other) for t in lists.of(role)])
            lists.held = [(t, t) for role in takes(case) for t in lists.of(role)]
            same(case, kernels, lists)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.hyper) > 1 or (case in WIDEST and case.hyper)], ids=str)
def test_hyper_parameters_that_live_on_the_card(case, door, monkeypatch):
    skip_if_not_prepared(case, door)
    table = runner.table

    @contextmanager
    def tables_on_the_card():
        with monkeypatch.context() as patch:
            patch.setattr(runner, "table", lambda rows: table(rows).to(DEVICE))
            yield

    same(case, door, make_lists(FITTING, DTYPES, case), tables_on_the_card())


@pytest.mark.parametrize("past", [1, 2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if "weight" in case.scalars], ids=str)
def test_accumulators_at_any_address(case, past, door):
    """Beside operands that are aligned. Eight halves have 32 bytes of accumulators, of which 16 are known to be aligned."""
    for dtype in DTYPES:
        lists = make_lists([Entry((size,)) for size in (1, 7, 513, 8197)], [dtype], case)
        del lists.held[-len(lists.accumulators) :]
        for index, values in enumerate(lists.accumulators):
            block = torch.full((past + values.numel() + 1,), SENTINEL, dtype=values.dtype)
            lists.accumulators[index] = block[past:-1].copy_(values)
            lists.held.append((lists.accumulators[index], block))
        same(case, door, lists)


EXTREME = {
    torch.float32: (0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, -1e30, 1.0, float("inf"), float("nan")),
    torch.float64: (0.0, -0.0, 5e-324, -1e-310, 2.3e-308, 1.7e308, -1e200, 1.0, float("inf"), float("nan")),
    torch.bfloat16: (0.0, -0.0, 9.2e-41, -1e-39, 1.2e-38, 3.3e38, -1e30, 1.0, float("inf"), float("nan")),
    torch.float16: (0.0, -0.0, 6e-8, -1e-5, 6.2e-5, 65504.0, -1e4, 1.0, float("inf"), float("nan")),
}


@pytest.mark.parametrize("case", [case for case in WIDEST if case.op not in ("restore_", "grad_norm")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormals_signed_zeros_and_what_is_not_finite(case, dtype, door):
    """Every extreme weight meets every extreme gradient: nothing is flushed to zero on the way."""
    skip_if_not_prepared(case, door)
    lists = make_lists([Entry((100,))], [dtype], case)
    extreme = torch.tensor(EXTREME[dtype], dtype=dtype)
    for role, spread in (("params", True), ("backups", True), ("grads", False)):
        for tensor in lists.of(role):
            tensor.copy_(extreme.repeat_interleave(10) if spread else extreme.repeat(10))
    same(case, door, lists)
