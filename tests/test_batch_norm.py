"""Running statistics see one pass and not the other: against statistics by hand and against a model that saw one pass only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_fused import SAM
from sam_fused.batch_norm import RunningStatistics, freeze_batch_norm_stats
from tests.optim.helpers import assert_one_sentence, assert_same_bits

MOMENTA = (0.1, 0.7, None)


class Centering(nn.Module):
    """A normalisation of somebody's own: running_var alone, and what else a module may keep in buffers."""

    def __init__(self, features=4):
        super().__init__()
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("position_ids", torch.arange(features))
        self.register_buffer("moving_average_of_weights", torch.zeros(features))
        self.register_buffer("running_extra", None)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_var.lerp_(x.var(dim=0), 0.5)
                self.position_ids.add_(1)
                self.moving_average_of_weights.add_(1)
        return x / self.running_var.sqrt()


class Counting(nn.Module):
    """Counts batches and has no running statistics: ``num_batches_tracked`` alone is nobody's statistic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return x


def net(momentum=0.1):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Linear(4, 2))


def batches(count, rows=8, features=3):
    return [torch.randn(rows, features) * (index + 1) + index for index in range(count)]


def buffers(model):
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(model, expected):
    actual = dict(model.named_buffers())
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name}: {actual[name]} instead of {value}"


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", MOMENTA)
def test_statistics_are_those_of_the_first_passes_by_hand(momentum):
    norm = nn.BatchNorm1d(2, momentum=momentum).double()
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for step in range(1, 4):
        first = torch.randn(16, 2, dtype=torch.float64) + step
        norm(first)
        with freeze_batch_norm_stats(norm):
            norm(first + 100)
            norm(first - 100)
        factor = 1 / step if momentum is None else momentum
        mean = (1 - factor) * mean + factor * first.mean(dim=0)
        var = (1 - factor) * var + factor * first.var(dim=0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked.item() == step


LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d, (6, 3)),
    "BatchNorm2d": (nn.BatchNorm2d, (6, 3, 4, 4)),
    "BatchNorm3d": (nn.BatchNorm3d, (6, 3, 2, 2, 2)),
    "InstanceNorm1d": (lambda n, **options: nn.InstanceNorm1d(n, affine=True, track_running_stats=True, **options), (6, 3, 5)),
    "LazyBatchNorm1d": (lambda n, **options: nn.LazyBatchNorm1d(**options), (6, 3)),
}


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_sam_step_leaves_the_statistics_of_one_plain_forward(layer, momentum):
    if layer.startswith("Instance") and momentum is None:
        momentum = 0.3  # torch's has no cumulative average
    make, shape = LAYERS[layer]
    model = make(3, momentum=momentum)
    model(torch.randn(shape))  # one step into the run, so that no statistic is at its start
    plain = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend="foreach")
    x = torch.randn(shape)
    model(x).square().sum().backward()
    with optimizer.perturbed(), freeze_batch_norm_stats(model):
        model(x + 1).square().sum().backward()
    optimizer.step()
    plain(x)
    assert_same_buffers(model, buffers(plain))


def test_statistics_follow_inside_and_the_block_alone_is_undone():
    """Frozen by hiding the buffers, a forward inside would normalise with something else in evaluation."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    first, inside = batches(2)
    for each in (model, twin):
        each(first)
    with freeze_batch_norm_stats(model):
        model(inside)
        twin(inside)
        assert_same_buffers(model, buffers(twin))


def test_settings_of_the_modules_stay_what_they_are():
    model = net(momentum=0.25)
    with freeze_batch_norm_stats(model), freeze_batch_norm_stats(model):
        assert model.training and model[1].training and model[1].momentum == 0.25
        model(batches(1)[0])
    assert model.training and model[1].momentum == 0.25 and model[1].track_running_stats


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_nested_over_the_same_model_each_block_undoes_its_own():
    model = net()
    first, second, third = batches(3)
    before = buffers(model)
    with freeze_batch_norm_stats(model):
        model(first)
        between = buffers(model)
        with freeze_batch_norm_stats(model):
            model(second)
        assert_same_buffers(model, between)
        model(third)
    assert_same_buffers(model, before)
    model(first)
    assert model[1].num_batches_tracked.item() == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](first).mean(dim=0))


