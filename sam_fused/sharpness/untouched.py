"""What a pass over the data changes, and has to put back: weights, buffers, training flags, random number generators.

Values are put back in place, so that addresses stay (captured graphs, DDP's lists), and through ``.data``, so that a backward
pass whose forward came before the measurement does not mind.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..randomness import Randomness
from . import loaders

BATCH_NORM = ("eval", "train")


class Untouched:
    """A snapshot of modules and of the generators: ``begin`` sets up a pass, ``put_back`` undoes it and all that it did.

    To be used as ``snapshot = Untouched(...)``, then ``begin()`` and the pass in two nested ``try`` whose ``finally`` both call
    ``put_back()``. An interrupt before the ``try`` finds nothing changed, one inside is undone by the inner ``put_back``, and
    one that comes as that is being called by the outer one, which does what is left. A ``with`` would have moments in between.

    Args:
        roots: the model, and the loss if it is a module. All parameters, also frozen ones, their gradients, buffers and
            training flags in them are covered: a forward may write any of these.
        tensors: what else the pass will write.
        batches: whose own generators (a DataLoader's, its samplers') are covered too.
        batch_norm: ``"eval"`` or ``"train"``: the mode of modules with running statistics. Everything else is in eval mode,
            dropout included.
        seed: what the generators are seeded with for the pass, so that every pass shuffles and augments alike.
    """

    def __init__(self, roots: Iterable[nn.Module], tensors: Iterable[Tensor], batches: Any, batch_norm: str, seed: int) -> None:
        self._modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self._batch_norm, self._seed, self._batches = batch_norm, seed, batches
        owned = [tensor for module in self._modules for tensor in _owned(module)]
        devices = {tensor.device for tensor in owned}
        self._cuda = sorted(device.index for device in devices if device.type == "cuda" and device.index is not None)
        self._own = list(loaders.generators(batches))
        # Augmentations may draw from NumPy's, but only if somebody has imported it.
        self._numpy: Any = sys.modules["numpy"].random if "numpy" in sys.modules else None
        randomness = Randomness(devices)
        randomness.record()
        # Each step can be repeated: one that was interrupted is done again from its start.
        self._undo: list[Callable[[], Any]] = [
            randomness.replay,
            partial(random.setstate, random.getstate()),
            *(partial(generator.set_state, generator.get_state()) for generator in self._own),
            *([partial(self._numpy.set_state, self._numpy.get_state())] if self._numpy else []),
            partial(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()),
            # It holds low-precision copies of the weights as they were in the pass, for as long as the caller's autocast lasts.
            torch.clear_autocast_cache,
            *(partial(setattr, module, "training", module.training) for module in self._modules),
            *(partial(setattr, parameter, "grad", parameter.grad) for parameter in self._parameters()),
            *(step for module in self._modules for step in _buffers_again(module)),
            *(_value_again(tensor) for tensor in {id(t): t for t in (*owned, *tensors)}.values() if not overlaps(tensor)),
        ]

    def begin(self) -> None:
        """Modes and seeds for a pass."""
        for module in self._modules:
            # Not eval(): modules override it, and some rewrite their weights in it.
            module.training = self._batch_norm == "train" and _has_statistics(module)
        for parameter in self._parameters():
            parameter.grad = None  # kept by the undo step, out of the reach of a loss that calls backward()
        # In eval mode and without a graph attention would take a fast path, which zeroes padding where the other does not:
        # another function than the one that is differentiated.
        torch.backends.mha.set_fastpath_enabled(False)
        self._seed_generators()
        loaders.start_workers(self._batches)  # which draws, though only the first time
        self._seed_generators()

    def put_back(self) -> None:
        """Everything is bitwise what it was when the snapshot was taken, and where it was.

        It goes on to its end whatever happens on the way, and raises what happened first. Once done it does nothing.
        """
        first: BaseException | None = None
        while self._undo:
            try:
                self._undo[-1]()
                self._undo.pop()
            except KeyboardInterrupt as interrupt:
                first = first or interrupt
            except Exception as error:
                first = first or error
                self._undo.pop()
        if first is not None:
            raise first

    def _parameters(self) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.parameters(recurse=False)

    def _seed_generators(self) -> None:
        seed = self._seed % 2**63  # as much as torch takes
        for generator in (torch.default_generator, *self._own):
            generator.manual_seed(seed)
        for index in self._cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(self._seed)
        if self._numpy is not None:
            self._numpy.seed(self._seed % 2**32)


def _owned(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    found = (*module._parameters.values(), *dict(module._buffers.items()).values())
    return [tensor for tensor in found if tensor is not None and not is_lazy(tensor)]


def _has_statistics(module: nn.Module) -> bool:
    """BatchNorm and its like: any class with buffers called ``running_*``, also if they are None."""
    return any(name.startswith("running_") for name in dict(module._buffers.items()))


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as an expanded tensor's do: torch refuses to write into such a one, whoever asks."""
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True)
    )


def _value_again(tensor: Tensor) -> Callable[[], None]:
    return partial(_write, tensor, tensor.data, _place(tensor), tensor.detach().clone())


def _write(tensor: Tensor, home: Tensor, place: Any, copy: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):  # the only mode in which such a tensor may be written
        home.copy_(copy)
        if _place(tensor) != place:  # a forward gave it other memory by ``tensor.data = ...``
            tensor.data = home


def _place(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided or type(tensor.data) is not Tensor:
        return None  # sparse ones and subclasses have no one address
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _buffers_again(module: nn.Module) -> list[Callable[[], None]]:
    """A forward may put other tensors in the place of buffers, fill one that is None, and register new ones."""
    buffers: Any = module._buffers
    if not isinstance(buffers, dict):  # a scripted module's: it cannot get new ones
        return [partial(buffers.__setitem__, name, buffer) for name, buffer in dict(buffers.items()).items()]
    unsaved = module._non_persistent_buffers_set
    return [partial(_refill, buffers, dict(buffers)), partial(_refill, unsaved, set(unsaved))]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.update(content)
