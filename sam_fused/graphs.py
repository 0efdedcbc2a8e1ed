"""A whole training step, both passes and the optimizer, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ops import backends
from .ops.captures import kept_in
from .optim.bases import fused_base
from .optim.descent import is_capturable
from .optim.micro_batch import MicroBatchSAM
from .optim.sam import SAM
from .optim.state import Move, State


def graphed_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: SAM,
    sample: Sequence[Tensor],
    *,
    warmup: int = 3,
    capture: bool = True,
) -> GraphedStep:
    """Warms up, captures ``optimizer.step`` over ``loss_fn(model(inputs), *targets)``, and returns a function that replays it.

    For a ``MicroBatchSAM`` the graph holds all micro-batches of a batch. Between replays may change: the batch's values;
    weights, in place; learning rates, rho and every other number in the parameter groups, by schedulers or by hand;
    ``max_grad_norm``. What a replay could not see is refused, before the capture or at the call: loading a checkpoint, say,
    replaces the base optimizer's state, so load first. Gradients that are there are dropped.

    Args:
        model, loss_fn: ``loss_fn(model(inputs), *targets)`` is a scalar, the mean over the batch.
        optimizer: with ``capturable=True``, and SGD, Adam or AdamW as its base.
        sample: ``(inputs, *targets)``, tensors on the model's device, of the shapes and dtypes of every batch to come.
        warmup: how many steps are taken first, to compile, allocate and load. They are undone: weights, buffers, the base
            optimizer's state and random numbers are afterwards what they were.
        capture: False runs the same step eagerly, on any device: for looking at what would be captured.

    Example:
        >>> step = graphed_step(model, loss_fn, optimizer, (x, y))  # doctest: +SKIP
        >>> for x, y in loader:  # doctest: +SKIP
        ...     loss = step(x, y)
        ...     scheduler.step()

    Raises:
        TypeError: the optimizer is not ours, or the sample is no sequence of tensors.
        ValueError: something is not on the model's one CUDA device, or the loss is no scalar.
        RuntimeError: something would be frozen at the capture, without a word.
    """
    _check(model, optimizer, sample, capture)
    return GraphedStep(model, loss_fn, optimizer, tuple(sample), warmup, capture)


class GraphedStep:
    """``step(*batch)``: copies the batch to where the graph reads it, writes changed hyper-parameters, replays.

    Returns the clean loss, a copy. ``.grad`` holds, in the graph's memory, what a step leaves there, and so do the optimizer's
    ``losses`` and ``grad_norm``: the next call overwrites them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: SAM,
        sample: tuple[Tensor, ...],
        warmup: int,
        capture: bool,
    ) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._static = tuple(tensor.detach().clone() for tensor in sample)
        self._device = self._static[0].device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=self._device)
        self._frozen: list[tuple[str, Any]] = []
        self._readings: dict[str, Any] = {}  # where the graph leaves them
        self._read: dict[int, Any] = {}  # by the graph: buffers, tables and sets, for as long as it can be replayed
        optimizer.zero_grad(set_to_none=True)
        control = optimizer._control
        before = control.readings()
        try:
            buffers = list(model.buffers())
            with _undone(model, optimizer, self._device):
                self._warm_up(max(warmup, 1), on_a_stream=capture)
            _refuse_new_buffers(model, buffers)
            if capture:
                self._capture()
                self._readings = control.readings()
        finally:
            control.set_readings(before)
        self._frozen = _what_is_frozen(model, optimizer)

    def _warm_up(self, count: int, on_a_stream: bool) -> None:
        if not on_a_stream:
            for _ in range(count):
                self._run()
            return
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(count):
                self._run()
        torch.cuda.current_stream(self._device).wait_stream(side)

    def _capture(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)  # the gradients are to be the graph's own
        self._graph = torch.cuda.CUDAGraph()
        with kept_in(self._read), torch.cuda.graph(self._graph):
            self._loss = self._run()

    def _run(self) -> Tensor:
        def closure(inputs: Tensor = self._static[0], *targets: Tensor) -> Tensor:
            loss = self._loss_fn(self._model(inputs), *(targets or self._static[1:]))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn: expected a scalar, the batch's mean loss, got {got}: reduce it with .mean().")
            loss.backward()
            return loss

        batch = self._static if isinstance(self._optimizer, MicroBatchSAM) else ()
        loss: Tensor = self._optimizer.step(closure, *batch)
        return loss.detach()

    def __call__(self, *batch: Tensor) -> Tensor:
        """One step on ``batch``, of the sample's shapes and dtypes, on its device or on the CPU.

        Raises:
            ValueError: another number of tensors, or another shape, dtype or device than the sample's.
            RuntimeError: something that was frozen at the capture has changed since.
        """
        self._check_batch(batch)
        self._check_frozen()
        if self._graph is not None:
            self._check_state()
        for static, tensor in zip(self._static, batch, strict=True):
            # From the host it is waited for: who loads batches ahead moves them ahead, and knows when memory is free again.
            static.copy_(tensor, non_blocking=tensor.device == static.device)
        if self._graph is None:
            return self._run().clone()
        self._optimizer._refresh_hyper()
        self._graph.replay()
        self._optimizer._control.set_readings(self._readings)
        self._optimizer._note_step()
        return self._loss.clone()

    def _check_batch(self, batch: tuple[Tensor, ...]) -> None:
        if len(batch) != len(self._static):
            raise ValueError(
                f"step(*batch): expected {len(self._static)} tensors as in the sample, got {len(batch)}: pass each."
            )
        for index, (tensor, static) in enumerate(zip(batch, self._static, strict=True)):
            if tensor.size() != static.size() or tensor.dtype != static.dtype:
                raise ValueError(
                    f"step(*batch): expected tensor {index} of {static.dtype} {tuple(static.size())} as in the sample, got "
                    f"{tensor.dtype} {tuple(tensor.size())}: drop the last, smaller batch (drop_last=True), or take it with "
                    "optimizer.step."
                )
            if tensor.device != static.device and not tensor.is_cpu:
                raise ValueError(
                    f"step(*batch): expected tensor {index} on {static.device} or on the CPU, got {tensor.device}: move it to "
                    "either."
                )

    def _check_state(self) -> None:
        """What ``optimizer.step`` asks before it runs a closure; and after ``perturbed()`` it would run it once, not twice."""
        control = self._optimizer._control
        control.require(Move.STEP_CLOSURE)
        if control.state is not State.CLEAN:
            raise RuntimeError(
                "step(*batch) is not possible while a perturbed() block was left and its step has not been taken: call "
                "optimizer.step() first, or optimizer.restore() to give the step up."
            )
        self._optimizer._refuse_fresh_gradients()

    def _check_frozen(self) -> None:
        for (name, was), (_, now) in zip(self._frozen, _what_is_frozen(self._model, self._optimizer), strict=True):
            if now != was:
                raise RuntimeError(
                    f"step(*batch): expected {name} as at the capture, got it changed, which the graph does not see: make a "
                    "new graphed_step."
                )


