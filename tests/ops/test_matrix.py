"""Every operation over dtype x layout x size x backend, against long double with a running error bound."""

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

import numpy as np
import pytest
import torch

from tests.ops import cases, oracle
from tests.ops import runner as run_ops
from tests.ops.cases import ADAM_CASES, CASES, NORM_CASES, SGD_CASES, STORAGE_OF, STORAGES, Case
from tests.ops.oracle import Expected, Rounding
from tests.ops.runner import Lists, deal, make_lists, period, run, takes, uses_amsgrad, uses_momentum


def nth(dealt: Sequence, index: int):
    return dealt[index % len(dealt)] if dealt else 0


def _expected(case: Case, before: Lists, index: int, runner: str) -> dict[str, Expected]:
    """What each list that the operation takes must hold for one parameter, ``index`` being its place in the list."""
    storage = STORAGE_OF[before.params[0].dtype]
    rounding = Rounding.of(*cases.intermediate(runner, storage))
    row = nth(case.hyper, index)
    same = {role: Expected(oracle.exact(before.of(role)[0]), 0.0) for role in takes(case)}
    w, g = before.backups[0], before.grads[0] if before.grads else None
    if case.op == "perturb_":
        clean = before.params[0]
        moved = oracle.perturbed(clean, g, case, row, nth(case.scaling, index), rounding)
        return same | {"params": moved, "backups": Expected(oracle.exact(clean), 0.0)}
    if case.op == "restore_" or case.scalars.get("found_inf"):
        return same | {"params": Expected(oracle.exact(w), 0.0)}
    if case.op == "restore_accumulate_":
        # Sums are kept in the arithmetic's dtype by every backend.
        total = oracle.accumulated(g, before.accumulators[0], case, Rounding.of(storage.arithmetic, 1.0))
        return same | {"params": Expected(oracle.exact(w), 0.0), "accumulators": Expected.of(total)}
    g = oracle.accumulated(g, before.accumulators[0] if before.accumulators else None, case, rounding)
    if case.op == "restore_sgd_":
        result = oracle.sgd(w, g, before.momentum_buffers[0], case, row, nth(case.first, index), rounding)
        found = same | {"params": result.w} | ({"momentum_buffers": result.v} if result.v else {})
    else:
        state = (before.exp_avgs[0], before.exp_avg_sqs[0], before.max_exp_avg_sqs[0])
        result = oracle.adam(w, g, *state, nth(case.steps, index) + 1, case, row, rounding)
        found = same | {"params": result.w, "exp_avgs": result.m, "exp_avg_sqs": result.v}
        found |= {"max_exp_avg_sqs": result.largest} if result.largest else {}
    return found | ({"backups": found["params"]} if case.in_place else {})


def _alike(case: Case, lists: Lists) -> dict[tuple[torch.dtype, int], list[int]]:
    """Places in the list that share a dtype and everything that a case deals out: one computation serves them."""
    period = lcm(*(max(len(dealt), 1) for dealt in (case.hyper, case.scaling, case.first, case.steps)))
    groups: dict[tuple[torch.dtype, int], list[int]] = {}
    for index, param in enumerate(lists.params):
        groups.setdefault((param.dtype, index % period), []).append(index)
    return groups


def _joined(case: Case, lists: Lists, indices: list[int]) -> Lists:
    joined = Lists()
    for role in takes(case):
        setattr(joined, role, [torch.cat([lists.of(role)[i].reshape(-1) for i in indices])])
    return joined


def check(case: Case, runner: str, lists: Lists) -> None:
    before, addresses = lists.copies(), lists.addresses()
    run(case, runner, lists)
    assert lists.addresses() == addresses
    for (dtype, _), indices in _alike(case, lists).items():
        after = _joined(case, lists, indices)
        for role, expected in _expected(case, _joined(case, before, indices), indices[0], runner).items():
            ratios = expected.ratios(after.of(role)[0])
            worst = float(ratios.max(initial=0))
            if worst > 1:
                ends = np.cumsum([lists.params[i].numel() for i in indices])
                index = indices[int(np.searchsorted(ends, int(ratios.argmax()), side="right"))]
                got = lists.of(role)[index]
                pytest.fail(
                    f"{role}[{index}] {dtype} {tuple(got.shape)} {got.stride()}: off by {worst:.3g} times what is allowed"
                )
    if case.op == "restore_adamw_":
        taken = 0 if case.scalars.get("found_inf") else 1
        assert [float(s) for s in lists.steps] == [float(s) + taken for s in before.steps]
    assert lists.gaps_are_untouched()


