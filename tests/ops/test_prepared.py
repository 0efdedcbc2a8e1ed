"""The prepared door: the list operations' bits, and never an address that is not what it was taken for."""

import gc

import pytest
import torch

from sam_fused import ops
from sam_fused.ops import captures, functional, native
from sam_fused.ops.dtypes import CODES
from sam_fused.ops.hyper import HyperTable
from sam_fused.ops.prepared import Factors, TensorSet
from sam_fused.ops.rows import ROW_WORDS
from tests.devices import default
from tests.ops.cases import CASES, FITTING, STORAGES, WIDEST
from tests.ops.runner import TAKES, Call, Lists, make_lists, prepare, run, table, takes

PERTURB, SGD = table([[0.5, 0.0]]), table([[0.1, 0.9, 0.5, 0.0, 0.0, 0.0]])
NORM = torch.tensor(2.0)


@pytest.fixture
def lists_called(monkeypatch):
    """Names of the list operations that a TensorSet fell back on."""
    called = []

    def record(name):
        original = getattr(functional, name)

        def wrapper(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(functional, name, wrapper)

    for name in TAKES:
        record(name)
    return called


def one(backend="native", size=4, **options):
    w, backup = torch.ones(size), torch.full((size,), 9.0)
    return w, backup, TensorSet([w], [backup], backend=backend, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_list_operations(case, lists_called, needs_native):
    for storage in STORAGES:
        lists, want = (make_lists(FITTING, [storage.dtype], case) for _ in range(2))
        result = run(case, "prepared", lists)
        assert not lists_called
        wanted = run(case, "native", want)
        lists_called.clear()
        for role in (*takes(case), "steps"):
            assert all(torch.equal(a, b) for a, b in zip(lists.of(role), want.of(role), strict=True)), role
        if result is not None:
            assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


def test_the_row_is_what_the_library_expects(needs_native):
    assert torch.ops.sam_fused.row_words() == ROW_WORDS
    assert {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3} == CODES


def test_several_steps_with_fresh_gradients(needs_native):
    """What a training loop does: gradients move every step, nothing else does."""
    w, backup, v = torch.ones(1000), torch.zeros(1000), torch.zeros(1000)
    w2, backup2, v2 = w.clone(), backup.clone(), v.clone()
    cell = torch.zeros(1, dtype=torch.int64)
    ascent = TensorSet([w], [backup], backend="native", perturbed=cell)
    descent = TensorSet([w], [backup], backend="native", states=([v],), first=[1], perturbed=cell)
    for step in range(5):
        g, h = torch.randn(1000), torch.randn(1000)
        grads = ascent.checked([g.clone()])
        norm, _ = ascent.grad_norm(grads)
        ascent.perturb_(grads, norm, PERTURB)
        assert ascent.is_perturbed and descent.is_perturbed
        descent.restore_sgd_(descent.checked([h.clone()]), SGD)
        assert not ascent.is_perturbed
        norm2, _ = ops.grad_norm([g], backend="native")
        ops.perturb_([w2], [backup2], [g], norm2, PERTURB, backend="native")
        ops.restore_sgd_([w2], [backup2], [h], [v2], SGD, first=[int(step == 0)], backend="native")
        assert torch.equal(w, w2) and torch.equal(v, v2)


# ---- gradients that do not fit ------------------------------------------------------------------------------------------


def _expanded():
    return torch.ones(1).expand(4)


def _subclass():
    class Marked(torch.Tensor):
        pass

    return torch.ones(4).as_subclass(Marked)


FALL_BACK = {
    "another dtype": lambda: torch.ones(4, dtype=torch.float64),
    "gaps": lambda: torch.ones(8)[::2],
    "expanded": _expanded,
    "a subclass": _subclass,
}


@pytest.mark.parametrize("make", FALL_BACK.values(), ids=FALL_BACK)
def test_gradients_that_lie_differently_take_the_lists(make, lists_called, needs_native):
    w, backup, tensors = one()
    grads = tensors.checked([make()])
    assert grads.addresses is None
    norm, _ = tensors.grad_norm(grads)
    tensors.perturb_(grads, norm, PERTURB)
    assert float(norm) == 2 and bool((w == 1.25).all()) and bool((backup == 1).all()) and tensors.is_perturbed
    assert set(lists_called) == {"grad_norm", "restore_", "perturb_"}


@pytest.mark.parametrize("size", [1, 4])
def test_a_negated_view_is_read_as_what_it_means(size, needs_native):
    """Its memory holds the other sign. With one element its stride says nothing, and it passes for contiguous."""
    w, _, tensors = one(size=size)
    grad = torch.complex(torch.zeros(size), torch.ones(size)).conj().imag
    assert grad.is_neg() and grad.is_contiguous() == (size == 1)
    tensors.perturb_(tensors.checked([grad]), NORM, PERTURB)
    assert bool((w == 0.75).all())


def test_gradients_without_memory(in_a_process_of_its_own, needs_native):
    """A tensor that is zero without storage, and one whose storage was freed: no address may be followed."""
    in_a_process_of_its_own(
        """
        import torch
        from tests.ops.runner import Lists, run
        from tests.ops.cases import Case

        def emptied():
            grad = torch.ones(4)
            grad.untyped_storage().resize_(0)
            return grad

        for door in ("native", "prepared"):
            for grad in (emptied(), torch._efficientzerotensor((4,), device=torch.get_default_device())):
                print(door, flush=True)  # a crash is told by the last line
                lists = Lists(params=[torch.ones(4)], backups=[torch.zeros(4)], grads=[grad])
                for case in (Case("norm", "grad_norm"), Case("perturb", "perturb_", ((0.5, 0.0),))):
                    try:
                        run(case, door, lists)
                    except (RuntimeError, TypeError, ValueError):
                        pass
                assert bool((lists.params[0] == 1).all()), lists.params
        """
    )


REFUSED = {
    "another size": (lambda: torch.ones(5), ValueError, ("(4,)", "(5,)")),
    "another device": (lambda: torch.ones(4, device="meta"), ValueError, (str(default()), "meta")),
    "sparse": (lambda: torch.ones(4).to_sparse(), TypeError, ("strided", "sparse")),
    "integers": (lambda: torch.ones(4, dtype=torch.int64), TypeError, ("float32", "int64")),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64), TypeError, ("float32", "complex64")),
    "None": (lambda: None, TypeError, ("torch.Tensor", "NoneType")),
}