def _what_is_frozen(model: nn.Module, optimizer: SAM) -> list[tuple[str, Any]]:
    """What the host decides by in a step, as it is now: a replay follows the decisions of the capture."""
    base = optimizer.base_optimizer
    family = fused_base(base)
    groups = base.param_groups
    keys = () if family is None else tuple(family.state_keys(group) for group in groups)
    params = [param for group in groups for param in group["params"]]
    return [
        ("the optimizer's parameters", [param.data_ptr() for param in params]),
        ("the model's parameters and buffers", [t.data_ptr() for t in (*model.parameters(), *model.buffers())]),
        (
            "the base optimizer's state (loading a checkpoint replaces it)",
            [t.data_ptr() for held in base.state.values() for t in held.values() if isinstance(t, Tensor)],
        ),
        ("step hooks (some or none)", bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)),
        ("which parameters are perturbed, and how", _ascents(optimizer)),
        ("which parameters require gradients", [param.requires_grad for param in params]),
        ("momentum, amsgrad and step hooks of the base optimizer (some or none)", (family is None, keys)),
        (
            "which hyper-parameters are tensors, and which ones",
            [(i, key, id(v)) for i, group in enumerate(groups) for key, v in group.items() if isinstance(v, Tensor)]
            + [id(optimizer.max_grad_norm) if isinstance(optimizer.max_grad_norm, Tensor) else None],
        ),
        ("maximize", [bool(group.get("maximize")) for group in groups]),
        ("optimizer.enabled", optimizer.enabled),
        ("max_grad_norm (a limit or none)", optimizer.max_grad_norm is None),
        ("num_micro_batches", getattr(optimizer, "num_micro_batches", 1)),
        ("the modules' training or evaluation mode", [module.training for module in model.modules()]),
    ]


def _ascents(optimizer: SAM) -> list[Any]:
    keys = [optimizer._names[name] for name in ("perturb", "adaptive", "eta", "weight_decay_in_ascent")]
    control = optimizer._control
    return [control.p, control.normalize, *([group[key] for key in keys] for group in optimizer.base_optimizer.param_groups)]


def _refuse_new_buffers(model: nn.Module, before: list[Tensor]) -> None:
    """A buffer that forward replaces instead of writing it would be the old one in every replay."""
    now = list(model.named_buffers())
    new = [name for index, (name, buffer) in enumerate(now) if index >= len(before) or buffer is not before[index]]
    if new or len(now) != len(before):
        raise RuntimeError(
            f"graphed_step: expected forward passes that write buffers in place, got {', '.join(new) or 'one less'} replaced "
            "by another tensor: use copy_(), mul_() and the like in forward."
        )


