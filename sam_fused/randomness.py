"""The same random numbers twice, so that both passes of a step draw the same dropout masks.

With masks of its own the second pass sees another network than the one whose steepest direction was taken. What is replayed
are torch's default generators, which dropout and its like draw from; a generator that a module was given, Python's and NumPy's
are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .compiled import not_traced


class Randomness:
    """The state of torch's default generators before a first pass, to be set back before the second. Waits for no device.

    A second pass that draws what the first drew leaves the generators where the first left them: the run goes on as if there
    had been one pass.

    Args:
        devices: where the passes draw random numbers. The CPU's generator is always included; of the devices CUDA's are.
    """

    def __init__(self, devices: Iterable[torch.device | str]) -> None:
        self._devices = [device for device in dict.fromkeys(map(torch.device, devices)) if device.type == "cuda"]
        self._cpu: Tensor | None = None
        self._cuda: dict[torch.device, Tensor] = {}

    @property
    def is_recorded(self) -> bool:
        return self._cpu is not None

    @not_traced
    def record(self) -> None:
        """Keeps the generators' present state, in place of what was recorded before.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._refuse_capture("record()")
        cuda = {_numbered(device): torch.cuda.get_rng_state(device) for device in self._devices}
        self._cpu, self._cuda = torch.get_rng_state(), cuda

    @not_traced
    def replay(self) -> None:
        """Sets the generators back to the recorded state; as often as wanted.

        Raises:
            RuntimeError: nothing was recorded, or a CUDA graph is being captured.
        """
        self._refuse_capture("replay()")
        if self._cpu is None:
            raise RuntimeError(
                "replay(): expected random numbers recorded before the first pass, got none: call record() before its forward."
            )
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)

    def _refuse_capture(self, move: str) -> None:
        if self._devices and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{move}: expected a pass that runs eagerly, got a CUDA graph's capture, which would freeze the generators' "
                "present state: capture without the same random numbers in both passes."
            )


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: ``cuda`` is whichever is current, and may be another one when the state is set back."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())
