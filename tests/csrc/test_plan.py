"""The planner against a brute-force model."""

import ctypes
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200)), max_size=30)
CHUNKS = st.integers(1, 40)
EDGES = (0, 1, 32767, 32768, 32769, 65535, 65536, 65537)


class Plan:
    def __init__(self, library, numels, chunk):
        self._library = library
        self._numels = (ctypes.c_int64 * max(len(numels), 1))(*numels)
        self._plan = ctypes.c_void_p(library.plan_new(ctypes.c_int64(len(numels)), self._numels, ctypes.c_int64(chunk)))

    def __getattr__(self, name):
        return getattr(self._library, f"plan_{name}")(self._plan)

    def tensor_of(self, c):
        return self._library.plan_tensor_of(self._plan, ctypes.c_int64(c))

    def chunk(self, c):
        out = (ctypes.c_int64 * 3)()
        self._library.plan_chunk(self._plan, ctypes.c_int64(c), out)
        return tuple(out)

    def split(self, pieces):
        out = (ctypes.c_int64 * (pieces + 1))()
        self._library.plan_split(self._plan, ctypes.c_int64(pieces), out)
        return list(out)

    def walk(self, begin, end):
        room = max(end - begin, 0) + 8
        out = np.full((room, 4), -1, dtype=np.int64)
        visits = self._library.plan_walk(
            self._plan,
            ctypes.c_int64(begin),
            ctypes.c_int64(end),
            ctypes.c_int64(room),
            ctypes.c_void_p(out.ctypes.data),
        )
        assert visits <= room
        return [tuple(int(n) for n in visit) for visit in out[:visits]]


@contextmanager
def planned(library, numels, chunk):
    plan = Plan(library, numels, chunk)
    yield plan
    library.plan_free(plan._plan)


def model(numels, chunk):
    """Chunk by chunk: number, tensor, first element, elements."""
    runs = [(t, begin, min(chunk, numel - begin)) for t, numel in enumerate(numels) for begin in range(0, numel, chunk)]
    return [(c, *run) for c, run in enumerate(runs)]


@SETTINGS
@given(LENGTHS, CHUNKS)
@example([], 1)
@example([0], 1)
@example([0, 0, 0], 7)
@example([0, 8, 0, 0, 8, 0], 8)
@example([7, 8, 9], 8)
def test_every_element_once(plan_and_element, numels, chunk):
    with planned(plan_and_element, numels, chunk) as plan:
        wanted = model(numels, chunk)
        assert (plan.tensors, plan.chunks, plan.elements) == (len(numels), len(wanted), sum(numels))
        assert plan.walk(0, plan.chunks) == wanted
        assert [(c, *plan.chunk(c)) for c in range(plan.chunks)] == wanted
        assert [plan.tensor_of(c) for c in range(plan.chunks)] == [tensor for _, tensor, _, _ in wanted]
        assert all(0 < count <= chunk for _, _, _, count in wanted)


@SETTINGS
@given(LENGTHS, CHUNKS, st.data())
def test_any_run_of_chunks_both_ways(plan_and_element, numels, chunk, data):
    wanted = model(numels, chunk)
    begin = data.draw(st.integers(0, len(wanted)))
    end = data.draw(st.integers(begin, len(wanted)))
    with planned(plan_and_element, numels, chunk) as plan:
        assert plan.walk(begin, end) == wanted[begin:end]
        assert plan.walk(end, begin if begin < end else end) == []


def work_before(numels, chunk):
    """The work that lies before each chunk, and all of it: an element counts 1, the end of a tensor 256 more."""
    before, total = [], 0
    for numel in numels:
        before += [total + begin for begin in range(0, numel, chunk)]
        total += numel + 256 if numel else 0
    return [*before, total]


@SETTINGS
@given(LENGTHS, CHUNKS, st.integers(1, 20))
@example([0, 0], 4, 3)
@example([1], 1, 20)
@example([200] * 30, 40, 16)
@example([40000, 1, 1, 1, 1, 1, 1, 1], 40, 8)
def test_split(plan_and_element, numels, chunk, pieces):
    with planned(plan_and_element, numels, chunk) as plan:
        bounds = plan.split(pieces)
        assert bounds[0] == 0 and bounds[-1] == plan.chunks and len(bounds) == pieces + 1
        assert bounds == sorted(bounds)
        runs = [visit for a, b in itertools.pairwise(bounds) for visit in plan.walk(a, b)]
        assert runs == model(numels, chunk)
        # An end falls up to a chunk and a tensor's 256 before its ideal place, or up to those 256 behind it.
        before = work_before(numels, chunk)
        fair = before[-1] / pieces
        for a, b in itertools.pairwise(bounds):
            assert abs(before[b] - before[a] - fair) <= chunk + 2 * 256 + 1