@pytest.mark.parametrize("make, error, words", REFUSED.values(), ids=REFUSED)
def test_gradients_that_are_refused(make, error, words, backend):
    w, backup, tensors = one(backend)
    with pytest.raises(error) as caught:
        tensors.checked([make()])
    sentence = str(caught.value)
    assert all(word in sentence for word in ("gradient 0", "expected", "got", *words)) and sentence.endswith(".")
    assert bool((w == 1).all()) and bool((backup == 9).all()) and w._version == 0 and not tensors.is_perturbed


def test_as_many_gradients_as_parameters(backend):
    _, _, tensors = one(backend)
    for grads in ([], [torch.ones(4)] * 2):
        with pytest.raises(ValueError):
            tensors.checked(grads)


# ---- addresses that have moved -------------------------------------------------------------------------------------------


def _swap_data(w):
    w.data = torch.full((4,), 5.0)


def _set(w):
    with torch.no_grad():
        w.set_(torch.full((4,), 5.0))


def _transpose(w):
    w.data = w.data.t()


def _other_dtype(w):
    w.data = w.data.view(torch.bfloat16)


def _shrink(w):
    w.data = w.data[:1]


MOVES = {"data swapped": _swap_data, "set_": _set}
SAME_ADDRESS = {"transposed": _transpose, "another dtype": _other_dtype, "cut off": _shrink}


