"""Which backend serves which device, what forces one, and what is said when the fast one is missing."""

import warnings

import pytest
import torch

from sam_fused import ops
from sam_fused.ops import backends, fitting, native, schema, triton

# The devices asked about are named; where tensors are needed as well they are on the CPU.
pytestmark = pytest.mark.cpu_only

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
VARIABLE = "SAM_FUSED_BACKEND"
REASON = "no compiler was found; install one, then build again"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    caches = [f for f in vars(backends).values() if hasattr(f, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: native.NativeStatus(False, REASON, None))


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: native.NativeStatus(True, None, "avx2"))


def test_automatic(with_native):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(CPU) == "native"
        assert backends.choose(torch.device("mps")) == "foreach"


@pytest.fixture
def card(monkeypatch):
    """A machine with one CUDA card, as far as the choice of a backend is concerned; what serves it is the test's to say."""
    why_not = {"native": None, "triton": None}
    capability = {"card": (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability["card"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "reason_not", lambda device: why_not["triton"])
    monkeypatch.setattr(
        native,
        "cuda_status",
        lambda: native.CudaStatus(why_not["native"] is None, why_not["native"], ("8.0", "9.0", "10.0+PTX")),
    )
    monkeypatch.setattr(backends, "COMPILED", {"native": native.reason_not, "triton": triton.reason_not})
    return why_not, capability


def test_a_card_takes_native_then_triton_then_foreach(card):
    why_not, _ = card
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(CUDA) == "native"
        why_not["native"] = "nvcc was not found; install it"
        assert backends.choose(CUDA) == "triton"  # the same kernels: nothing to be said
    why_not["triton"] = "Triton is not installed; pip install triton"
    with pytest.warns(RuntimeWarning) as said:
        assert backends.choose(CUDA) == backends.choose(CUDA) == "foreach"
    (message,) = [str(warning.message) for warning in said]
    assert "'foreach' backend on cuda" in message and "nvcc was not found" in message and "pip install triton" in message


def test_a_card_that_no_library_can_cover_is_told_so(card):
    _, capability = card
    capability["card"] = (7, 5)
    with pytest.warns(RuntimeWarning, match=r"cuda.* is 7\.5; the CUDA kernels need 8\.0 or later"):
        assert backends.choose(CUDA) == "triton"


def test_a_card_that_the_library_does_not_cover_takes_triton_with_one_warning(card, monkeypatch):
    _, capability = card
    capability["card"] = (11, 0)
    monkeypatch.setattr(native, "cuda_status", lambda: native.CudaStatus(True, None, ("8.0", "9.0", "10.0")))
    with pytest.warns(RuntimeWarning) as said:
        assert backends.choose(CUDA) == backends.choose(CUDA) == "triton"
    (message,) = [str(warning.message) for warning in said]
    assert "Triton" in message and "for 8.0 9.0 10.0 and cuda" in message and "TORCH_CUDA_ARCH_LIST=11.0" in message
    with pytest.raises(RuntimeError, match=r"'native' cannot serve cuda:0: .*built for 8\.0 9\.0 10\.0 and cuda:0 is 11\.0"):
        backends.choose(CUDA, "native")


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later minor versions of its major one
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (12, 1), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),  # that card's own instructions
        ("10.0f", (10, 3), True),  # the family's
        ("9.0a+PTX", (10, 0), False),
        ("8.0 9.0 10.0 12.0+PTX", (7, 5), False),
        ("8.0 9.0 10.0 12.0+PTX", (10, 3), True),
        ("8.0 9.0 10.0 12.0+PTX", (11, 0), False),
        ("8.0 9.0 10.0 12.0+PTX", (13, 0), True),
        ("", (9, 0), False),
    ],
)
def test_which_cards_are_covered(architectures, capability, covered):
    assert native.covers(tuple(architectures.split(" ")), capability) is covered


