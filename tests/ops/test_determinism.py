"""The same bits for any number of threads, any order of pieces, either door, and from every compilation."""

from dataclasses import replace

import pytest
import torch

from sam_fused import ops
from sam_fused.ops import native
from tests.ops import digest
from tests.ops.cases import FP32, WIDEST, Entry
from tests.ops.runner import Lists, make_lists, run, takes


@pytest.mark.cpu_only
@pytest.mark.parametrize("runner", ["native", "prepared"])
def test_any_number_of_threads(runner, needs_native):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(digest.digests(runner, ("large",)))
    assert found[0] == found[1] == found[2]


def test_both_doors(needs_native):
    torch.set_num_threads(2)
    lists, prepared = digest.digests("native", ("large", "fitting")), digest.digests("prepared", ("large", "fitting"))
    assert prepared == {key: lists[key] for key in prepared}


def test_the_same_again(needs_native):
    """Pieces are taken by whichever thread comes first: the order of the norm's sum must not follow."""
    torch.set_num_threads(3)
    grads = [torch.randn(300_001), torch.randn(5), torch.randn(99_999, dtype=torch.float64)]
    norms = {ops.grad_norm(grads, backend="native")[0].item() for _ in range(30)}
    assert len(norms) == 1


def test_the_norm_does_not_depend_on_where_a_tensor_lies(needs_native):
    """Lanes are counted from a tensor's beginning and not from an aligned address."""
    block = torch.randn(5000)
    norms = set()
    for offset in range(9):
        shifted = torch.empty(5009)
        shifted[offset : offset + 5000] = block
        norms.add(ops.grad_norm([shifted[offset : offset + 5000]], backend="native")[0].item())
    assert len(norms) == 1


@pytest.mark.parametrize("case", [c for c in WIDEST if c.op not in ("grad_norm", "restore_")], ids=str)
def test_an_element_does_not_depend_on_its_neighbours(case, needs_native):
    """Vector body and scalar tail: each element alone gives the bits that it has in a long tensor."""
    case = replace(case, hyper=case.hyper[:1], scaling=case.scaling[:1], first=case.first[:1])
    entry = (Entry((513,)),)
    long, cut = make_lists(entry, [FP32.dtype], case), Lists(steps=[torch.tensor(case.steps[0]) for _ in range(513)])
    for role in takes(case):
        setattr(cut, role, [t.clone() for t in long.of(role)[0]])
    run(case, "native", long)
    run(case, "native", cut)
    for role in takes(case):
        assert torch.equal(torch.stack(cut.of(role)), long.of(role)[0])


@pytest.fixture(scope="module")
def digests_of_capabilities():
    return {}


@pytest.mark.cpu_only
@pytest.mark.parametrize("capability", native.CAPABILITIES)
def test_every_compilation(capability, digests_of_capabilities, in_a_process_of_its_own, needs_native):
    code = "import runpy, sys; sys.argv = ['digest', '2']; runpy.run_module('tests.ops.digest', run_name='__main__')"
    chosen, *lines = in_a_process_of_its_own(code, SAM_FUSED_CPU_CAPABILITY=capability).splitlines()
    if chosen != capability:
        pytest.skip(f"this machine or this build has no {capability} (it took {chosen})")
    assert len(lines) == 3 * len(WIDEST)
    torch.set_num_threads(2)
    here = digests_of_capabilities.setdefault("here", digest.digests())
    assert dict(line.rsplit(" ", 1) for line in lines) == here


@pytest.mark.cpu_only
def test_an_unknown_capability_falls_back(in_a_process_of_its_own, needs_native):
    code = "from sam_fused.ops import native; print(native.status().capability)"
    assert in_a_process_of_its_own(code, SAM_FUSED_CPU_CAPABILITY="neon9").strip() == "default"