def test_one_object_serves_many_blocks_nested_ones_too():
    model = net()
    block = freeze_batch_norm_stats(model)
    for x in batches(2):
        model(x)
        before = buffers(model)
        with block:
            model(x)
            between = buffers(model)
            with block:
                model(x)
            assert_same_buffers(model, between)
        assert_same_buffers(model, before)


def test_as_a_decorator():
    model = net()
    before = buffers(model)

    @freeze_batch_norm_stats(model)
    def evaluate(x):
        return model(x).sum()

    assert evaluate(batches(1)[0]).requires_grad
    assert_same_buffers(model, before)


def test_an_exception_inside_passes_through_and_the_statistics_are_put_back():
    model = net()
    before = buffers(model)
    with pytest.raises(KeyboardInterrupt), freeze_batch_norm_stats(model):
        model(batches(1)[0])
        raise KeyboardInterrupt
    assert_same_buffers(model, before)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_backward_after_leaving(mode):
    """Autograd keeps the running statistics for the backward pass: put back where it sees it, that pass would be refused."""
    model = getattr(net(), mode)()
    reference = copy.deepcopy(model)
    outside, inside = batches(2)
    loss = model(outside).square().sum()
    with freeze_batch_norm_stats(model):
        loss = loss + model(inside).square().sum()
    loss.backward()
    (reference(outside).square().sum() + reference(inside).square().sum()).backward()
    assert_same_bits([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


def test_addresses_and_objects_stay():
    model = net()
    before = [(buffer, buffer.data_ptr()) for buffer in model.buffers()]
    with freeze_batch_norm_stats(model):
        model(batches(1)[0])
    after = [(buffer, buffer.data_ptr()) for buffer in model.buffers()]
    assert len(before) == 3 and all(a is b and p == q for (a, p), (b, q) in zip(before, after, strict=True))


# ---- which buffers ---------------------------------------------------------------------------------------------------


def test_a_class_of_ones_own_is_covered_and_nothing_else_in_it():
    model = nn.Sequential(Centering(), Counting())
    with freeze_batch_norm_stats(model):
        model(torch.randn(8, 4))
    assert model[0].running_var.tolist() == [1.0] * 4
    assert model[0].position_ids.tolist() == [1, 2, 3, 4]
    assert model[0].moving_average_of_weights.tolist() == [1.0] * 4
    assert model[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("converted", [False, True])
def test_sync_batch_norm_is_covered(converted):
    """Its forward needs a process group in training; its buffers are written as it writes them."""
    norm = nn.SyncBatchNorm(4)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net()) if converted else nn.Sequential(nn.Linear(3, 4), norm)
    assert isinstance(model[1], nn.SyncBatchNorm)
    with freeze_batch_norm_stats(model):
        model[1].running_mean.add_(3)
        model[1].running_var.mul_(2)
        model[1].num_batches_tracked.add_(1)
    assert model[1].running_mean.tolist() == [0.0] * 4 and model[1].running_var.tolist() == [1.0] * 4
    assert model[1].num_batches_tracked.item() == 0


def test_modules_without_statistics_and_lazy_ones_are_passed_over():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, track_running_stats=False), nn.Identity())
    x = torch.randn(8, 3)
    with freeze_batch_norm_stats(model):
        model(x)
    assert isinstance(model[0], nn.BatchNorm1d) and model[0].num_batches_tracked.item() == 1  # it had no statistics to keep
    seen = buffers(model)
    with freeze_batch_norm_stats(model):
        model(x)
    assert_same_buffers(model, seen)


def test_modules_used_twice_and_buffers_owned_twice():
    norm, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean = norm.running_mean
    model = nn.Sequential(norm, norm, nn.Sequential(norm, other))
    before = buffers(model)
    for _ in range(2):
        with freeze_batch_norm_stats(model):
            model(torch.randn(8, 3) + 5)
        assert_same_buffers(model, before)


