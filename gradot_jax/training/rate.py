"""The learning rate as a data owner chooses it: by loss on development data, and bracketed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gradot_jax.errors import InputError

MOST_TRIALS = 12


class RateSearch(NamedTuple):
    """Rates that were tried, and the best of them.

    Attributes:
        rate: of least loss; of equal ones the lowest.
        losses: by rate; inf of a run that diverged.
        bracketed: whether a lower and a higher rate were tried and were no better.
    """

    rate: float
    losses: Mapping[float, float]
    bracketed: bool


def check_rates(rates: Sequence[float]) -> None:
    """Raises InputError unless the rates are positive, finite, and each given once."""
    if not rates or len(set(rates)) < len(rates):
        raise InputError(f"rates: expected some, each once, got {list(rates)}")
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"rates must be positive and finite, got {list(rates)}")


def search_rate(
    loss_of: Callable[[float], float], rates: Sequence[float], *, most: int = MOST_TRIALS
) -> RateSearch:
    """Tries rates, then as many beyond either end as it takes to have the best between two.

    Each further rate continues the geometric series of the two outermost, so `(1, 2)` goes on with
    0.5, 0.25, ... or with 4, 8, ... A single rate is not tried: there is nothing to choose.

    Example:
        >>> search_rate(lambda rate: (rate - 9) ** 2, (1.0, 2.0)).rate
        8.0

    Args:
        loss_of: development loss at a rate; inf where training diverges.
        rates: where to begin.
        most: trials, after which the best is taken as it is.

    Raises:
        InputError: for rates that are out of range.
    """
    check_rates(rates)
    if len(rates) == 1:
        return RateSearch(rates[0], {}, bracketed=False)
    losses = {rate: loss_of(rate) for rate in rates}
    while True:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        tried = sorted(losses)
        if tried[0] < best < tried[-1]:
            return RateSearch(best, losses, bracketed=True)
        if len(losses) >= most:
            return RateSearch(best, losses, bracketed=False)
        edge, inner = (tried[0], tried[1]) if best == tried[0] else (tried[-1], tried[-2])
        # Through a decimal, so that the series of a resumed search is the same.
        further = float(f"{edge * edge / inner:.6g}")
        losses[further] = loss_of(further)