@pytest.mark.parametrize("move", [*MOVES.values(), *SAME_ADDRESS.values()], ids=[*MOVES, *SAME_ADDRESS])
def test_a_parameter_that_moved_is_noticed(move, needs_native):
    """Its address, or what lies at the same address."""
    w = torch.nn.Parameter(torch.ones(2, 2))
    tensors = TensorSet([w], [torch.zeros(2, 2)], backend="native")
    for _ in range(2):  # the first time property by property, then in one call
        assert tensors.is_current()
    move(w)
    for _ in range(2):
        assert not tensors.is_current()


@pytest.mark.parametrize("move", [*MOVES.values(), *SAME_ADDRESS.values()], ids=[*MOVES, *SAME_ADDRESS])
def test_state_that_moved_is_noticed(move, needs_native):
    w, v = torch.ones(2, 2), torch.zeros(2, 2)
    tensors = TensorSet([w], [w], backend="native", states=([v],))
    for _ in range(2):
        assert tensors.is_current()
    move(v)
    for _ in range(2):
        assert not tensors.is_current()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_and_device_are_nobodys_business(dtype, backend):
    here = default()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            w, backup, grad = (torch.ones(4, dtype=torch.float32, device=here) for _ in range(3))
            tensors = TensorSet([w], [backup], backend=backend)
            hyper = HyperTable().update([[0.5, 0.0]]).on(torch.device("cpu"))
            norm, found_inf = tensors.grad_norm(tensors.checked([grad]))
            assert norm.dtype == found_inf.dtype == torch.float32 and norm.device == here
            assert float(norm) == 2 and float(found_inf) == 0
            tensors.perturb_(tensors.checked([grad]), norm, hyper)
            assert tensors.is_perturbed and w.tolist() == [1.25] * 4
            _, found_inf = tensors.grad_norm(tensors.checked([grad * float("inf")]))
            assert float(found_inf) == 1
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_restore_after_a_move_in_the_middle(move, backend):
    """Perturbed, then moved by somebody: the backup goes to where the parameter is now."""
    w = torch.nn.Parameter(torch.ones(4))
    tensors = TensorSet([w], [torch.zeros(4)], backend=backend)
    tensors.perturb_(tensors.checked([torch.ones(4)]), NORM, PERTURB)
    old = w.data
    move(w)
    tensors.restore_()
    assert bool((w == 1).all()) and bool((old == 1.25).all()) and not tensors.is_perturbed


def test_a_set_keeps_its_tensors_alive(needs_native):
    tensors = TensorSet([torch.ones(1000)], [torch.zeros(1000)], backend="native")
    gc.collect()
    torch.full((1000,), 7.0)
    tensors.perturb_(tensors.checked([torch.ones(1000)]), NORM, PERTURB)
    assert bool((tensors.params[0] == 1.25).all()) and bool((tensors.backups[0] == 1).all())


NO_ROWS = {
    "a parameter with gaps": lambda: TensorSet([torch.ones(8)[::2]], [torch.ones(4)], backend="native"),
    "a backup that lies differently": lambda: TensorSet([torch.ones(2, 3)], [torch.ones(3, 2).t()], backend="native"),
    "state that lies differently": lambda: TensorSet(
        [torch.ones(2, 3)], [torch.ones(2, 3)], backend="native", states=([torch.ones(3, 2).t()],)
    ),
    "a backup of another dtype": lambda: TensorSet([torch.ones(4)], [torch.ones(4).half()], backend="native"),
    "a shorter backup": lambda: TensorSet([torch.ones(4)], [torch.ones(3)], backend="native"),
    "an empty backup": lambda: TensorSet([torch.ones(4)], [torch.ones(0)], backend="native"),
    "integer step counts": lambda: TensorSet([torch.ones(4)], [torch.ones(4)], backend="native", steps=[torch.tensor(1)]),
    "a subclass": lambda: TensorSet([_subclass()], [torch.ones(4)], backend="native"),
    "no native backend": lambda: TensorSet([torch.ones(4)], [torch.ones(4)], backend="foreach"),
}


@pytest.mark.parametrize("make", NO_ROWS.values(), ids=NO_ROWS)
def test_sets_that_have_no_addresses(make, needs_native):
    """They take the lists; a table of addresses for them would be read or written past its end."""
    tensors = make()
    assert tensors.checked([torch.ones(tensors.params[0].shape)]).addresses is None