def test_buffers_on_several_devices():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, device="meta"), nn.BatchNorm1d(3, dtype=torch.float64))
    before = [buffer.clone() for buffer in model.buffers()]
    with freeze_batch_norm_stats(model):
        for buffer in model.buffers():
            buffer.add_(1)
    for was, buffer in zip(before, model.buffers(), strict=True):
        assert buffer.device == was.device and (buffer.is_meta or torch.equal(buffer, was))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model():
    model = torch.jit.script(net())
    before = buffers(model)
    with freeze_batch_norm_stats(model, "1"):
        model(batches(1)[0])
        assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert_same_buffers(model, before)


# ---- what is named in addition ---------------------------------------------------------------------------------------


def with_prototypes():
    """A model with buffers that only a name tells to be statistics."""
    model = nn.Sequential(nn.Linear(3, 4), Centering(), nn.Sequential(Counting(), nn.Linear(4, 2)))
    model.register_buffer("prototypes", torch.zeros(2))
    model.register_buffer("absent", None)
    return model


def disturb(model):
    for buffer in model.buffers():
        buffer.add_(1)


ALSO = {
    "a buffer": (["prototypes"], {"prototypes"}),
    "a buffer of a child": (["1.position_ids"], {"1.position_ids"}),
    "a buffer that is a statistic anyway": (["1.running_var"], set()),
    "a buffer that is None": (["absent"], set()),
    "a module by name, its own buffers": (["1"], {"1.position_ids", "1.moving_average_of_weights"}),
    "a module by name, not its children's": (["2"], set()),
    "the model itself": ([""], {"prototypes"}),
    "two": (["prototypes", "2.0"], {"prototypes", "2.0.num_batches_tracked"}),
}


def check_also(model, also, prefix, kept):
    before = buffers(model)
    with freeze_batch_norm_stats(model, *also):
        disturb(model)
    after = dict(model.named_buffers())
    found = {name.removeprefix(prefix) for name in before if torch.equal(after[name], before[name])}
    assert found == kept | {"1.running_var"}


@pytest.mark.parametrize("case", ALSO)
def test_what_is_named_is_kept_and_nothing_beside_it(case):
    also, kept = ALSO[case]
    check_also(with_prototypes(), also, "", kept)


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("case", ALSO)
def test_names_in_a_compiled_model_with_its_prefix_or_without(case, prefixed):
    also, kept = ALSO[case]
    compiled = torch.compile(with_prototypes(), backend="eager")
    prefix = "_orig_mod."
    check_also(compiled, [(prefix + name).rstrip(".") for name in also] if prefixed else also, prefix, kept)


def test_modules_may_be_passed_themselves():
    model = with_prototypes()
    check_also(model, [model[1], model[2][0]], "", {"1.position_ids", "1.moving_average_of_weights", "2.0.num_batches_tracked"})
    check_also(model, [model[2], model], "", {"prototypes"})  # not their children's


def test_a_part_that_is_compiled_goes_by_either_name_and_either_object():
    for find in (lambda part: part, lambda part: part._orig_mod, lambda part: "1", lambda part: "1._orig_mod"):
        model = with_prototypes()
        model[1] = torch.compile(model[1], backend="eager")
        with freeze_batch_norm_stats(model, find(model[1])):
            disturb(model)
        inner = model[1]._orig_mod
        assert inner.position_ids.tolist() == [0, 1, 2, 3] and inner.running_var.tolist() == [1.0] * 4
        assert model.prototypes.tolist() == [1.0, 1.0]


def test_a_compiled_object_names_the_plain_model_that_it_compiles():
    model = with_prototypes()
    with freeze_batch_norm_stats(model, torch.compile(model, backend="eager")):
        disturb(model)
    assert model.prototypes.tolist() == [0.0, 0.0]


