"""Running statistics that see one pass of a step and not the other.

A BatchNorm in training mode folds every batch into its running mean and variance. SAM runs each batch twice, and the second
time at weights that nobody will use: statistics that see both passes belong to no network that is ever evaluated.

What counts is a name: a buffer called ``running_*``, and ``num_batches_tracked`` beside one, as torch's normalisations and
those modelled on them have. Copies are put back in place, so that addresses stay (captured graphs, DDP's lists of buffers), and
through ``.data``, so that a backward pass whose forward came before does not mind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator
from itertools import chain
from operator import is_
from types import TracebackType
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from .compiled import not_traced
from .ops.fingerprint import Fingerprint

_Place = tuple[nn.Module, str]

# What torch.compile, FSDP and activation checkpointing call the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class RunningStatistics:
    """The running statistics of a model, to be saved before a pass and put back after it. Nothing waits for a device.

    Args:
        model: every module in it that owns running statistics is covered: BatchNorm, SyncBatchNorm, InstanceNorm with
            ``track_running_stats``, and any class with buffers called ``running_*``. Lazy ones are, once they have been run.
            Other buffers (position ids, masks, moving averages of weights) are left alone.
        *also: what else a pass must not change: modules, or names of modules or of single buffers, with or without a wrapper's
            prefix (``_orig_mod.``, ``module.``). Of a module its own buffers, not its children's.

    Raises:
        TypeError: the model is no module, or one of ``also`` is neither a module nor a name.
        ValueError: one of ``also`` is not part of the model.
    """

    def __init__(self, model: nn.Module, *also: nn.Module | str) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}: pass the model that has the statistics."
            )
        self._model = model
        self._also = also
        self._named_places(list(_modules(model)))
        self._places: list[_Place] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._groups: list[list[int]] = []  # copied in one call each: places in the lists, by device and dtype
        self._buffers_were = Fingerprint()
        self._saved = False

    @torch.no_grad()
    @not_traced
    def save(self) -> None:
        """Copies the statistics aside, in place of what was saved before. They are looked for anew: modules may be swapped.

        Raises:
            ValueError: one of ``also`` is not part of the model any more.
        """
        self._saved = False
        modules = list(_modules(self._model))
        places = [(module, name) for module in modules for name in _statistics(module)]
        if self._also:
            places = list(dict.fromkeys(places + self._named_places(modules)))
        self._places = places
        self._buffers = [module._buffers[name] for module, name in places]  # type: ignore[misc]
        if not self._fit(self._buffers):
            self._allocate(self._buffers)
        self._copy(self._copies, self._buffers)
        self._saved = True

    @torch.no_grad()
    @not_traced
    def put_back(self) -> None:
        """Every saved statistic has its old value again, in place; nothing if nothing was saved since the last call.

        A buffer that was replaced or converted in between gets its value in the new place and dtype; one that now has another
        shape, or is gone, is not the one that was saved, and is left alone.
        """
        if not self._saved:
            return
        present = [_buffer(module, name) for module, name in self._places]
        if all(map(is_, present, self._buffers)) and self._fit(self._buffers):
            self._copy([buffer.data for buffer in self._buffers], self._copies)
        else:
            # Whoever still holds a buffer that was replaced finds its old value there, too.
            for target, copy in zip(chain(self._buffers, present), chain(self._copies, self._copies), strict=True):
                if _holds(target) and target.size() == copy.size():
                    target.data.copy_(copy)
        self._saved = False

    def _fit(self, buffers: list[Tensor]) -> bool:
        """Whether the copies are like these buffers. Kept from step to step they also keep their addresses."""
        if len(buffers) != len(self._copies):
            return False
        return self._buffers_were.matches(buffers) or all(map(_alike, buffers, self._copies))

    def _allocate(self, buffers: list[Tensor]) -> None:
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            self._copies = [torch.empty_like(buffer.data) for buffer in buffers]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, buffer in enumerate(buffers):
            groups.setdefault((buffer.device, buffer.dtype), []).append(index)
        self._groups = list(groups.values())
        self._buffers_were.take(buffers)

    def _copy(self, targets: list[Tensor], values: list[Tensor]) -> None:
        for indices in self._groups:
            torch._foreach_copy_([targets[index] for index in indices], [values[index] for index in indices])

    def _named_places(self, modules: list[nn.Module]) -> list[_Place]:
        places: list[_Place] = []
        for thing in self._also:
            if isinstance(thing, str):
                places += _places_called(self._model, thing)
            elif isinstance(thing, nn.Module):
                candidates = list(_unwrapping(thing))
                if not any(module is known for module in candidates for known in modules):
                    raise ValueError(
                        f"also: expected a module of the model, got a {type(thing).__name__} from elsewhere: pass one of "
                        "model.modules(), or its name."
                    )
                places += [place for module in candidates for place in _own(module)]
            else:
                raise TypeError(
                    f"also: expected modules of the model, or names of its modules or buffers, got {type(thing).__name__}: "
                    "pass for example 'encoder.prototypes'."
                )
        return places


class freeze_batch_norm_stats(ContextDecorator):
    """Running statistics see nothing of what happens inside: ``with freeze_batch_norm_stats(model): ...``

    On the way out, also by an exception, each has the bits that it had on the way in, ``num_batches_tracked`` included. Blocks
    may be nested, over the same model too, and one object may be entered any number of times. Arguments and errors are those
    of ``RunningStatistics``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> with freeze_batch_norm_stats(model):
        ...     output = model(torch.randn(8, 3))
        >>> model[1].num_batches_tracked.item()
        0
    """

    def __init__(self, model: nn.Module, *also: nn.Module | str) -> None:
        RunningStatistics(model, *also)  # says here, where the arguments are written, what is wrong with them
        self._model = model
        self._also = also
        self._entered: list[RunningStatistics] = []

    def __enter__(self) -> None:
        statistics = RunningStatistics(self._model, *self._also)
        statistics.save()
        self._entered.append(statistics)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._entered.pop().put_back()


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """``model.modules()`` in another order, and in a fraction of its time: that one is a generator per level of nesting."""
    seen, waiting = {model}, [model]
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def _statistics(module: nn.Module) -> list[str]:
    """The names of the module's own running statistics that hold something."""
    if not module._buffers:
        return []
    buffers = dict(module._buffers.items())  # a scripted module's is no dict
    names = [name for name, buffer in buffers.items() if name.startswith("running_") and _holds(buffer)]
    if names and _holds(buffers.get("num_batches_tracked")):
        names.append("num_batches_tracked")
    return names


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    return module._buffers[name] if name in module._buffers else None  # noqa: SIM401  # a scripted module's has no get()


