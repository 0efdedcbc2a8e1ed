"""Error bars, and claims whose verdict is worked out from the runs, never written down before.

Values of a method are one per seed, in the order of the seeds. Methods of a seed share the start and the batches, so that two
distances can be given: unpaired, which the verdicts go by, and paired by seed, which stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray
BOUND = 2  # standard errors of the difference


class Claim(NamedTuple):
    """One sentence, whether this run bears it out, and by how much."""

    text: str
    holds: bool
    margin: str

    def __str__(self) -> str:
        return f"{'reproduced' if self.holds else 'not reproduced'}: {self.text} ({self.margin})"


def standard_error(values: Values) -> float:
    """Of the mean; nan for a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summary(values: Values, digits: int = 3) -> str:
    """`mean ± standard error`, the mean alone of a single value."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def in_errors(difference: float, error: float) -> float:
    """inf where there is no error, 0 where there is no difference either."""
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def standard_errors_above(higher: Values, lower: Values) -> float:
    """By how many standard errors of the difference the first mean is above the second, as if they shared no seeds.

    What the seeds share can make the paired distance larger or smaller than this: both occur here.
    """
    return in_errors(float(np.mean(higher) - np.mean(lower)), math.hypot(standard_error(higher), standard_error(lower)))


def paired_errors_above(higher: Values, lower: Values) -> float:
    """The same from the differences of each seed."""
    differences = np.subtract(higher, lower)
    return in_errors(float(differences.mean()), standard_error(differences))


def distances(higher: Values, lower: Values) -> str:
    unpaired, paired = standard_errors_above(higher, lower), paired_errors_above(higher, lower)
    return f"by {unpaired:.1f} standard errors, bound {BOUND}; paired by seed {paired:.1f}"


def claim_above(text: str, higher: Values, lower: Values) -> Claim:
    """Is the first mean above the second by more than BOUND standard errors, unpaired?"""
    return Claim(text, standard_errors_above(higher, lower) > BOUND, distances(higher, lower))


class Share(NamedTuple):
    """Of the way from one method's mean to another's."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} ± {100 * self.error:.0f} %"


def share_of_the_way(start: Values, end: Values, own: Values) -> Share:
    """Which share of the distance from the mean of `start` to the mean of `end` the mean of `own` has come.

    Its standard error is the jackknife's: every seed is left out once, of all three at a time, as the runs of a seed belong
    together. The share is a ratio of means that share noise, which a sum of squares of their errors would miss.
    """
    runs = np.array([start, end, own])  # [method, seed]

    def share(means: np.ndarray) -> np.ndarray:
        return (means[2] - means[0]) / (means[1] - means[0])

    seeds = runs.shape[1]
    without_one = share((runs.sum(axis=1, keepdims=True) - runs) / (seeds - 1)) if seeds > 1 else np.array([math.nan])
    error = math.sqrt((seeds - 1) * without_one.var())
    return Share(float(share(runs.mean(axis=1))), error)
