"""Means, their errors, and paired differences between methods."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over runs.

    Attributes:
        mean: the mean.
        error: its standard error; None of a single run.
        count: runs.
    """

    mean: float
    error: float | None
    count: int


class Interval(NamedTuple):
    """A mean difference with its confidence interval by Student's t.

    Attributes:
        mean: the mean.
        low: lower end; None of a single pair.
        high: upper end; None of a single pair.
        count: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value; a value that is not finite spoils both."""
    count = len(values)
    if count == 1 or not all(map(math.isfinite, values)):
        return Estimate(sum(values) / count, None, count)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(count), count)


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of at least one difference, with its 95 % interval."""
    mean, error, count = estimate(differences)
    if error is None:
        return Interval(mean, None, None, count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Interval(mean, mean - reach, mean + reach, count)