def _holds(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not is_lazy(buffer)


def _own(module: nn.Module) -> list[_Place]:
    return [(module, name) for name, buffer in module._buffers.items() if _holds(buffer)]


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """The module that a wrapper stands for; None where the module is no wrapper."""
    if isinstance(wrapper, (DataParallel, DistributedDataParallel)):
        return wrapper.module  # type: ignore[no-any-return]
    return next((wrapper._modules[name] for name in _WRAPPED if name in wrapper._modules), None)


def _unwrapping(module: nn.Module) -> Iterator[nn.Module]:
    """The module; if it is a wrapper then what it wraps, and so on."""
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        inner = _inside(inner)


def _places_called(model: nn.Module, name: str) -> list[_Place]:
    """The buffer of this name, or the own buffers of the module of this name; wrappers' prefixes may be there or not."""
    module, parts = model, name.split(".") if name else []
    for index, part in enumerate(parts):
        holder = next((m for m in _unwrapping(module) if part in m._modules or part in m._buffers), None)
        if holder is not None and part in holder._buffers and index == len(parts) - 1:
            return [(holder, part)] if _holds(holder._buffers[part]) else []
        child = None if holder is None or part not in holder._modules else holder._modules[part]
        if child is None:
            raise ValueError(
                f"also: expected the name of a module or of a buffer of the model, got {name!r}: names are those of "
                "model.named_modules() and model.named_buffers()."
            )
        module = child
    return [place for inner in _unwrapping(module) for place in _own(inner)]


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device and first.size() == second.size()