def test_missing_native_is_said_once_with_the_reason(without_native):
    with pytest.warns(RuntimeWarning) as said:
        assert backends.choose(CPU) == "foreach"
    assert (
        len(said) == 1
        and REASON in str(said[0].message)
        and "foreach" in str(said[0].message)
        and "cpu" in str(said[0].message)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [backends.choose(CPU) for _ in range(3)] == ["foreach"] * 3


def test_a_forced_backend_says_nothing(without_native):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(CPU, "foreach") == "foreach"


def test_without_native_everything_still_works(without_native):
    w, backup = torch.ones(4), torch.zeros(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm, _ = ops.grad_norm([torch.ones(4)])
        ops.perturb_([w], [backup], [torch.ones(4)], norm, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
        ops.restore_([w], [backup])
    assert float(norm) == 2 and bool((w == 1).all())


@pytest.mark.parametrize("name", ["reference", "foreach", "native"])
def test_forced_by_argument_and_by_variable(name, with_native, monkeypatch):
    assert backends.choose(CPU, name) == name
    monkeypatch.setenv(VARIABLE, name)
    assert backends.choose(CPU) == name
    assert backends.choose(CPU, "reference") == "reference"  # the argument is nearer to the call than the variable
    monkeypatch.setenv(VARIABLE, "")
    assert backends.choose(CPU) == "native"


@pytest.mark.parametrize("name", ["reference", "foreach", "native"])
def test_the_operations_use_what_is_forced(name, with_native, monkeypatch):
    used = []
    monkeypatch.setattr(fitting, "call", lambda op, backend, *rest: used.append(backend))
    for backend, kernels in ops.functional._PYTHON.items():
        monkeypatch.setitem(kernels, "restore_", lambda backend=backend, **kwargs: used.append(backend))
    monkeypatch.setenv(VARIABLE, name)
    ops.restore_([torch.ones(1)], [torch.ones(1)])
    assert used == [name]


@pytest.mark.parametrize("by_variable", [False, True])
def test_unknown(by_variable, monkeypatch):
    if by_variable:
        monkeypatch.setenv(VARIABLE, "turbo")
    with pytest.raises(ValueError, match=r"expected one of reference, foreach, native, triton, got 'turbo'.*SAM_FUSED_BACKEND"):
        backends.choose(CPU, None if by_variable else "turbo")


def test_unknown_is_refused_for_empty_lists_too():
    for call in (lambda: ops.grad_norm([], backend="turbo"), lambda: ops.restore_([], [], backend="turbo")):
        with pytest.raises(ValueError, match="turbo"):
            call()


def test_forced_but_cannot_serve(without_native, monkeypatch):
    with pytest.raises(RuntimeError, match=r"'native' cannot serve cpu: " + REASON.split(";")[0]):
        backends.choose(CPU, "native")
    monkeypatch.setenv(VARIABLE, "native")
    w = torch.ones(2)
    with pytest.raises(RuntimeError, match="cannot serve"):
        ops.restore_([w], [torch.zeros(2)])
    assert bool((w == 1).all())
    for name in ("native", "reference"):
        with pytest.raises(RuntimeError, match=f"'{name}' cannot serve meta"):
            backends.choose(META, name)


def test_available(with_native):
    found = backends.available_backends("meta")
    assert list(found) == list(schema.BACKENDS) and found["foreach"] is None
    assert all("meta" in found[name] for name in ("native", "reference", "triton"))
    on_cpu = backends.available_backends(CPU)
    assert on_cpu.pop("triton") is not None
    assert on_cpu == {"reference": None, "foreach": None, "native": None}


def test_report(with_native, card, monkeypatch):
    why_not, _ = card
    rows = backends.report()
    assert [row["device"] for row in rows] == ["cpu", "cuda:0"]
    assert [row["backend"] for row in rows] == ["native", "native"]
    why_not["native"] = "nvcc was not found; install it"
    assert backends.report()[1] == {"device": "cuda:0", "backend": "triton", "reason": "nvcc was not found; install it"}
    why_not["triton"] = "Triton is not installed"
    row = backends.report()[1]
    assert row["backend"] == "foreach" and "nvcc was not found" in row["reason"] and "Triton is not installed" in row["reason"]
    monkeypatch.setenv(VARIABLE, "native")
    rows = backends.report()
    assert [row["backend"] for row in rows] == ["native", "none"]
    assert VARIABLE in rows[0]["reason"] and "cannot serve" in rows[1]["reason"]


def test_report_of_a_card_that_torch_does_not_see(with_native, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {row["device"]: row for row in backends.report()}
    assert rows["cuda"]["backend"] == "none" and "nvidia-smi" in rows["cuda"]["reason"] and rows["cpu"]["backend"] == "native"


def test_report_says_why_and_does_not_use_up_the_warning(without_native, monkeypatch):
    """`python -m sam_fused.info` in a process must not silence the first optimizer's warning."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = backends.report()
    assert row["backend"] == "foreach" and REASON in row["reason"]
    with pytest.warns(RuntimeWarning, match="foreach"):
        backends.choose(CPU)


def test_report_of_an_unknown_name(with_native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(VARIABLE, "turbo")
    (row,) = backends.report()
    assert row["backend"] == "none" and "turbo" in row["reason"]


# ---- the library's own status ----------------------------------------------------------------------------------------------


def test_status_of_a_library_that_cannot_be_loaded(in_a_process_of_its_own):
    said = in_a_process_of_its_own(
        """
        import sys
        sys.modules["sam_fused._C"] = None  # importing it raises ImportError
        import warnings, torch
        from sam_fused import ops
        from sam_fused.ops import native
        status = native.status()
        assert not status.loaded and status.capability is None and status.reason
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                ops.restore_([torch.ones(2)], [torch.zeros(2)])
        print(len([w for w in said if "sam_fused" in str(w.message)]))
        """
    )
    assert said.strip() == "1"


def test_status_of_a_library_of_other_sources(needs_native, monkeypatch):
    native.status.cache_clear()
    monkeypatch.setattr(native, "ROW_WORDS", native.ROW_WORDS + 1)
    try:
        status = native.status()
        assert not status.loaded and "rebuild" in status.reason and str(native.ROW_WORDS) in status.reason
    finally:
        native.status.cache_clear()
    monkeypatch.undo()
    assert native.status().loaded and native.status().capability in native.CAPABILITIES


def test_importing_loads_nothing(in_a_process_of_its_own):
    said = in_a_process_of_its_own("import sys, sam_fused, sam_fused.ops; print('sam_fused._C' in sys.modules)")
    assert said.strip() == "False"