def test_an_empty_buffer_that_is_used_is_not_followed(in_a_process_of_its_own, needs_native):
    in_a_process_of_its_own(
        """
        import torch
        from sam_fused.ops.prepared import TensorSet
        w = torch.ones(4)
        tensors = TensorSet([w], [w], backend="native", states=([torch.empty(0)],))
        hyper = torch.tensor([[0.1, 0.9, 0, 0, 0, 0]], dtype=torch.float64)
        try:
            tensors.restore_sgd_(tensors.checked([torch.ones(4)]), hyper)
        except (RuntimeError, ValueError):
            assert bool((w == 1).all())
        else:
            raise AssertionError("accepted")
        """
    )


# ---- the perturbed cell ---------------------------------------------------------------------------------------------------


def test_the_cell_follows_the_weights(backend):
    w, _backup, tensors = one(backend)
    assert not tensors.is_perturbed
    tensors.perturb_(tensors.checked([torch.ones(4)]), NORM, PERTURB)
    assert tensors.is_perturbed and int(tensors.perturbed) == 1
    tensors.restore_()
    assert not tensors.is_perturbed and bool((w == 1).all())


@pytest.mark.parametrize("op", ["restore_sgd_", "restore_adamw_"])
def test_the_last_pass_clears_the_cell(op, backend):
    w, backup = torch.full((4,), 1.25), torch.ones(4)
    cell = torch.ones(1, dtype=torch.int64)
    states = ([torch.zeros(4)],) if op == "restore_sgd_" else ([torch.zeros(4)], [torch.zeros(4)], [])
    steps = [] if op == "restore_sgd_" else [torch.tensor(0.0)]
    tensors = TensorSet([w], [backup], backend=backend, states=states, steps=steps, perturbed=cell)
    hyper = SGD if op == "restore_sgd_" else table([[0.0, 0.9, 0.999, 1e-8, 0, 0, 0, 0]])
    if op == "restore_sgd_":
        hyper = hyper * table([[0.0, 1, 1, 1, 1, 1]])
    getattr(tensors, op)(tensors.checked([torch.ones(4)]), hyper)
    assert bool((w == 1).all()) and int(cell) == 0


def test_the_cell_is_set_where_nothing_moves(backend):
    """The backup was written all the same, and restoring from it is right."""
    for norm in (0.0, float("inf"), float("nan")):
        w, backup, tensors = one(backend)
        tensors.perturb_(tensors.checked([torch.ones(4)]), torch.tensor(norm), PERTURB)
        assert tensors.is_perturbed and bool((w == 1).all()) and bool((backup == 1).all())


def test_an_error_in_the_middle_leaves_something_restorable(backend, monkeypatch):
    """Whatever the weights are then, the cell says 1, or they are clean."""
    w, _backup, tensors = one(backend)
    grads = tensors.checked([FALL_BACK["gaps"]()])
    original = functional.perturb_

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "perturb_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tensors.perturb_(grads, NORM, PERTURB)
    assert tensors.is_perturbed and bool((w == 1.25).all())
    tensors.restore_()
    assert bool((w == 1).all())


def test_arguments_that_are_refused_leave_the_weights_clean(backend):
    w, _backup, tensors = one(backend)
    with pytest.raises((ValueError, RuntimeError)):
        tensors.perturb_(tensors.checked([torch.ones(4)]), NORM, SGD)
    assert bool((w == 1).all())
    if tensors.is_perturbed:
        tensors.restore_()
        assert bool((w == 1).all())


# ---- first steps and the table of hyper-parameters -------------------------------------------------------------------------


def test_dampening_is_ignored_once(backend):
    w, v = torch.zeros(2), torch.full((2,), 100.0)
    tensors = TensorSet([w], [w], backend=backend, states=([v],), first=[1])
    tensors.restore_sgd_(tensors.checked([torch.ones(2)]), SGD)
    assert bool((v == 1).all())
    tensors.restore_sgd_(tensors.checked([torch.ones(2)]), SGD)
    assert v.tolist() == pytest.approx([0.9 + 0.5] * 2)


