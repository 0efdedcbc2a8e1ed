"""Tensors that ``perturb`` has moved: their backups, what was moved on top of them, and who has written into them since.

A ``Moved`` lives until its tensors are put back, or until it is clear that somebody has trained them since; the handle that the
caller has on it may be lost at any time.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .compiled import not_traced
from .ops.fingerprint import PLAIN_TYPES
from .ops.prepared import TensorSet

_serials = count()

# The oldest first. Strong: backups live here until they are put back, whatever becomes of the handles.
_perturbed: dict[int, Moved] = {}


class Moved:
    """Tensors that one call moved, with their backups, and the later calls that moved any of their memory again."""

    def __init__(self, sets: list[TensorSet]) -> None:
        self.is_perturbed = True
        self._sets = sets
        self._tensors = [tensor for members in sets for tensor in members.params]
        devices = {tensor.device for tensor in self._tensors if tensor.is_cuda}
        self._streams = [torch.cuda.current_stream(device) for device in devices]
        self._versions: dict[int, int] = {}
        self._was_stepped = False
        self._above: list[Moved] = []
        self._unwritten_below: list[Moved] = []
        self._handle_is_lost = False
        self._serial = next(_serials)
        for other in list(_perturbed.values()):
            if _overlap(other._tensors, self._tensors):
                other._above.append(self)
                if not other._was_written():
                    self._unwritten_below.append(other)
        _perturbed[self._serial] = self
        _watch_optimizers()

    def note_versions(self) -> None:
        """The tensors are what this perturbation, or the end of one above it, has made of them."""
        self._versions.update((id(tensor), _version_of(tensor)) for tensor in self._tensors)

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer has stepped these parameters, by ``id``."""
        self._was_stepped |= any(id(tensor) in stepped for tensor in self._tensors)

    def _was_written(self) -> bool:
        return self._was_stepped or any(self._versions.get(id(tensor)) != _version_of(tensor) for tensor in self._tensors)

    @not_traced
    def put_back_in_order(self) -> None:
        if self.is_perturbed and self._above:
            raise RuntimeError(
                f"restore(): expected later perturbations of the same tensors to be restored before this one, got "
                f"{len(self._above)} that still hold: restore in reverse order, or nest with blocks."
            )
        self._put_back()

    @not_traced
    def unwind(self) -> None:
        """Restores this and, before it, whatever was perturbed on top of it: an error leaves nobody to do it in order."""
        for later in self._above[:]:
            later.unwind()
        self._put_back()

    def let_go(self) -> None:
        """The handle is gone: restores now or, if later perturbations hold, after the last of them."""
        self._handle_is_lost = True
        if not self._sets:
            self._forget()  # nothing had moved
        elif self._above:
            self._warn("they are restored when the later perturbations of them are", stacklevel=4)
        elif self._was_written():
            self._leave(stacklevel=5)
        else:
            self._put_back()
            self._warn("they are restored", stacklevel=4)

    def _leave(self, stacklevel: int) -> None:
        self._forget()
        self._warn("they have been written since, and stay as they are, perturbed", stacklevel)

    def _warn(self, outcome: str, stacklevel: int) -> None:
        warnings.warn(
            "perturb(): expected its result to be kept until restore(), or to be entered by with, got it dropped while the "
            f"tensors were perturbed: {outcome}.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )

    def _put_back(self) -> None:
        if not self.is_perturbed:
            return
        refuse_capture(self._tensors, "restore()")
        others = [(made, now) for made in self._streams if (now := torch.cuda.current_stream(made.device)) != made]
        for made, now in others:
            now.wait_stream(made)
        for members in self._sets:
            if members.is_perturbed:
                try:
                    members.restore_()
                except Exception:  # changed while perturbed, say by model.half()
                    members.restore_converted_()
        for made, now in others:
            made.wait_stream(now)  # the backups' memory is given out again in the order of the stream they were made on
        mine = set(map(_storage_of, self._tensors))  # views share a storage, and its version counter
        for below in self._unwritten_below:  # has its tensors back as they were
            below._versions.update((id(t), _version_of(t)) for t in below._tensors if _storage_of(t) in mine)
        self._forget()

    def _forget(self) -> None:
        """There is nothing to put back any more."""
        _perturbed.pop(self._serial, None)
        self._sets, self._tensors, self._unwritten_below = [], [], []
        self.is_perturbed = False
        for below in list(_perturbed.values()):
            if self in below._above:
                below._above.remove(self)
                if not below._handle_is_lost or below._above:
                    continue
                if below._was_written():
                    below._leave(stacklevel=4)
                else:
                    below._put_back()
        _watch_optimizers()


# While anything is perturbed: torch's fused optimizers leave no trace in version counters.
_watching: list[RemovableHandle] = []


def _note_step(optimizer: Optimizer, *_: object) -> None:
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for moved in _perturbed.values():
        moved.note_step(stepped)


def _watch_optimizers() -> None:
    if _perturbed and not _watching:
        _watching.append(register_optimizer_step_post_hook(_note_step))
    elif _watching and not _perturbed:
        _watching.pop().remove()


def _storage_of(tensor: Tensor) -> object:
    return tensor.untyped_storage().data_ptr() if type(tensor) in PLAIN_TYPES else id(tensor)


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # made in inference mode it has none


def _overlap(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether a tensor is in both lists, or memory under both. Gaps in a tensor count as its own: they may interleave."""
    if not set(map(id, first)).isdisjoint(map(id, second)):
        return True
    spans = [(*span, owner) for owner, tensors in enumerate((first, second)) for span in map(_span, tensors) if span]
    reached: dict[tuple[str, int], int] = {}
    for device, start, end, owner in sorted(spans):
        if start < reached.get((device, 1 - owner), 0):
            return True
        reached[device, owner] = max(reached.get((device, owner), 0), end)
    return False


def _span(tensor: Tensor) -> tuple[str, int, int] | None:
    """The device and the first and last address of the tensor's memory, if it has any that is its alone to describe."""
    if type(tensor) not in PLAIN_TYPES or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def refuse_capture(tensors: list[Tensor], move: str) -> None:
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{move}: expected to run eagerly, got a CUDA graph's capture, whose replays would find the backups gone: capture "
            "steps of sam_fused.SAM, which keeps its own."
        )