def check_norm(case: Case, runner: str, lists) -> None:
    before = lists.copies()
    norm, found_inf = run(case, runner, lists)
    storages = [STORAGE_OF[g.dtype] for g in lists.grads]
    wide = any(g.dtype == torch.float64 for g in lists.grads)
    assert norm.dtype == (torch.float64 if wide else torch.float32) and norm.shape == () and found_inf.dtype == torch.float32
    scaling = deal(case.scaling, len(before.params))
    wanted = oracle.norm(before.grads, before.params, before.accumulators, scaling, case)
    tolerance = max((s.norm_tolerance for s in storages), default=0.0)
    assert abs(float(norm) - wanted) <= tolerance * wanted
    assert float(found_inf) == 0
    for role in ("params", "grads", "accumulators"):
        assert all(torch.equal(a, b) for a, b in zip(lists.of(role), before.of(role), strict=True))
    assert lists.gaps_are_untouched()


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case, storage, runner):
    lists = make_lists(cases.ENTRIES, [storage.dtype], case)
    (check_norm if case.op == "grad_norm" else check)(case, runner, lists)


@pytest.mark.parametrize("case", cases.WIDEST, ids=str)
def test_large(case, runner):
    """Chunks and threads. The dtypes in turn, forwards and backwards, so that more than one meets each size."""
    torch.set_num_threads(2)
    for dtypes in ([s.dtype for s in STORAGES], [s.dtype for s in reversed(STORAGES)]):
        lists = make_lists(cases.LARGE, dtypes, case, periodic=True)
        if case.op == "grad_norm":
            check_norm(case, runner, lists)
            continue
        run(case, runner, lists)
        for index, param in enumerate(lists.params):
            before = Lists(**{role: [period(role, param.dtype)] for role in takes(case)})
            for role, expected in _expected(case, before, index, runner).items():
                ratios = expected.ratios(lists.of(role)[index].reshape(-1))
                assert ratios.max() <= 1, f"{role}[{index}] {param.dtype} {tuple(param.shape)} from {ratios.argmax()} on"
        assert lists.gaps_are_untouched()


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_lists_that_fit_take_the_fast_way(storage, needs_native):
    """Otherwise the matrix would test one door twice."""
    case = SGD_CASES[3]
    lists = make_lists(cases.FITTING, [storage.dtype], case)
    tensors = run_ops.prepare(case, run_ops.Call.of(case, len(lists.params)), lists)
    assert tensors.checked(lists.grads).addresses is not None


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fitting_lists(case, storage, needs_native):
    """The matrix's lists hold tensors with gaps, which a TensorSet hands to the list operations: these it does not."""
    lists = make_lists(cases.FITTING, [storage.dtype], case, seed=2)
    (check_norm if case.op == "grad_norm" else check)(case, "prepared", lists)


@pytest.mark.parametrize("name", ["many_small", "all_empty", "nothing"])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_list_lengths(name, storage, runner):
    for case in cases.WIDEST:
        if runner.startswith("prepared") and name == "nothing":
            continue
        lists = make_lists(cases.LISTS[name], [storage.dtype], case)
        if case.op == "grad_norm" and name == "nothing":
            norm, found_inf = run(case, runner, lists)
            assert float(norm) == 0 and float(found_inf) == 0
            continue
        (check_norm if case.op == "grad_norm" else check)(case, runner, lists)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixed_dtypes_in_a_list(case, runner):
    """A dtype belongs to a tensor and not to its list: the first one's must not be taken for all."""
    lists = make_lists(cases.ENTRIES[1:9], [s.dtype for s in STORAGES], case)
    (check_norm if case.op == "grad_norm" else check)(case, runner, lists)


