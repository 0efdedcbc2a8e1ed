"""The emulation itself: right kernels are right in every order, wrong ones are shown to be wrong, and nvcc takes them all."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.kernels.build_emulated import EMULATION, ORDERS, ROOT, Build, Emulated, run_sanitized
from tests.kernels.emulation.examples.checks import RIGHT, check_block_sums, p

SOURCES = [EMULATION / "examples" / f"{name}.cu" for name in ("kernels", "faults")]


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    return {
        "switched": Build(folder, "switched", SOURCES),
        "ucontext": Build(folder, "ucontext", SOURCES, flags=["-DSAM_EMULATION_UCONTEXT"]),
        "sanitized": Build(folder, "sanitized", SOURCES, sanitize=True),
    }


@pytest.fixture(scope="module")
def switched(builds):
    return Emulated(builds["switched"].finish())


@pytest.fixture(scope="module")
def ucontext(builds):
    return Emulated(builds["ucontext"].finish())


@pytest.fixture(scope="module")
def sanitized(builds):
    """The library's path: it only loads into a process that ``run_sanitized`` starts."""
    return builds["sanitized"].finish()


@pytest.fixture
def kernels(switched):
    switched.set_orders()
    return switched


# ---- right kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("blocks", ORDERS)
@pytest.mark.parametrize("threads", ORDERS)
@pytest.mark.parametrize("variant", ["switched", "ucontext"])
def test_right_kernels(request, variant, threads, blocks, check):
    library = request.getfixturevalue(variant)
    for seed in range(3 if "random" in (threads, blocks) else 1):
        library.set_orders(threads, blocks, seed)
        check(library)


def test_right_kernels_are_clean_under_the_sanitizers(sanitized):
    """Also after launches that were given up in the middle of their kernels."""
    code = "import sys; from tests.kernels.emulation.examples.checks import check_everything; check_everything(sys.argv[1])"
    done = run_sanitized(code, sanitized)
    assert done.returncode == 0 and done.stdout == "all right\n", done.stdout + done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nvcc_compiles_the_same_sources(source, tmp_path):
    """They are CUDA, not something that only looks like it. Not in the headers' folder: nvcc would find that cuda_runtime.h."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    target = tmp_path / f"{source.stem}.o"
    command = ["nvcc", "-std=c++20", "-arch=sm_90", "-Werror", "all-warnings", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and target.exists(), done.stderr


# ---- orders ---------------------------------------------------------------------------------------------------------------


def arrivals(kernels, blocks=5, threads=70):
    """Threads of the grid as (block, thread), in the order in which they came: before a barrier, and after it."""
    counters, out = np.zeros(2, np.uint32), np.zeros((2, blocks * threads), np.uint32)
    assert kernels.arrivals(blocks, threads, p(counters), p(out)), kernels.message
    return [np.stack(np.divmod(np.argsort(came), threads), axis=1).reshape(blocks, threads, 2) for came in out]


@pytest.mark.parametrize("blocks", ORDERS[:2])
@pytest.mark.parametrize("threads", ORDERS[:2])
def test_fixed_orders(kernels, threads, blocks):
    kernels.set_orders(threads, blocks)
    step = {"ascending": 1, "descending": -1}
    for order in arrivals(kernels):
        assert np.array_equal(order[:, 0, 0], np.arange(5)[:: step[blocks]])
        assert all(np.array_equal(block[:, 1], np.arange(70)[:: step[threads]]) for block in order)


def test_random_orders_are_a_seed_s(kernels):
    """Another one for every block, on either side of a barrier, for every launch and seed; and the same again."""
    kernels.set_orders("random", "random", seed=5)
    first, second = arrivals(kernels), arrivals(kernels)
    kernels.set_orders("random", "random", seed=5)
    assert np.array_equal(first, arrivals(kernels)) and kernels.launches == 1
    kernels.set_orders("random", "random", seed=6)
    orders = [*first, *second, *arrivals(kernels)]
    within = {block[:, 1].tobytes() for order in orders for block in order}
    assert len(within) == len(orders) * 5
    assert len({order[:, 0, 0].tobytes() for order in orders}) == 3  # blocks: one order for each of the three launches
    assert all(sorted(block[:, 1]) == list(range(70)) for order in orders for block in order)


def test_orders_come_from_the_environment_too(switched, builds):
    code = """
