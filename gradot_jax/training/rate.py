"""The learning rate as a data owner chooses it: by loss on development data, and bracketed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gradot_jax.errors import InputError

MOST_TRIALS = 12


class RateSearch(NamedTuple):
    """Rates that were tried, and the best of them.

    Attributes:
        rate: of least loss; of equal ones the lowest.
        losses: by rate, in the order of the trials; inf of a run that diverged.
        bracketed: whether a lower and a higher rate were tried and were no better.
        best: what the run at `rate` left; None where all diverged, or none was tried.
    """

    rate: float
    losses: Mapping[float, float]
    bracketed: bool
    best: Any


def check_rates(rates: Sequence[float]) -> None:
    """Raises InputError unless the rates are positive, finite, and each given once."""
    if not rates or len(set(rates)) < len(rates):
        raise InputError(f"rates: expected some, each once, got {list(rates)}")
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"rates must be positive and finite, got {list(rates)}")


def search_rate(
    run: Callable[[float], tuple[float, Any]], rates: Sequence[float], *, most: int = MOST_TRIALS
) -> RateSearch:
    """Tries rates, then as many beyond either end as it takes to have the best between two.

    Each further rate continues the geometric series of the two outermost, so `(1, 2)` goes on with
    0.5, 0.25, ... or with 4, 8, ... A single rate is not tried: there is nothing to choose.

    Example:
        >>> search_rate(lambda rate: ((rate - 9) ** 2, None), (1.0, 2.0)).rate
        8.0

    Args:
        run: from a rate to its development loss, inf where training diverges, and what is to be
            kept of the run if it is the best.
        rates: where to begin.
        most: trials, after which the best is taken as it is.

    Raises:
        InputError: for rates that are out of range.
    """
    check_rates(rates)
    if len(rates) == 1:
        return RateSearch(rates[0], {}, bracketed=False, best=None)
    losses: dict[float, float] = {}
    least, kept, waiting = (math.inf, math.inf), None, list(rates)
    while True:
        for rate in waiting:
            loss, own = run(rate)
            losses[rate] = loss = math.inf if math.isnan(loss) else loss
            if (loss, rate) < least:
                least, kept = (loss, rate), own
        tried = sorted(losses)
        # Rates that tie left the weights as they were: whatever trains is lower.
        best = least[1]
        bracketed = tried[0] < best < tried[-1]
        edge, inner = (tried[0], tried[1]) if best == tried[0] else (tried[-1], tried[-2])
        # Through a decimal, so that the series of a resumed search is the same.
        further = float(f"{edge * (edge / inner):.6g}")
        new = 0 < further < math.inf and further not in losses
        if bracketed or len(losses) >= most or not new:
            return RateSearch(best, losses, bracketed, kept)
        waiting = [further]