def replace_values(lists: Lists, roles: Sequence[str]) -> Lists:
    """The values as fp32 arithmetic reads them."""
    for role in roles:
        setattr(lists, role, [t.float() for t in lists.of(role)])
    return lists


@pytest.mark.parametrize("weight", STORAGES, ids=lambda s: f"w-{s.name}")
@pytest.mark.parametrize("other", STORAGES, ids=lambda s: f"other-{s.name}")
def test_mixed_dtypes_of_one_parameter(weight, other, backend):
    """Half weights with fp32 gradients and state, and every other mix. The backup has the weight's dtype, always."""
    roles = ("grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    for case in (*cases.PERTURB_CASES, SGD_CASES[4], SGD_CASES[8], ADAM_CASES[3]):
        lists = make_lists(cases.ENTRIES[:8], [weight.dtype], case)
        for role in roles:
            setattr(lists, role, [t.to(other.dtype) for t in lists.of(role)])
        if weight.dtype == torch.float64 or other.dtype != torch.float64:
            check(case, backend, lists)
            continue
        # fp64 gradients and state beside narrower weights are computed in fp32: their results are held to what fp32 can say.
        before = _joined(case, lists, list(range(len(lists.params))))
        uniform = replace(case, hyper=case.hyper[:1], scaling=case.scaling[:1], first=case.first[:1])
        narrowed = replace_values(before, roles)
        run(uniform, backend, lists)
        after = _joined(case, lists, list(range(len(lists.params))))
        for role, expected in _expected(uniform, narrowed, 0, backend).items():
            found = after.of(role)[0]
            if role in ("params", "backups"):
                assert expected.ratios(found).max() <= 1
            elif role != "grads":
                allowed = expected.error + cases.FP32.roundoff * np.abs(expected.value)
                assert (np.abs(oracle.exact(found) - expected.value) <= allowed).all()


def test_restore_is_bitwise_for_every_value(runner):
    """Negative zero, subnormals, infinities and NaN payloads are copied, not computed."""
    for integer, dtype in ((torch.int16, torch.float16), (torch.int16, torch.bfloat16)):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(integer)
        lists = run_ops.Lists(params=[torch.zeros(2**16, dtype=dtype)], backups=[every.view(dtype).clone()])
        run(Case("restore", "restore_"), runner, lists)
        assert torch.equal(lists.params[0].view(integer), every)
    for integer, dtype in ((torch.int32, torch.float32), (torch.int64, torch.float64)):
        bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (5000,), dtype=integer)
        lists = run_ops.Lists(params=[torch.zeros(5000, dtype=dtype)], backups=[bits.view(dtype).clone()])
        run(Case("restore", "restore_"), runner, lists)
        assert torch.equal(lists.params[0].view(integer), bits)


def test_every_norm_case_of_one_tensor_is_the_same_through_both_doors(needs_native):
    for case in NORM_CASES:
        for storage in STORAGES:
            lists = make_lists(cases.FITTING, [storage.dtype], case)
            assert torch.equal(run(case, "native", lists)[0], run(case, "prepared", lists)[0])


def test_unused_state_may_be_missing_or_empty(backend):
    """A group without momentum needs no buffer: an empty tensor stands for it."""
    case = Case("mixed", "restore_sgd_", ((0.1, 0.9, 0, 0, 0, 0), (0.1, 0, 0, 0, 0, 0)))
    lists = make_lists(cases.ENTRIES[1:5], [torch.float32], case)
    lists.momentum_buffers[1::2] = [torch.empty(0), torch.empty(0)]
    assert uses_momentum(case) and not uses_amsgrad(ADAM_CASES[0])
    want = make_lists(cases.ENTRIES[1:5], [torch.float32], case)
    run(case, backend, lists)
    run(case, backend, want)
    assert all(torch.equal(a, b) for a, b in zip(lists.params, want.params, strict=True))
    assert all(t.numel() == 0 for t in lists.momentum_buffers[1::2])