@contextmanager
def _undone(model: nn.Module, optimizer: SAM, device: torch.device) -> Any:
    """Weights, buffers, the base optimizer's state and random numbers become what they were, in place: a graph has addresses.

    State that was created meanwhile becomes what a first step finds: zeros.
    """
    base = optimizer.base_optimizer
    tensors = [*(p for g in base.param_groups for p in g["params"]), *model.parameters(), *model.buffers()]
    tensors = list({id(tensor): tensor for tensor in tensors}.values())
    before = [tensor.detach().clone() for tensor in tensors]
    state = {p: {k: v.clone() for k, v in held.items() if isinstance(v, Tensor)} for p, held in base.state.items()}
    overflows = optimizer.ascent_overflows.clone()
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    random = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.data.copy_(value)  # through .data: a statistic that autograd has saved is not its business
            for param, held in base.state.items():
                for key, value in held.items():
                    if isinstance(value, Tensor):
                        known = state.get(param, {}).get(key)
                        value.zero_() if known is None else value.copy_(known)
            optimizer.ascent_overflows.copy_(overflows)
        for generator, saved in zip(generators, random, strict=True):
            generator.set_state(saved)


def _check(model: nn.Module, optimizer: SAM, sample: Sequence[Tensor], capture: bool) -> None:
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"optimizer: expected a sam_fused.SAM or MicroBatchSAM, got {type(optimizer).__name__}: wrap it in one."
        )
    if not isinstance(sample, (tuple, list)) or not sample or not all(isinstance(entry, Tensor) for entry in sample):
        raise TypeError(
            "sample: expected a tuple (inputs, *targets) of tensors, because everything else would be frozen at the capture, "
            f"got {type(sample).__name__}: pass tensors alone."
        )
    base = optimizer.base_optimizer
    params = [param for group in base.param_groups for param in group["params"]]
    device = params[0].device
    strangers = [tensor.device for tensor in (*params, *model.parameters(), *sample) if tensor.device != device]
    if strangers or (capture and device.type != "cuda"):
        wanted = "one CUDA device" if capture else "one device"
        raise ValueError(
            f"graphed_step: expected the model, the optimizer's parameters and the sample on {wanted}, got "
            f"{', '.join(sorted({str(d) for d in (device, *strangers)}))}: move them there"
            + (", or pass capture=False to run the step eagerly." if capture else ".")
        )
    for found, remedy in _obstacles(model, optimizer, device):
        raise RuntimeError(f"graphed_step: expected a step that a graph can replay, got {found}: {remedy}.")


def _obstacles(model: nn.Module, optimizer: SAM, device: torch.device) -> list[tuple[str, str]]:
    """What would be frozen at the capture, or would break it, with the remedy."""
    control, base = optimizer._control, optimizer.base_optimizer
    family = fused_base(base)
    backend = backends.choose(device, control.backend)
    cumulative = [
        name
        for name, module in model.named_modules()
        if module.training and getattr(module, "track_running_stats", False) and getattr(module, "momentum", 0) is None
    ]
    creates = family is not None and any(
        group.get("momentum") and group.get("dampening") and base.state.get(param, {}).get("momentum_buffer") is None
        for group in base.param_groups
        for param in group["params"]
    )
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    found = [
        (control.state is not State.CLEAN, "a step that was begun", "finish it, or call restore()"),
        (
            not is_capturable(control, base),
            "hyper-parameters that the host hands over at every step",
            "construct the optimizer with capturable=True",
        ),
        (family is None, f"{type(base).__name__} running its own step", "use SGD, Adam or AdamW, without step hooks"),
        (
            device.type != "cpu" and not backends.is_compiled(backend),
            f"the {backend} backend, which reads hyper-parameters on the host",
            "see python -m sam_fused.info for why the kernels are missing",
        ),
        (bool(hooks), "step hooks, which would run at the capture alone", "call them beside the replay"),
        (
            control.p != 2 or any(own.is_written for own in map(optimizer._ascent.own_group, base.param_groups)),
            "a perturbation with eta, a layerwise T, p = inf or a weight decay in the ascent, which the host writes out",
            "use the definitions that the kernels form",
        ),
        (control.same_dropout, "same_dropout, which sets the generators from the host", "leave it out"),
        (control.track_perturbation, "track_perturbation, which allocates for looking", "leave it out"),
        (
            bool(cumulative),
            f"batch norm with momentum=None in {', '.join(cumulative)}, whose average is computed on the host",
            "give it a momentum, or put it in evaluation mode",
        ),
        (
            creates,
            "a first step of SGD with momentum and dampening, which every replay would repeat",
            "take one step with optimizer.step before",
        ),
    ]
    return [(what, remedy) for there, what, remedy in found if there]