def test_a_skipped_first_step_stays_the_first(backend):
    """found_inf left the buffer alone, so it has still to be created."""
    w, v = torch.zeros(2), torch.zeros(2)
    tensors = TensorSet([w], [w], backend=backend, states=([v],), first=[1])
    tensors.restore_sgd_(tensors.checked([torch.ones(2)]), SGD, Factors(found_inf=torch.tensor(1.0)))
    tensors.restore_sgd_(tensors.checked([torch.ones(2)]), SGD, Factors(found_inf=torch.tensor(0.0)))
    assert bool((v == 1).all())


CPU = torch.device("cpu")


def test_hyper_table():
    hyper = HyperTable()
    first = hyper.update([[0.1, 0.9]]).on(CPU)
    assert first.dtype == torch.float64 and first.tolist() == [[0.1, 0.9]]
    assert hyper.update([[0.1, 0.9]]).on(CPU) is first
    assert hyper.update([[0.2, 0.9]]).on(CPU).tolist() == [[0.2, 0.9]]


def test_hyper_table_does_not_keep_the_callers_list():
    hyper, values = HyperTable(), [[0.1, 0.9]]
    hyper.update(values).on(CPU)
    values[0][0] = 0.2
    assert hyper.update(values).on(CPU).tolist() == [[0.2, 0.9]]


def test_results_are_reused_by_the_next_norm(needs_native):
    """Documented, and what makes the step free of allocations."""
    _, _, tensors = one()
    norm, found_inf = tensors.grad_norm(tensors.checked([torch.ones(4)]))
    assert float(norm) == 2
    again, _ = tensors.grad_norm(tensors.checked([torch.full((4,), float("inf"))]))
    assert again is norm and float(found_inf) == 1


@pytest.mark.parametrize("backend_name", ["reference", "foreach"])
def test_other_backends_behind_the_same_door(backend_name, lists_called):
    from tests.ops.runner import run_prepared

    for case in WIDEST:
        lists, want = (make_lists(FITTING, [torch.float32], case) for _ in range(2))
        assert prepare(case, Call.of(case, len(FITTING)), lists, backend_name).is_current()
        result = run_prepared(case, Call.of(case, len(FITTING)), lists, backend_name)
        wanted = run(case, backend_name, want)
        for role in (*takes(case), "steps"):
            assert all(torch.equal(a, b) for a, b in zip(lists.of(role), want.of(role), strict=True)), role
        assert result is None or torch.equal(result[0], wanted[0])
    assert lists_called


def test_compiled_code_does_not_read_addresses(needs_native):
    assert native.status().loaded
    _w, _, tensors = one()
    assert isinstance(Lists(), Lists)
    compiled = torch.compile(lambda g: tensors.checked([g]).addresses is None, backend="eager")
    assert compiled(torch.ones(4))


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------------


def test_a_set_is_not_made_inside_a_capture(monkeypatch, needs_native):
    """Its table would be written by the graph's replays alone."""
    monkeypatch.setattr(captures, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        TensorSet([torch.ones(3)], [torch.ones(3)], backend="native")


def test_what_a_graph_reads_is_kept_alive(monkeypatch, needs_native):
    kept: dict = {}
    tensors = TensorSet([torch.ones(3)], [torch.ones(3)], backend="native")
    with captures.kept_in(kept):
        tensors.checked([torch.ones(3)])
        assert not kept
        monkeypatch.setattr(captures, "is_capturing", lambda device: True)
        for _ in range(2):
            tensors.checked([torch.ones(3)])
    assert list(kept.values()) == [tensors]
    # Nobody says when another's graph ends: what it reads stays.
    monkeypatch.setattr(captures, "_for_ever", {})
    monkeypatch.setattr(captures, "_kept", captures._for_ever)
    tensors.checked([torch.ones(3)])
    assert list(captures._for_ever.values()) == [tensors] and len(kept) == 1
