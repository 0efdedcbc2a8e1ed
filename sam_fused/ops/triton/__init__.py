"""The Triton backend: the same operations on CUDA devices without nvcc. Triton 3.6 to 3.9.

Importing this imports no Triton; the first launch does. ``reason_not`` says whether it can serve a device, ``DOOR`` takes rows
of addresses, ``KERNELS`` lists of fitted tensors.
"""

from .availability import reason_not
from .door import DOOR
from .lists import KERNELS

__all__ = ["DOOR", "KERNELS", "reason_not"]