import sys
from tests.kernels.build_emulated import Emulated
from tests.kernels.test_emulation import arrivals
order = arrivals(Emulated(sys.argv[1]), blocks=3, threads=4)[0]
print(order[:, 0, 0].tolist(), order[0, :, 1].tolist())
"""
    results = {}
    for threads, blocks in (("descending", "ascending"), ("ascending", "descending"), ("sideways", "ascending")):
        environment = {**os.environ, "SAM_EMULATION_THREADS": threads, "SAM_EMULATION_BLOCKS": blocks}
        command = [sys.executable, "-c", code, str(builds["switched"].library)]
        results[threads] = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert results["descending"].stdout == "[0, 1, 2] [3, 2, 1, 0]\n"
    assert results["ascending"].stdout == "[2, 1, 0] [0, 1, 2, 3]\n"
    wanted = "SAM_EMULATION_THREADS: expected ascending, descending or random, got 'sideways'"
    assert wanted in results["sideways"].stderr


# ---- missing barriers -----------------------------------------------------------------------------------------------------


def results_by_order(kernels, name, threads=64):
    """What a kernel gives over x = 1, 2, ..., in each order."""
    x = np.arange(1, threads + 1, dtype=np.float32)
    results = {}
    for order in ORDERS:
        kernels.set_orders(order, seed=1)
        out = np.zeros_like(x)
        assert getattr(kernels, name)(threads, p(x), p(out)), kernels.message
        results[order] = out
    return results


def test_a_missing_barrier_after_writing_shows(kernels):
    """Shared memory is NaN until somebody writes it, and somebody reads before that."""
    for order, out in results_by_order(kernels, "no_barrier_after_writing").items():
        assert np.isnan(out).any(), order


def test_a_missing_barrier_before_writing_shows(kernels):
    """What an earlier sum left is overwritten before all have read it: a warp has to run ahead of another for that."""
    results = results_by_order(kernels, "no_barrier_before_writing")
    assert any((out != 3 * 64 * 65 / 2).any() for out in results.values())
    assert len({out.tobytes() for out in results.values()}) > 1


def test_shared_memory_is_nan_at_the_start_of_every_block(kernels):
    out = np.zeros(3 * 64, np.float32)
    assert kernels.uninitialised(3, 64, p(out)), kernels.message
    assert np.isnan(out).all()


# ---- what CUDA leaves undefined -------------------------------------------------------------------------------------------

OUT = np.zeros(64, np.float32)
DEADLOCK = "deadlock in block (0,0,0) of 64 threads: "
ONE_OPERATION = "expected the lanes of {} at one operation, got {} at {} (faults.cu:LINE) with mask {}: "
WARP = " in warp 0 of block (0,0,0) of 32 threads: "

# Function, arguments, what its error has to say; with threads in ascending order.
UNDEFINED = {
    "barrier_in_two_branches": (
        (64,),
        "block (0,0,0) of 64 threads: expected all threads at one barrier, got 10 at __syncthreads (",
    ),
    "barrier_in_two_instances": ((64,), "expected all threads at one barrier, got 10 at __syncthreads (faults.cu:LINE): "),
    "early_return": (
        (64,),
        DEADLOCK + "expected all 64 threads at __syncthreads (faults.cu:LINE), got 63, and 1 that returned: ",
    ),
    "block_and_warp_barrier": (
        (64,),
        DEADLOCK + "expected all 64 threads at __syncthreads (faults.cu:LINE), got 1, expected the lanes 0xffffffff of warp 1 "
        "at __syncwarp (faults.cu:LINE), got 0xfffffeff, and 32 that returned: ",
    ),
    "missing_lane": (
        (64, p(OUT)),
        DEADLOCK + "expected the lanes 0xffffffff of warp 0 at __shfl_down_sync (faults.cu:LINE), got 0xfffffff7, "
        "and 33 that returned: ",
    ),
    "lane_outside_its_mask": ((32, p(OUT)), WARP + "expected a mask that names the calling lane 16, got 0x0000ffff ("),
    "two_masks": (
        (32, p(OUT)),
        WARP + ONE_OPERATION.format("0xffffffff", 4, "__shfl_sync", "0x000000ff"),
    ),
    "two_operations": (
        (32, p(OUT)),
        WARP + ONE_OPERATION.format("0xffffffff", 16, "__ballot_sync", "0xffffffff"),
    ),
    "full_mask": ((48, p(OUT)), "expected a mask of lanes in 0x0000ffff, the ones there are, got 0xffffffff ("),
    "shuffle_width": ((12, p(OUT)), "__shfl_sync: expected a width of 1, 2, 4, 8, 16 or 32, got 12 ("),
    "misaligned_hinted": (
        (1,),
        "__ldcs: expected an address aligned to 16 bytes, got one 4 bytes past: use narrower accesses (",
    ),
    "too_much_shared": ((), "expected at most 49152 bytes, got more with this object of 49153: use smaller objects ("),
    "barrier_on_the_host": ((), "__syncthreads: expected to be called by a kernel, got a call from the host"),
}


def without_lines(message):
    """Line numbers are the source's business; that one is named is ours."""
    head, *rest = message.split("faults.cu:")
    return head + "".join("faults.cu:LINE" + text.lstrip("0123456789") for text in rest)


