"""Hyper-parameters as tensors, and ``capturable``: the same bits as floats, from tables that stay where they are.

What a captured graph makes of them needs a card (tests/gpu). Here the tables are on the CPU, and ``meta`` stands in for a
device where nothing but the host's decisions is asked for.
"""

import copy
import warnings

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

from sam_fused import SAM
from sam_fused.ops.hyper import HyperTable, is_known, number
from sam_fused.optim.bases import fused_base
from tests.optim.helpers import assert_one_sentence, assert_same_bits, parameter, snapshot
from tests.optim.runs import ALL, Run, assert_same_runs

pytestmark = pytest.mark.cpu_only
META, CPU = torch.device("meta"), torch.device("cpu")

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


@pytest.fixture(params=ALL)
def in_form(request):
    return request.param


def tables_of(optimizer):
    """The tables that the ascent and the last pass read on the CPU, as the last step left them."""
    return [part._hyper.on(CPU) for part in (optimizer._ascent, optimizer._descent)]


def floats_only(run):
    """Weights and state, without the groups, in which one run has tensors where the other has floats."""
    weights, (state, _) = run.state()
    return weights, [sorted(entry) for entry in state], [value for entry in state for value in entry.values()]


def assert_same_but_groups(actual, expected):
    actual, expected = floats_only(actual), floats_only(expected)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert_same_bits(actual[2], expected[2])


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_give_the_bits_of_floats(backend, base, in_form, capturable):
    """fp64 tensors: an fp32 one holds another number than the float. Changed in place, they take effect in the next step."""
    rho, lr = (torch.tensor(value, dtype=torch.float64) for value in (0.2, base[1]["lr"]))
    tensors, floats = Run(in_form, base, backend, capturable=capturable), Run(in_form, base, backend)
    for run, values in ((tensors, (rho, lr)), (floats, (0.2, base[1]["lr"]))):
        run.optimizer.param_groups[0].update(zip(("rho", "lr"), values, strict=True))
    for new_rho, new_lr in ((0.2, base[1]["lr"]), (0.05, 0.002), (0.3, 0.002), (0.0, 0.01)):
        rho.fill_(new_rho)
        lr.fill_(new_lr)
        floats.optimizer.param_groups[0].update(rho=new_rho, lr=new_lr)
        before = snapshot(tensors.params)
        tensors.step()
        floats.step()
        assert_same_but_groups(tensors, floats)
        assert not all(map(torch.equal, snapshot(tensors.params), before))
    assert tensors.optimizer.param_groups[0]["rho"] is rho and tensors.optimizer.param_groups[0]["lr"] is lr


def test_an_fp32_tensor_is_the_number_that_it_holds(backend, in_form):
    base = (SGD, {"lr": torch.tensor(0.05), "momentum": 0.9})
    exact = (SGD, {"lr": float(torch.tensor(0.05)), "momentum": 0.9})
    tensors = Run(in_form, base, backend, rho=torch.tensor(0.2))
    floats = Run(in_form, exact, backend, rho=float(torch.tensor(0.2)))
    for _ in range(2):
        tensors.step()
        floats.step()
    assert_same_but_groups(tensors, floats)


def test_capturable_changes_no_bit(backend, base, in_form):
    """Through a schedule of both, on floats as it is written."""
    ours, plain = Run(in_form, base, backend, capturable=True), Run(in_form, base, backend)
    for number_of_step in range(4):
        for run in (ours, plain):
            run.optimizer.param_groups[0].update(rho=0.2 / (1 + number_of_step), lr=0.01 / (1 + number_of_step))
            run.step()
        assert_same_but_groups(ours, plain)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_base_that_is_capturable_itself_runs_fused(backend, name, in_form):
    """torch's own step asserts that it is on an accelerator. Its keyword is ours as well."""
    base_class, options = BASES[name]
    ours, plain = Run(in_form, (base_class, {**options, "capturable": True}), backend), Run(in_form, BASES[name], backend)
    assert ours.optimizer.param_groups[0]["capturable"] is True
    for _ in range(3):
        ours.step()
        plain.step()
    assert_same_but_groups(ours, plain)
    address = tables_of(ours.optimizer)[1].data_ptr()
    ours.optimizer.param_groups[0]["lr"] = 0.001
    ours.step()
    assert tables_of(ours.optimizer)[1].data_ptr() == address


def test_a_schedule_over_tensors(backend, in_form):
    """Schedulers write into a learning rate that is a tensor, instead of replacing it."""
    rate = torch.tensor(0.05, dtype=torch.float64)
    tensors = Run(in_form, (SGD, {"lr": rate, "momentum": 0.9}), backend, capturable=True)
    floats = Run(in_form, (SGD, {"lr": 0.05, "momentum": 0.9}), backend)
    schedules = [lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in (tensors, floats)]
    for _ in range(3):
        for run, schedule in zip((tensors, floats), schedules, strict=True):
            run.step()
            schedule.step()
        assert_same_but_groups(tensors, floats)
    assert tensors.optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.05 / 8


