"""From a budget to numbers of components and channels, per layer or over all layers."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

FLOOR = 0.05
"""Share of the full rank that is always kept, by singular value (GradOT)."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """The candidates of one matrix or MLP, as the budget sees them.

    Attributes:
        size: number of candidates K.
        cap: candidates whose parameters equal those of the uncompressed original; keeping that
            many means keeping the original. Below `size` for a low-rank matrix.
        floor: number always kept.
        multiple: counts are multiples of it, or `cap`.
    """

    size: int
    cap: int
    floor: int
    multiple: int

    def round_down(self, count: float) -> int:
        """The largest admissible count that is at most `count` and at least the floor."""
        if count >= self.cap:
            return self.cap
        lowest = max(math.ceil(max(self.floor, 1) / self.multiple), 1) * self.multiple
        return min(max(int(count) // self.multiple * self.multiple, lowest), self.cap)


def rank_pool(d_in: int, d_out: int, multiple: int = 1) -> Pool:
    """Components of a matrix: two factors of rank R cost `R (D_in + D_out)` parameters."""
    size = min(d_in, d_out)
    cap = math.ceil(d_in * d_out / (d_in + d_out))
    return Pool(size, cap, math.ceil(FLOOR * size), multiple)


def channel_pool(num_channels: int, multiple: int = 1) -> Pool:
    """Hidden channels of an MLP: each costs the same, the original has them all."""
    return Pool(num_channels, num_channels, math.ceil(FLOOR * num_channels), multiple)


def uniform_counts(pools: Sequence[Pool], budget: float) -> list[int]:
    """The same share of every pool, rounded down to what is admissible.

    Args:
        pools: one per matrix or MLP.
        budget: share of the parameters to keep; biases and norms, always kept, do not count.

    Returns:
        Candidates to keep per pool; `cap` means the original.
    """
    return [pool.round_down(budget * pool.cap + 1e-9) for pool in pools]


def global_counts(
    pools: Sequence[Pool], budget: float, ranked_scores: Sequence[np.ndarray]
) -> list[int]:
    """One threshold over all pools: the best-scoring candidates anywhere, above each floor.

    Args:
        pools: one per matrix or MLP; candidates of all cost the same number of parameters.
        budget: share of the parameters of all pools together.
        ranked_scores: per pool, scores in the order in which candidates would be kept `[K]`.

    Returns:
        Candidates to keep per pool; `cap` means the original.
    """
    counts = [pool.round_down(0) for pool in pools]
    left = int(budget * sum(pool.cap for pool in pools) + 1e-9) - sum(counts)
    chunks = []
    for index, (pool, start) in enumerate(zip(pools, counts, strict=True)):
        for begin in range(start, pool.cap, pool.multiple):
            end = min(begin + pool.multiple, pool.cap)
            chunks.append((-float(np.mean(ranked_scores[index][begin:end])), index, begin, end))
    closed: set[int] = set()
    for _, index, begin, end in sorted(chunks):
        if index in closed or begin != counts[index] or end - begin > left:
            closed.add(index)
            continue
        counts[index] = end
        left -= end - begin
    return counts