def test_split_of_many_small_tensors_is_even(plan_and_element):
    """Counted by elements alone, 1000 tensors of one element would all be one piece beside one of 300,000."""
    with planned(plan_and_element, [300_000] + [1] * 1000, 32768) as plan:
        bounds = plan.split(8)
        tiny = [sum(1 for _, t, _, _ in plan.walk(a, b) if t > 0) for a, b in itertools.pairwise(bounds)]
        assert max(tiny) < 400


@settings(SETTINGS, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(EDGES), st.integers(2**31 - 3, 2**40)), min_size=1, max_size=8), st.integers(1, 64))
@example([2**31], 3)
@example([2**31 - 1, 2**31 + 1, 0, 2**33 + 17], 16)
@example([2**40 + 1] * 8, 64)
def test_sizes_beyond_two_to_the_31(plan_and_element, numels, pieces):
    """As numbers: no memory is touched, and no chunk is listed."""
    chunk = plan_and_element.plan_constant(0)
    with planned(plan_and_element, numels, chunk) as plan:
        counts = [-(-numel // chunk) for numel in numels]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        assert (plan.chunks, plan.elements) == (sum(counts), sum(numels))
        for t, count in enumerate(counts):
            for within in {0, count // 2, count - 1} if count else ():
                begin = within * chunk
                assert plan.chunk(int(starts[t]) + within) == (t, begin, min(chunk, numels[t] - begin))
        bounds = plan.split(pieces)
        assert bounds[0] == 0 and bounds[-1] == plan.chunks and bounds == sorted(bounds)
        if plan.chunks:
            sizes = np.diff(bounds)
            assert sizes.max() - plan.chunks / pieces <= 2 + len(numels)
            assert plan.walk(plan.chunks - 1, plan.chunks) == [(plan.chunks - 1, *plan.chunk(plan.chunks - 1))]


def test_the_largest_tensor_there_can_be(plan_and_element):
    """2^63 - 257 elements: the count of chunks must not go through numel + chunk - 1."""
    numel = 2**63 - 257
    with planned(plan_and_element, [numel], 32768) as plan:
        assert plan.chunks == -(-numel // 32768)
        assert plan.chunk(plan.chunks - 1) == (0, (plan.chunks - 1) * 32768, numel - (plan.chunks - 1) * 32768)


def test_constants_and_the_row(plan_and_element):
    """Python writes rows as int64: numel, group, scaling, first, dtypes, then eight addresses, and no padding."""
    library = plan_and_element
    assert [library.plan_constant(i) for i in range(4)] == [32768, 256, 13, 8]
    assert [library.row_offset(i) for i in range(6)] == [0, 8, 16, 24, 32, 40]
    before = 0x0302010003020100
    for role in range(8):
        for dtype in range(4):
            wanted = before & ~(0xFF << (8 * role)) | dtype << (8 * role)
            assert library.row_dtypes_after(ctypes.c_uint64(before), role, dtype) == wanted


def test_python_and_cpp_agree_on_roles_and_dtypes():
    pytest.importorskip("torch")
    import re
    from pathlib import Path

    from sam_fused.ops import rows, schema
    from sam_fused.ops.dtypes import CODES

    csrc = Path(__file__).parents[2] / "csrc"
    plan, hyper = (csrc / "plan.h").read_text(), (csrc / "hyper.h").read_text()
    roles = re.search(r"enum Role : int \{ (.*?), kRoles \}", plan).group(1).split(", ")
    assert [role.removeprefix("k").lower() for role in roles] == list(rows.ROLES)
    assert int(re.search(r"int64_t kChunk = (\d+);", plan).group(1)) == rows.CHUNK
    codes = dict(re.findall(r"k(\w+) = (\d)", re.search(r"enum class DType.*?\}", plan).group(0)))
    assert {name.lower(): int(code) for name, code in codes.items()} == {
        str(d).removeprefix("torch."): c for d, c in CODES.items()
    }
    columns = {"Perturb": schema.PERTURB_COLUMNS, "Sgd": schema.SGD_COLUMNS, "Adam": schema.ADAM_COLUMNS}
    for name, wanted in columns.items():
        found = re.search(rf"enum {name}Column \{{ (.*?) \}}", hyper).group(1).split(", ")[:-1]
        bare = [re.sub(r"^k(Sgd|Adam)?", "", column).lower() for column in found]
        assert bare == [column.replace("_", "") for column in wanted]
