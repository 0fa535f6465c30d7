"""From a budget to numbers of components and channels, per layer or over all layers.

Budgets, costs and thresholds count parameters of kernels: a component of a narrow map is cheaper
than one of a wide map. Biases and norms, which are always kept, do not count.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

FLOOR = 0.05
"""Share of the full rank, and of the channels, that is always kept (GradOT)."""

_ROUNDING = 1e-9
"""Share by which a budget may be exceeded, so that 0.3 of 10 candidates is 3."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """The candidates of one kernel or MLP, as the budget sees them.

    Attributes:
        size: number of candidates K.
        cost: parameters of one candidate.
        whole: parameters of the uncompressed original.
        floor: number always kept.
        multiple: counts are multiples of it, or `cap`.
    """

    size: int
    cost: int
    whole: int
    floor: int
    multiple: int

    @property
    def cap(self) -> int:
        """Candidates from which on the original is kept instead: it has no more parameters."""
        return min(math.ceil(self.whole / self.cost), self.size)

    @property
    def least(self) -> int:
        """The smallest admissible count."""
        multiples = max(math.ceil(self.floor / self.multiple), 1)
        return min(multiples * self.multiple, self.cap)

    def parameters(self, count: int) -> int:
        """Parameters of `count` candidates."""
        return self.whole if count >= self.cap else count * self.cost

    def within(self, parameters: float) -> int:
        """The largest admissible count of at most so many parameters; 0 where there is none."""
        if parameters >= self.whole:
            return self.cap
        count = min(int(parameters / self.cost), self.cap - 1) // self.multiple * self.multiple
        return count if count >= self.least else 0


def rank_pool(d_in: int, d_out: int, multiple: int = 1) -> Pool:
    """Components of a matrix: two factors of rank R cost `R (D_in + D_out)` parameters."""
    size = min(d_in, d_out)
    return Pool(size, d_in + d_out, d_in * d_out, math.ceil(FLOOR * size), multiple)


def channel_pool(num_channels: int, cost: int, multiple: int = 1) -> Pool:
    """Hidden channels of an MLP; one costs its columns and rows in all maps, `cost` parameters."""
    floor = math.ceil(FLOOR * num_channels)
    return Pool(num_channels, cost, num_channels * cost, floor, multiple)


def uniform_counts(pools: Sequence[Pool], budget: float, what: str = "") -> list[int]:
    """The same share of every pool, rounded down to what is admissible.

    Args:
        pools: one per kernel or MLP.
        budget: share of the parameters to keep.
        what: the pools are of, for messages.

    Returns:
        Candidates to keep per pool; `cap` means the original.

    Raises:
        InputError: when even the least of a pool is more than its share.
    """
    counts = [pool.within((budget + _ROUNDING) * pool.whole) for pool in pools]
    if not all(counts):
        raise InputError(_too_small(budget, what, pools, least_budget(pools, each=True)))
    return counts


def global_counts(
    pools: Sequence[Pool], budget: float, ranked_scores: "Sequence[np.ndarray]", what: str = ""
) -> list[int]:
    """One threshold over all pools: the best scores per parameter anywhere, above each floor.

    Args:
        pools: one per kernel or MLP.
        budget: share of the parameters of all pools together.
        ranked_scores: per pool, scores in the order in which candidates would be kept `[K]`.
        what: the pools are of, for messages.

    Returns:
        Candidates to keep per pool; `cap` means the original.

    Raises:
        InputError: when the least of all pools together is more than the budget.
    """
    check_least(pools, budget, what)
    counts = [pool.least for pool in pools]
    left = (budget + _ROUNDING) * sum(pool.whole for pool in pools)
    left -= sum(map(Pool.parameters, pools, counts))
    cheapest = min(pool.cost for pool in pools)
    chunks = []
    for index, (pool, start) in enumerate(zip(pools, counts, strict=True)):
        score = math.inf
        for begin in range(start, pool.cap, pool.multiple):
            end = min(begin + pool.multiple, pool.cap)
            mean = float(ranked_scores[index][begin:end].mean()) / (pool.cost / cheapest)
            # Means of equal scores may rise by rounding; none goes before what it follows.
            score = min(score, mean)
            chunks.append((-score, index, begin, end))
    closed: set[int] = set()
    for _, index, begin, end in sorted(chunks):
        price = pools[index].parameters(end) - pools[index].parameters(begin)
        if index in closed or begin != counts[index] or price > left:
            closed.add(index)
            continue
        counts[index] = end
        left -= price
    return counts


def check_least(pools: Sequence[Pool], budget: float, what: str = "") -> None:
    """Raises InputError where the least of all pools together is more than the budget."""
    least = least_budget(pools)
    if least > budget + _ROUNDING:
        raise InputError(_too_small(budget, what, pools, least))


def least_budget(pools: Sequence[Pool], *, each: bool = False) -> float:
    """The share that the least of all pools together takes, or of each, where all keep as much."""
    if each:
        return max(pool.parameters(pool.least) / pool.whole for pool in pools)
    return sum(pool.parameters(pool.least) for pool in pools) / sum(pool.whole for pool in pools)


def _too_small(budget: float, what: str, pools: Sequence[Pool], least: float) -> str:
    multiples = sorted({pool.multiple for pool in pools})
    return (
        f"budget {budget:g}{what and f' of the {what}'}: with 5 % of the candidates always kept, "
        f"in multiples of {', '.join(map(str, multiples))}, the least is {rounded_up(least):g}"
    )


def whole_layers(num_layers: int, budget: float) -> int:
    """Whole layers of a middle of `num_layers` that a budget holds, rounded down.

    Raises:
        InputError: when it holds none.
    """
    count = int((budget + _ROUNDING) * num_layers)
    if not count:
        raise InputError(
            f"budget {budget:g}: less than one of {num_layers} layers, the least is "
            f"{rounded_up(1 / num_layers):g}"
        )
    return count


def check_budget(name: str, budget: float) -> None:
    """Raises InputError unless a budget lies in (0, 1]."""
    if not is_number(budget) or not 0 < budget <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {budget!r}")


def is_number(value: Any) -> bool:
    """Whether it is a number, of Python or NumPy, but not a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def rounded_up(share: float) -> float:
    """Rounded up to four digits, so that what is said to be enough is."""
    return math.ceil(1e4 * share) / 1e4
