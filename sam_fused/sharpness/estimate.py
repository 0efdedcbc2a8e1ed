"""A mean over random samples, and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """The mean of independent samples with its standard error, ``sqrt(sum (s - mean)^2 / (n - 1) / n)``.

    Attributes:
        mean: of the samples.
        standard_error: one standard deviation of that mean, estimated from the samples.
        samples: how many there were, n.
    """

    mean: float
    standard_error: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """From at least two samples."""
        count = len(samples)
        mean = math.fsum(samples) / count
        variance = math.fsum((sample - mean) ** 2 for sample in samples) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g} (n = {self.samples})"