def test_a_model_wrapped_for_distributed_training(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for names in (["prototypes", "2.0"], ["module.prototypes", "module.2.0"]):
            wrapped = nn.parallel.DistributedDataParallel(with_prototypes())
            check_also(wrapped, names, "module.", {"prototypes", "2.0.num_batches_tracked"})
            both = torch.compile(nn.parallel.DistributedDataParallel(with_prototypes()), backend="eager")
            check_also(both, names, "_orig_mod.module.", {"prototypes", "2.0.num_batches_tracked"})
    finally:
        torch.distributed.destroy_process_group()


def test_a_child_called_module_is_a_child_and_no_wrapper():
    """Not everything with such an attribute is transparent: a name that is not there must not be looked for inside."""
    model = nn.Module()
    model.module = with_prototypes()
    with pytest.raises(ValueError):
        freeze_batch_norm_stats(model, "prototypes")
    with freeze_batch_norm_stats(model, "", "module"):
        disturb(model)
    assert model.module.prototypes.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "thing", ["protoypes", "1.running", "1.position_ids.more", "0.weight", "9", "module.prototypes", "_orig_mod.1", "."]
)
def test_an_unknown_name_is_one_sentence(thing):
    for make in (freeze_batch_norm_stats, RunningStatistics):
        with pytest.raises(ValueError) as error:
            make(with_prototypes(), "prototypes", thing)
        assert_one_sentence(error.value, "also", "expected", repr(thing), "named_modules")


def test_a_module_of_another_model_is_one_sentence():
    with pytest.raises(ValueError) as error:
        freeze_batch_norm_stats(net(), nn.BatchNorm1d(4))
    assert_one_sentence(error.value, "also", "BatchNorm1d", "modules()")


@pytest.mark.parametrize("thing", [3, None, torch.zeros(2), [nn.Identity()]], ids=["int", "None", "tensor", "list"])
def test_what_is_neither_module_nor_name_is_one_sentence(thing):
    with pytest.raises(TypeError) as error:
        freeze_batch_norm_stats(with_prototypes(), thing)
    assert_one_sentence(error.value, "also", type(thing).__name__)


@pytest.mark.parametrize("thing", [None, "model", [net()]], ids=["None", "str", "list"])
def test_what_is_no_model_is_one_sentence(thing):
    with pytest.raises(TypeError) as error:
        freeze_batch_norm_stats(thing)
    assert_one_sentence(error.value, "model", "torch.nn.Module", type(thing).__name__)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [True, False])
def test_a_compiled_model_leaves_the_statistics_of_one_forward(outer):
    model = net(momentum=None)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    first, second = batches(2)
    for x in (first, second):
        compiled(x)
        with freeze_batch_norm_stats(compiled if outer else model):
            compiled(x + 10)
        plain(x)
    torch.testing.assert_close(buffers(model), buffers(plain))
    assert model[1].num_batches_tracked.item() == 2


def test_a_block_inside_a_compiled_function():
    model = net(momentum=None)
    plain = copy.deepcopy(model)

    def both(x):
        outside = model(x).sum()
        with freeze_batch_norm_stats(model):
            return outside + model(x + 10).sum()

    compiled = torch.compile(both, backend="aot_eager")
    for x in batches(2):
        compiled(x).backward()
        plain(x)
    torch.testing.assert_close(buffers(model), buffers(plain))


# ---- what may happen to the buffers in between -----------------------------------------------------------------------


def test_converted_inside_the_values_come_back_converted():
    model = net()
    model(batches(1)[0])
    before = buffers(model)
    with freeze_batch_norm_stats(model):
        model(batches(2)[1])
        model.half()
    after = buffers(model)
    assert after["1.running_mean"].dtype == torch.float16 and after["1.num_batches_tracked"].dtype == torch.int64
    assert_same_buffers(model, {name: value.to(after[name].dtype) for name, value in before.items()})


def test_converted_in_place_the_values_come_back_converted():
    model = net()
    with freeze_batch_norm_stats(model):
        model(batches(2)[1])
        model[1].running_var.data = model[1].running_var.data.double()
    assert model[1].running_var.dtype == torch.float64 and model[1].running_var.tolist() == [1.0] * 4
    assert model[1].running_mean.tolist() == [0.0] * 4


