"""Where tests put their tensors: on the default device, which ``--device`` chooses."""

import torch


def default() -> torch.device:
    """The device of tensors that name none, with its index, as errors and tensors name it."""
    return torch.get_default_device()


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the default device."""
    return tensor.to(default())


def randn(size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers on the default device, drawn on the CPU: a generator belongs to one device, another's numbers differ."""
    return here(torch.randn(size, generator=generator, dtype=dtype, device="cpu"))