def test_around_a_base_that_has_the_keyword_and_is_not_fused(backend):
    """RMSprop's own ``capturable`` is about its own step; SAM's alone is ``sam_capturable``."""
    base = (RMSprop, {"lr": 0.01})
    ours = Run("perturbed", base, backend, sam_capturable=True, rho=torch.tensor(0.2, dtype=torch.float64))
    plain = Run("perturbed", base, backend)
    assert ours.optimizer.param_groups[0]["capturable"] is False
    for _ in range(2):
        ours.step()
        plain.step()
    assert_same_but_groups(ours, plain)


def test_tensors_survive_a_checkpoint(backend, in_form):
    run = Run(in_form, (SGD, {"lr": torch.tensor(0.05), "momentum": 0.9}), backend, rho=torch.tensor(0.2))
    run.step()
    other = Run(in_form, (SGD, {"lr": 0.5, "momentum": 0.9}), backend)
    other.case.model.load_state_dict(run.case.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    group = other.optimizer.param_groups[0]
    assert isinstance(group["rho"], torch.Tensor) and isinstance(group["lr"], torch.Tensor)
    for each in (run, other):
        each.step()
    assert_same_runs(other, run)
    group["rho"].fill_(0.1)  # and it is the copy's own
    assert float(run.optimizer.param_groups[0]["rho"]) == pytest.approx(0.2)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")], ids=str)
def test_a_tensor_that_comes_to_mean_nothing_is_refused(backend, value):
    w, rho = parameter([1.0], torch.float32), torch.tensor(0.1)
    optimizer = SAM([w], SGD, lr=0.1, rho=rho, backend=backend)

    def closure():
        loss = (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    rho.fill_(value)
    before = snapshot([w])
    with pytest.raises(ValueError) as raised:
        optimizer.step(closure)
    assert_one_sentence(raised.value, "rho of parameter group 0")
    assert_same_bits([w], before)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_tables_of_a_capturable_optimizer_stay_where_they_are(base, in_form, fast_backend):
    """A captured graph reads them at the address that it saw."""
    run = Run(in_form, base, fast_backend, capturable=True)
    run.step()
    addresses = [table.data_ptr() for table in tables_of(run.optimizer)]
    for new_rho, new_lr in ((0.1, 0.02), (0.3, 0.001)):
        run.optimizer.param_groups[0].update(rho=new_rho, lr=new_lr)
        run.step()
        ascent, descent = tables_of(run.optimizer)
        assert [ascent.data_ptr(), descent.data_ptr()] == addresses
        assert (ascent[0, 0].item(), descent[0, 0].item()) == (new_rho, new_lr)
        assert ascent.dtype == descent.dtype == torch.float64


def test_a_groups_row_is_its_own(fast_backend):
    """Rows in the order of the groups, in one table."""
    params = [parameter([1.0], torch.float32) for _ in range(3)]
    groups = [{"params": [p], "lr": 0.1 * (i + 1), "rho": 0.01 * (i + 1)} for i, p in enumerate(params)]
    optimizer = SAM(groups, SGD, lr=0.1, capturable=True, backend=fast_backend)

    def closure():
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    ascent, descent = tables_of(optimizer)
    assert ascent[:, 0].tolist() == pytest.approx([0.01, 0.02, 0.03]) and descent[:, 0].tolist() == pytest.approx(
        [0.1, 0.2, 0.3]
    )


TABLE = [[0.1, 0.9], [0.2, 0.8]]


def test_a_table_is_written_only_where_values_change():
    """On the CPU without capturable it is read in the call: a new one for new values, the same one for the same."""
    table = HyperTable()
    first = table.update(TABLE).on(CPU)
    assert first.dtype == torch.float64 and first.tolist() == TABLE
    assert table.update([list(row) for row in TABLE]).on(CPU) is first
    changed = table.update([[0.1, 0.9], [0.2, 0.7]]).on(CPU)
    assert changed.tolist() == [[0.1, 0.9], [0.2, 0.7]] and first.tolist() == TABLE


@pytest.mark.parametrize("compiled", [True, False])
def test_a_capturable_table_keeps_its_address(compiled):
    table = HyperTable()
    first = table.update(TABLE, True).on(CPU, compiled=compiled)
    for values in ([[0.5, 0.9], [0.2, 0.8]], TABLE, [[0.0, 0.0], [1.0, 1.0]]):
        again = table.update(values, True).on(CPU, compiled=compiled)
        assert again.tolist() == values
        if compiled:  # Python backends read on the host, which has no graph to keep an address for
            assert again.data_ptr() == first.data_ptr()
    larger = table.update([*TABLE, [0.3, 0.6]], True).on(CPU)
    assert larger.tolist() == [*TABLE, [0.3, 0.6]]


def test_what_is_on_a_device_is_copied_there_in_every_step():
    """Its value is not known here: a table that is written once would hold what it was at first."""
    table, written = HyperTable(), []
    tensor = torch.empty((), device=META)

    class Watched:
        """Stands in for the table's memory, of which ``meta`` has none."""

        def __init__(self, there):
            self.there, self.device = there, there.device

        def size(self):
            return self.there.size()

        def copy_(self, source, non_blocking=False):
            written.append(source.tolist())

        def __getitem__(self, place):
            return type("Cell", (), {"copy_": lambda self, source: written.append((place, source.device))})()

    assert table.update([[0.1, tensor], [0.2, 0.8]]).on(META).device == META
    there = table._devices[META]
    there.table = Watched(there.table)
    for _ in range(2):
        table.update([[0.1, tensor], [0.2, 0.8]]).on(META)
    assert written == [((0, 1), META)] * 2  # and the floats, which have not changed, not again
    written.clear()
    table.update([[0.3, tensor], [0.2, 0.8]]).on(META)
    assert written == [[[0.3, 0.0], [0.2, 0.8]], ((0, 1), META)]  # the floats first: they would overwrite it with 0


def test_a_tensor_gives_way_to_a_float_and_comes_back():
    table = HyperTable()
    tensor = torch.empty((), device=META)
    assert table.update([[tensor, 0.9]]).on(META).device == META
    back = table.update([[0.4, 0.9]]).on(CPU)
    assert back.device == CPU and back.tolist() == [[0.4, 0.9]]
    assert table.update([[tensor, 0.9]]).on(META).device == META


def test_python_backends_read_on_the_host(monkeypatch):
    table = HyperTable()
    tensor = torch.empty((), device=META)
    asked = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: asked.append(self) or 0.25, raising=False)
    host = table.update([[tensor, 0.9]]).on(META, compiled=False)
    assert host.device == CPU and host.tolist() == [[0.25, 0.9]] and [t.device for t in asked] == [META]


# ---- what the host can look at ---------------------------------------------------------------------------------------


def test_numbers_and_what_is_known_of_them():
    there = torch.empty((), device=META)
    assert number(3) == 3.0 and type(number(3)) is float and number(True) == 1.0
    assert number(torch.tensor(0.5)) == 0.5 and type(number(torch.tensor(0.5))) is float
    assert number(there) is there
    assert is_known(0.1) and is_known(None) and is_known(torch.tensor(0.1)) and not is_known(there)


@pytest.mark.filterwarnings("error")
def test_tensors_that_require_gradients_are_read_without_a_word(request):
    """Learned learning rates do; torch warns of float(tensor) then."""
    w = parameter([1.0])
    torch.set_warn_always(True)
    request.addfinalizer(lambda: torch.set_warn_always(False))
    leaf = {name: torch.tensor(value, requires_grad=True) for name, value in (("rho", 0.1), ("lr", 0.5), ("limit", 3.0))}
    optimizer = SAM([w], SGD, lr=0.5, rho=leaf["rho"], max_grad_norm=leaf["limit"])
    optimizer.param_groups[0]["lr"] = leaf["lr"]
    optimizer.step(lambda: (w**2).sum().backward())
    assert w.item() == pytest.approx(1 - 0.5 * 2.2)


def test_hyper_parameters_of_several_elements_are_refused():
    with pytest.raises(ValueError) as raised:
        SAM([parameter([1.0])], SGD, lr=0.1, rho=torch.tensor([0.1, 0.2]))
    assert_one_sentence(raised.value, "rho", "tensor([0.1")


@pytest.mark.parametrize("limit", [torch.tensor(0.5), torch.tensor([0.5])])
def test_a_limit_of_shape_one_does_not_broadcast_into_gradients(limit):
    w = parameter(3.0)
    optimizer = SAM([w], RMSprop, lr=0.1, alpha=0.0, eps=0.5, max_grad_norm=limit)  # w -= lr g / (|g| + eps), g clipped to 0.5
    optimizer.enabled = False
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w.item() == pytest.approx(3.0 - 0.1 * 0.5)


def test_betas_of_adam_may_be_on_a_device():
    base = Adam([parameter([1.0])])
    there = torch.empty((), device=META)
    base.param_groups[0]["betas"] = (0.9, there)
    assert fused_base(base).hyper(base.param_groups[0])[1:3] == [0.9, there]


def test_a_learning_rate_on_a_device_is_no_rate_of_zero():
    """``step()`` without a perturbation is taken where every rate is 0. One that cannot be seen is not."""
    w = parameter([1.0])
    optimizer = SAM([w], SGD, lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.empty((), device=META)
    w.grad = torch.ones_like(w)
    with warnings.catch_warnings(), pytest.raises(RuntimeError) as raised:
        warnings.simplefilter("error")
        optimizer.step()
    assert_one_sentence(raised.value, "perturbed()")