def test_replaced_inside_the_new_one_and_the_old_one_hold_the_old_value():
    model = net()
    old = model[1].running_mean
    with freeze_batch_norm_stats(model):
        model(batches(2)[1])
        model[1].running_mean = torch.full((4,), 9.0)
    assert model[1].running_mean is not old
    assert model[1].running_mean.tolist() == old.tolist() == [0.0] * 4
    assert model[1].running_var.tolist() == [1.0] * 4


@pytest.mark.parametrize("change", ["resized", "resized in place", "none", "deleted"])
def test_one_that_is_another_or_gone_keeps_no_other_from_coming_back(change):
    model = net()
    with freeze_batch_norm_stats(model):
        model(batches(2)[1])
        if change == "resized":
            model[1].running_mean = torch.full((7,), 9.0)
        elif change == "resized in place":
            model[1].running_mean.data = torch.full((7,), 9.0)
        elif change == "none":
            model[1].running_mean = None
        else:
            del model[1].running_mean
    assert model[1].running_var.tolist() == [1.0] * 4 and model[1].num_batches_tracked.item() == 0
    if change.startswith("resized"):
        assert model[1].running_mean.tolist() == [9.0] * 7
    else:
        assert getattr(model[1], "running_mean", None) is None


def test_a_module_taken_out_inside_has_its_statistics_back():
    model = net()
    norm = model[1]
    with freeze_batch_norm_stats(model):
        model(batches(2)[1])
        model[1] = nn.BatchNorm1d(4)
        model(batches(2)[1])
    assert norm.running_mean.tolist() == [0.0] * 4
    assert model[1].num_batches_tracked.item() == 1  # it was not there on entry


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_put_back_without_save_and_a_second_one_do_nothing():
    model = net()
    statistics = RunningStatistics(model)
    model(batches(1)[0])
    seen = buffers(model)
    statistics.put_back()
    assert_same_buffers(model, seen)
    statistics.save()
    statistics.put_back()
    model(batches(1)[0])
    seen = buffers(model)
    statistics.put_back()
    assert_same_buffers(model, seen)


def test_the_last_save_counts():
    model = net()
    statistics = RunningStatistics(model)
    statistics.save()
    model(batches(1)[0])
    seen = buffers(model)
    statistics.save()
    model(batches(1)[0])
    statistics.put_back()
    assert_same_buffers(model, seen)


def test_every_save_looks_for_the_buffers_anew():
    model = net()
    statistics = RunningStatistics(model)
    for make in (lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4, dtype=torch.float64), lambda: nn.Sequential(Centering())):
        model[1] = make()
        before = buffers(model)
        statistics.save()
        disturb(model[1])
        statistics.put_back()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]) == ("running" in name or "num_batches" in name), name


def test_a_named_part_that_was_taken_out_is_said_by_the_next_save():
    model = with_prototypes()
    statistics = RunningStatistics(model, "2.0")
    statistics.save()
    model[2] = nn.Identity()
    with pytest.raises(ValueError) as error:
        statistics.save()
    assert_one_sentence(error.value, "'2.0'")
    disturb(model)
    seen = buffers(model)
    statistics.put_back()  # a save() that failed is none, and replaces the one before
    assert_same_buffers(model, seen)


def test_the_memory_of_the_copies_is_kept():
    """A captured graph reads them where they were when it was captured."""
    model = net()
    statistics = RunningStatistics(model)
    statistics.save()
    addresses = [value.data_ptr() for value in statistics._copies]
    for x in batches(3):
        statistics.put_back()
        model(x)
        statistics.save()
        assert [value.data_ptr() for value in statistics._copies] == addresses


def test_statistics_saved_in_inference_mode_can_be_saved_outside_of_it_later():
    model = net()
    statistics = RunningStatistics(model)
    for mode in (True, False):
        before = buffers(model)
        with torch.inference_mode(mode):
            statistics.save()
            model(batches(1)[0])
            statistics.put_back()
        assert_same_buffers(model, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device():
    model = net().cuda()
    statistics = RunningStatistics(model)
    before = buffers(model)
    x = torch.randn(8, 3, device="cuda")
    model(x).sum()
    model.load_state_dict(before, strict=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            statistics.save()
            model(x)
            statistics.put_back()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_buffers(model, before)
