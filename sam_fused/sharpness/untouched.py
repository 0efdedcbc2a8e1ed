"""What a pass over the data changes, and has to put back: weights, buffers, training flags, random number generators.

Values are put back in place, so that addresses stay (captured graphs, DDP's lists), and through ``.data``, so that a backward
pass whose forward came before the measurement does not mind.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..randomness import Randomness

BATCH_NORM = ("eval", "train")


class Untouched:
    """A snapshot of a model and of the generators: ``begin`` sets up a pass, ``put_back`` undoes it and all that it did.

    To be used as ``snapshot = Untouched(...)``, then ``try: snapshot.begin() ... finally: snapshot.put_back()``: an interrupt
    before the ``try`` finds nothing changed, and one after it is undone. A ``with`` would have a moment in between.

    Args:
        model: all buffers and training flags in it are covered.
        tensors: the weights that the pass will write.
        batches: whose own generators (a DataLoader's, its samplers') are covered too.
        batch_norm: ``"eval"`` or ``"train"``: the mode of modules with running statistics. Everything else is in eval mode,
            dropout included.
        seed: what the default generators are seeded with for the pass, so that every pass shuffles and augments alike.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor], batches: Any, batch_norm: str, seed: int) -> None:
        modules = list(model.modules())
        self._batch_norm, self._seed = batch_norm, seed
        self._flags = [(module, module.training) for module in modules]
        self._buffers = [
            (module, name, buffer)
            for module in modules
            for name, buffer in dict(module._buffers.items()).items()
            if buffer is not None and not is_lazy(buffer)
        ]
        held = [*tensors, *(buffer for _, _, buffer in self._buffers)]
        # One that overlaps itself (an expanded mask) cannot be written by anybody, its module included.
        self._copies = [(tensor, tensor.detach().clone()) for tensor in held if not overlaps(tensor)]
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self._cuda = sorted(device.index for device in devices if device.type == "cuda" and device.index is not None)
        self._randomness = Randomness(devices)
        self._randomness.record()
        self._python = random.getstate()
        # Augmentations may draw from NumPy's, but only if somebody has imported it.
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._own = [(generator, generator.get_state()) for generator in _generators(batches)]

    def begin(self) -> None:
        """Modes and seeds for a pass."""
        for module, _ in self._flags:
            # Not eval(): modules override it, and some rewrite their weights in it.
            module.training = self._batch_norm == "train" and _has_statistics(module)
        torch.default_generator.manual_seed(self._seed)
        for index in self._cuda:
            torch.cuda.default_generators[index].manual_seed(self._seed)
        random.seed(self._seed)
        if self._numpy is not None:
            sys.modules["numpy"].random.seed(self._seed % 2**32)

    def put_back(self) -> None:
        """Everything is bitwise what it was when the snapshot was taken, and where it was."""
        for tensor, copy in self._copies:
            tensor.data.copy_(copy)
        for module, name, buffer in self._buffers:
            if name not in module._buffers or module._buffers[name] is not buffer:
                module._buffers[name] = buffer
        for module, training in self._flags:
            module.training = training
        self._randomness.replay()
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for generator, state in self._own:
            generator.set_state(state)


def _has_statistics(module: nn.Module) -> bool:
    """BatchNorm and its like: torch's, and any class with buffers called ``running_*``."""
    return isinstance(module, _NormBase) or any(name.startswith("running_") for name in dict(module._buffers.items()))


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as an expanded tensor's do: torch refuses to write into such a one."""
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True)
    )


def _generators(batches: Any) -> Iterator[torch.Generator]:
    """Those that a DataLoader and its samplers draw from beside the default ones."""
    sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    yield from dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator))
