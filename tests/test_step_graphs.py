"""``graphed_step`` without a GPU: everything but the capture, which ``capture=False`` leaves out. tests/gpu has the rest."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, RMSprop

from sam_fused import SAM, MicroBatchSAM, graphed_step
from tests.optim.helpers import assert_one_sentence, assert_same_bits, assert_same_state, snapshot, snapshot_state

BASES = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True}),
}
FORMS = {"sam": (SAM, {}), "micro-batches": (MicroBatchSAM, {"num_micro_batches": 4})}


class Task:
    """A net with batch norm and dropout. Two of them are bit-identical."""

    def __init__(self, form="sam", base="SGD", **kwargs):
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
        self.model = torch.nn.Sequential(*layers)
        optimizer, own = FORMS[form]
        base_class, settings = BASES[base]
        self.optimizer = optimizer(
            self.model.parameters(), base_class, rho=0.1, **own, **{"capturable": True, **settings, **kwargs}
        )
        self.batches = [(torch.randn(12, 6), torch.randint(3, (12,))) for _ in range(4)]

    def graphed(self, **kwargs):
        return graphed_step(self.model, F.cross_entropy, self.optimizer, self.batches[0], **{"capture": False, **kwargs})

    def eager(self, x, y):
        def closure(x=x, y=y):
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            return loss

        batch = (x, y) if isinstance(self.optimizer, MicroBatchSAM) else ()
        return self.optimizer.step(closure, *batch)

    def everything(self):
        return snapshot([*self.model.parameters(), *self.model.buffers()]), snapshot_state(self.optimizer)


def assert_same(first, second):
    ours, theirs = first.everything(), second.everything()
    assert_same_bits(ours[0], theirs[0])
    assert_same_state(ours[1], theirs[1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_it_trains_as_the_optimizer_does(form, base):
    ours, eager = Task(form, base), Task(form, base)
    torch.manual_seed(1)
    step = ours.graphed()
    schedulers = [torch.optim.lr_scheduler.StepLR(task.optimizer, 2, gamma=0.5) for task in (ours, eager)]
    found = []
    for number, (x, y) in enumerate(ours.batches):
        found.append(step(x, y))
        schedulers[0].step()
        ours.optimizer.param_groups[0]["rho"] = 0.1 / (number + 1)
    torch.manual_seed(1)
    for number, (x, y) in enumerate(eager.batches):
        assert float(eager.eager(x, y).detach()) == float(found[number])
        schedulers[1].step()
        eager.optimizer.param_groups[0]["rho"] = 0.1 / (number + 1)
    assert_same(ours, eager)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_warming_up_leaves_no_trace(form, base, steps_before):
    """Weights, statistics, momentum, step counts, random numbers, the count of overflows."""
    ours, untouched = Task(form, base), Task(form, base)
    for task in (ours, untouched):
        torch.manual_seed(1)
        for x, y in task.batches[:steps_before]:
            task.eager(x, y)
    random = torch.get_rng_state()
    before = snapshot([*ours.model.parameters(), *ours.model.buffers()])
    here = [p.data_ptr() for p in ours.model.parameters()]
    ours.graphed(warmup=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_bits([*ours.model.parameters(), *ours.model.buffers()], before)
    assert [p.data_ptr() for p in ours.model.parameters()] == here
    # Whatever state there is now is what a first step finds: the next step is bit for bit the one without it.
    for task in (ours, untouched):
        torch.set_rng_state(random)
        task.eager(*task.batches[3])
    assert_same(ours, untouched)
    assert int(ours.optimizer.ascent_overflows) == 0


def test_warming_up_is_not_a_step_to_read_of():
    task = Task(max_grad_norm=1.0)
    step = task.graphed()
    assert task.optimizer.losses == (None, None) and task.optimizer.grad_norm is None
    step(*task.batches[0])
    assert task.optimizer.losses.rise is not None
    losses, norm = task.optimizer.losses, task.optimizer.grad_norm
    task.graphed()
    assert task.optimizer.losses == losses and task.optimizer.grad_norm is norm


def test_the_loss_is_a_copy():
    task = Task()
    step = task.graphed()
    first = step(*task.batches[0])
    kept = float(first)
    step(*task.batches[1])
    assert float(first) == kept


def test_the_batch_given_is_the_batch_used():
    """And not the sample, or the tensors of the call before."""
    task = Task()
    step = task.graphed()
    task.model.eval()
    step = task.graphed()
    losses = [float(step(*batch)) for batch in task.batches[:2]]
    assert losses[0] != losses[1]
    x, y = (tensor.clone() for tensor in task.batches[2])
    with torch.no_grad():
        wanted = float(F.cross_entropy(task.model(x), y))
    assert float(step(x, y)) == pytest.approx(wanted, rel=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------------


def refused(error, task, *words, **kwargs):
    before = task.everything()
    with pytest.raises(error) as raised:
        task.graphed(**kwargs)
    assert_one_sentence(raised.value, *words)
    assert_same_bits(task.everything()[0], before[0])


def test_a_capture_needs_a_cuda_device():
    if torch.get_default_device().type == "cuda":
        pytest.skip("there is one")
    refused(ValueError, Task(), "one CUDA device", "cpu", "capture=False", capture=True)


def test_what_a_graph_would_freeze():
    refused(RuntimeError, Task(capturable=False), "capturable=True")
    refused(RuntimeError, Task(same_dropout=True), "same_dropout")
    refused(RuntimeError, Task(track_perturbation=True), "track_perturbation")
    refused(RuntimeError, Task(dampening=0.1, nesterov=False), "dampening")
    for written in (
        {"adaptive": True, "eta": 0.1},
        {"adaptive": "layerwise"},
        {"p": math.inf},
        {"weight_decay": 0.1, "weight_decay_in_ascent": True},
    ):
        refused(RuntimeError, Task(**written), "which the host writes out")
    for formed in ({"adaptive": True}, {"normalize": False}, {"weight_decay_in_ascent": True}):
        Task(**formed).graphed()
    begun = Task()
    F.cross_entropy(begun.model(begun.batches[0][0]), begun.batches[0][1]).backward()
    begun.optimizer.first_step()
    with pytest.raises(RuntimeError) as raised:
        begun.graphed()
    assert_one_sentence(raised.value, "begun")
    hooked = Task()
    hooked.optimizer.register_step_post_hook(lambda *_: None)
    refused(RuntimeError, hooked, "step hooks")
    hooked = Task()
    hooked.optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    refused(RuntimeError, hooked, "own step")
    cumulative = Task()
    cumulative.model[1].momentum = None
    refused(RuntimeError, cumulative, "momentum=None", "1")
    cumulative.model.eval()
    cumulative.graphed()


def test_dampening_is_fine_once_the_buffers_exist():
    ours, eager = Task(dampening=0.1, nesterov=False), Task(dampening=0.1, nesterov=False)
    for task in (ours, eager):
        torch.manual_seed(1)
        task.eager(*task.batches[0])
    random = torch.get_rng_state()
    ours.graphed()(*ours.batches[1])
    torch.set_rng_state(random)
    eager.eager(*eager.batches[1])
    assert_same(ours, eager)


def test_bases_without_a_fused_form_are_refused():
    model = torch.nn.Linear(6, 3)
    optimizer = SAM(model.parameters(), RMSprop, lr=0.1, capturable=False)
    optimizer._control.capturable = True
    with pytest.raises(RuntimeError) as raised:
        graphed_step(model, F.cross_entropy, optimizer, (torch.randn(4, 6), torch.randint(3, (4,))), capture=False)
    assert_one_sentence(raised.value, "RMSprop", "own step")


def test_adam_s_own_flag_counts():
    model = torch.nn.Linear(6, 3)
    optimizer = SAM(model.parameters(), Adam, lr=0.1, capturable=True)
    assert optimizer.param_groups[0]["capturable"] is True
    graphed_step(model, F.cross_entropy, optimizer, (torch.randn(4, 6), torch.randint(3, (4,))), capture=False)


def test_what_is_no_optimizer_sample_or_loss():
    task = Task()
    x, y = task.batches[0]
    plain = SGD(task.model.parameters(), lr=0.1)
    with pytest.raises(TypeError) as raised:
        graphed_step(task.model, F.cross_entropy, plain, (x, y), capture=False)
    assert_one_sentence(raised.value, "SGD")
    for sample in (x, (), (x, "label"), {"x": x}):
        with pytest.raises(TypeError) as raised:
            graphed_step(task.model, F.cross_entropy, task.optimizer, sample, capture=False)
        assert_one_sentence(raised.value, "sample")
    before = task.everything()
    with pytest.raises(ValueError) as raised:
        graphed_step(
            task.model, lambda out, y: F.cross_entropy(out, y, reduction="none"), task.optimizer, (x, y), capture=False
        )
    assert_one_sentence(raised.value, "loss_fn", "(12,)")
    assert_same_bits(task.everything()[0], before[0])
    meta = torch.randn(12, 6, device="meta")
    with pytest.raises(ValueError) as raised:
        graphed_step(task.model, F.cross_entropy, task.optimizer, (meta, y), capture=False)
    assert_one_sentence(raised.value, "meta")


def test_batches_unlike_the_sample():
    task = Task()
    step = task.graphed()
    x, y = task.batches[0]
    before = task.everything()
    unlike = {
        "shape": ((x[:5], y[:5]), ("(5, 6)", "drop_last")),
        "dtype": ((x.double(), y), ("float64",)),
        "count": ((x,), ("got 1",)),
        "device": ((x.to("meta"), y), ("meta",)),
    }
    for batch, words in unlike.values():
        with pytest.raises(ValueError) as raised:
            step(*batch)
        assert_one_sentence(raised.value, *words)
    assert_same_bits(task.everything()[0], before[0])


CHANGES = {
    "optimizer.enabled": lambda task: setattr(task.optimizer, "enabled", False),
    "max_grad_norm": lambda task: setattr(task.optimizer, "max_grad_norm", 1.0),
    "num_micro_batches": lambda task: setattr(task.optimizer, "num_micro_batches", 2),
    "training or evaluation mode": lambda task: task.model.eval(),
    "require gradients": lambda task: task.model[0].requires_grad_(False),
    "are perturbed": lambda task: task.optimizer.param_groups[0].update(adaptive=True),
    "maximize": lambda task: task.optimizer.param_groups[0].update(maximize=True),
    "momentum": lambda task: task.optimizer.param_groups[0].update(momentum=0.0, nesterov=False),
    "optimizer's parameters": lambda task: task.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    "model's parameters": lambda task: setattr(task.model[1], "running_mean", torch.zeros(8)),
    "tensors": lambda task: task.optimizer.param_groups[0].update(lr=torch.tensor(0.1)),
    "state": lambda task: task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict())),
    "step hooks (": lambda task: task.optimizer.register_step_post_hook(lambda *_: None),
    "hooks of the base": lambda task: task.optimizer.base_optimizer.register_step_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_frozen_and_has_changed(name):
    task = Task("micro-batches")
    step = task.graphed()
    step(*task.batches[0])
    CHANGES[name](task)
    before = task.everything()
    with pytest.raises(RuntimeError) as raised:
        step(*task.batches[1])
    assert_one_sentence(raised.value, name, "new graphed_step")
    assert_same_bits(task.everything()[0], before[0])


class Replayed:
    """Stands in for a captured graph."""

    def replay(self):
        raise AssertionError("replayed")


@pytest.mark.parametrize("situation", ["perturbed", "ready", "accumulated", "fresh gradients", "closure"])
def test_a_replay_in_the_middle_of_a_step(situation):
    """It would take perturbed weights for the backup, or overwrite sums."""
    task = Task("micro-batches" if situation == "accumulated" else "sam")
    step = task.graphed()
    step._graph = Replayed()
    x, y = task.batches[0]

    def evaluate():
        F.cross_entropy(task.model(x), y).backward()

    def replay():
        before = task.everything()
        with pytest.raises(RuntimeError) as raised:
            step(x, y)
        assert_one_sentence(raised.value, "step(")
        assert_same_bits(task.everything()[0], before[0])

    optimizer = task.optimizer
    if situation == "closure":
        optimizer.step(lambda: (evaluate(), replay())[0])
        return
    evaluate()
    if situation == "perturbed":
        optimizer.first_step()
    elif situation == "ready":
        with optimizer.perturbed():
            evaluate()
    elif situation == "accumulated":
        with optimizer.micro_batch():
            evaluate()
    replay()


def test_buffers_that_forward_replaces():
    class Mean(torch.nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
            return super().forward(x) - self.mean

    model = Mean()
    optimizer = SAM(model.parameters(), SGD, lr=0.1, capturable=True)
    with pytest.raises(RuntimeError) as raised:
        graphed_step(model, F.cross_entropy, optimizer, (torch.randn(4, 6), torch.randint(3, (4,))), capture=False)
    assert_one_sentence(raised.value, "mean", "copy_()")


def test_hyper_parameters_reach_the_tables_that_a_graph_reads():
    """``__call__`` writes them before a replay; on the CPU the tables are the same ones, at one address."""
    task = Task("micro-batches", "AdamW", max_grad_norm=1.0)
    task.graphed()
    ascent, descent = task.optimizer._ascent._hyper, task.optimizer._descent._hyper
    cpu = torch.device("cpu")
    tables = [table.on(cpu) for table in (ascent, descent, task.optimizer._descent._limit)]
    here = [table.data_ptr() for table in tables]
    group = task.optimizer.param_groups[0]
    group.update(rho=0.7, lr=0.3, weight_decay=0.2)
    task.optimizer.max_grad_norm = 5.0
    task.optimizer._refresh_hyper()
    assert [tables[0][0, 0].item(), tables[1][0, 0].item(), tables[1][0, 4].item(), tables[2].item()] == [0.7, 0.3, 0.2, 5.0]
    assert [table.data_ptr() for table in tables] == here