@pytest.mark.parametrize("name", UNDEFINED)
@pytest.mark.parametrize("variant", ["switched", "ucontext"])
def test_undefined_behaviour_is_an_error(request, variant, name):
    """One sentence, in every order, and the next launch is none the worse."""
    library = request.getfixturevalue(variant)
    arguments, wanted = UNDEFINED[name]
    for order in ORDERS:
        library.set_orders(order)
        assert not getattr(library, name)(*arguments), order
        assert library.message and "\n" not in library.message
        if order == "ascending":
            assert wanted in without_lines(library.message)
        if name != "barrier_on_the_host":
            assert library.message.endswith(f"(threads {order}, blocks ascending, seed 0)")
        check_block_sums(library)


def test_the_error_names_the_block(kernels):
    """The first that runs of a grid of 3 by 2."""
    kernels.set_orders(blocks="descending")
    assert not kernels.early_return(64) and "block (2,1,0)" in kernels.message


def test_a_lane_that_takes_no_part_sends_nan(kernels):
    """CUDA says undefined. Not an error: a sum over part of a warp reads such lanes and ignores what it gets."""
    out = np.zeros(32, np.float32)
    assert kernels.source_outside_the_mask(32, p(out)), kernels.message
    assert np.array_equal(out[:8], np.ones(8)) and np.isnan(out[8:16]).all() and not out[16:].any()


# ---- memory, under the sanitizers -----------------------------------------------------------------------------------------

# Function, arguments of a call that is right, of one that is not, what the sanitizer has to say about that.
OVERRUN = ("heap-buffer-overflow", "WRITE of size 4")
MEMORY = {
    "global memory, past its end": ("global_overrun", (128,), (100,), (*OVERRUN, "global_overrun_kernel", "400-byte region")),
    "shared memory, past its end": ("shared_index", (31,), (32,), (*OVERRUN, "shared_index_kernel")),
    "shared memory, before it": ("shared_index", (0,), (-1,), ("use-after-poison", "WRITE of size 4", "shared_index_kernel")),
    "16 bytes stored": ("misaligned_store", (0,), (1,), ("store to misaligned address", "requires 16 byte alignment")),
    "16 bytes loaded": ("misaligned_load", (4,), (2,), ("misaligned address", "requires 16 byte alignment")),
    "16 bytes of shared floats": ("misaligned_shared", None, (), ("misaligned address", "requires 16 byte alignment")),
    "a stack that is too small": ("deep_stack", None, (0,), ("stack-overflow", "deep_stack_kernel")),
}


@pytest.mark.parametrize("name", MEMORY)
def test_wrong_accesses_end_the_process(sanitized, name):
    function, right, wrong, wanted = MEMORY[name]
    code = f"""
import sys
from tests.kernels.build_emulated import Emulated
call = Emulated(sys.argv[1]).{function}
print({right is None} or call(*{right or ()}), flush=True)
call(*{wrong})
print("unharmed")
"""
    done = run_sanitized(code, sanitized)
    assert done.stdout in ("1\n", "True\n") and done.returncode != 0, done.stdout + done.stderr
    assert all(text in done.stderr for text in wanted), done.stderr


# ---- launches -------------------------------------------------------------------------------------------------------------

INVALID_CONFIGURATION, LAUNCH_FAILURE = 9, 719


def launch(kernels, blocks=1, threads=32):
    """Whether a launch ran."""
    x, out = np.ones(32, np.float32), np.zeros(32, np.float32)
    assert kernels.block_sums(blocks, threads, p(x), p(out)), kernels.message
    assert out.tolist() in ([0] * 32, [32] * 32)
    return bool(out[0])


def test_a_launch_can_be_made_to_fail(kernels):
    kernels.fail_next_launch(LAUNCH_FAILURE)
    assert not launch(kernels)
    assert kernels.peek_at_last_error() == kernels.get_last_error() == LAUNCH_FAILURE
    assert kernels.peek_at_last_error() == kernels.get_last_error() == 0
    assert launch(kernels) and kernels.get_last_error() == 0 and kernels.launches == 1


@pytest.mark.parametrize("blocks, threads", [(0, 32), (1, 0), (1, 1025), (2**32 - 1, 32)])
def test_what_the_hardware_cannot_launch(kernels, blocks, threads):
    assert not launch(kernels, blocks, threads)
    assert kernels.get_last_error() == INVALID_CONFIGURATION and kernels.launches == 0
    kernels.error_string.restype = np.ctypeslib.ctypes.c_char_p
    assert kernels.error_string(INVALID_CONFIGURATION) == b"invalid configuration argument"


def test_tests_choose_the_block_size(kernels):
    assert kernels.threads_per_block(256) == 256
    kernels.set_threads_per_block(64)
    assert kernels.threads_per_block(256) == 64
    kernels.set_threads_per_block(0)
    assert kernels.threads_per_block(256) == 256
