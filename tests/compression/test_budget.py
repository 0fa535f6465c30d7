import itertools

import numpy as np
import pytest

from gradot_jax.compression.budget import (
    Pool,
    channel_pool,
    global_counts,
    rank_pool,
    uniform_counts,
)

BUDGETS = [0.01, 0.1, 0.25, 0.5, 0.6, 0.9, 0.999, 1.0]


def descending(pool, rng):
    return np.sort(rng.uniform(size=pool.size))[::-1]


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 8), (128, 128), (64, 256), (2, 2)])
def test_rank_cap_is_the_first_rank_that_saves_nothing(d_in, d_out):
    cap = rank_pool(d_in, d_out).cap
    assert cap * (d_in + d_out) >= d_in * d_out > (cap - 1) * (d_in + d_out)


@pytest.mark.parametrize(("size", "floor"), [(1, 1), (20, 1), (21, 2), (100, 5), (128, 7)])
def test_floor_is_five_percent_rounded_up(size, floor):
    assert rank_pool(size, size).floor == channel_pool(size).floor == floor


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("pool", [rank_pool, channel_pool])
def test_uniform_count_is_the_largest_admissible_one_within_the_budget(budget, multiple, pool):
    pool = pool(48, 48, multiple) if pool is rank_pool else pool(48, multiple)
    admissible = [n for n in range(1, pool.cap) if n % multiple == 0 and n >= pool.floor]
    affordable = [n for n in [*admissible, pool.cap] if n <= budget * pool.cap]
    expected = max(affordable, default=min([*admissible, pool.cap]))
    assert uniform_counts([pool, pool], budget) == [expected] * 2


def test_decimal_budgets_do_not_lose_a_candidate_to_rounding():
    # 0.29 * 100 and 0.7 * 10 are just below an integer in floating point.
    assert uniform_counts([channel_pool(100), channel_pool(10)], 0.29)[0] == 29
    assert uniform_counts([channel_pool(10)], 0.7) == [7]


def test_multiple_larger_than_the_matrix_keeps_the_original():
    assert uniform_counts([rank_pool(8, 8, 128), channel_pool(12, 128)], 0.3) == [4, 12]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("multiple", [1, 3])
def test_global_counts_are_admissible_and_within_the_budget(budget, multiple):
    rng = np.random.default_rng(0)
    pools = [rank_pool(40, 40, multiple)] * 3 + [rank_pool(26, 26, multiple)]
    counts = global_counts(pools, budget, [descending(pool, rng) for pool in pools])
    floors = [pool.round_down(0) for pool in pools]
    for pool, count, floor in zip(pools, counts, floors, strict=True):
        assert floor <= count <= pool.cap
        assert count == pool.cap or count % multiple == 0
    total = sum(pool.cap for pool in pools)
    assert sum(counts) <= max(budget * total, sum(floors))
    if budget == 1:
        assert counts == [pool.cap for pool in pools]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0.4, 0.5, 0.8])
def test_global_counts_keep_the_greatest_total_score(seed, budget):
    rng = np.random.default_rng(seed)
    pools = [Pool(5, 4, 1, 1), Pool(6, 5, 2, 1), Pool(3, 3, 1, 1)]
    scores = [descending(pool, rng) for pool in pools]
    limit = int(budget * 12)

    def kept(counts):
        return sum(row[:count].sum() for row, count in zip(scores, counts, strict=True))

    choices = itertools.product(*(range(pool.floor, pool.cap + 1) for pool in pools))
    best = max((c for c in choices if sum(c) <= limit), key=kept)
    assert global_counts(pools, budget, scores) == list(best)


@pytest.mark.parametrize("budget", BUDGETS)
def test_global_counts_of_equal_layers_are_uniform(budget):
    pools = [channel_pool(40)] * 4
    scores = [np.linspace(1, 0, 40)] * 4
    counts = global_counts(pools, budget, scores)
    assert max(counts) - min(counts) <= 1
    assert min(counts) == uniform_counts(pools, budget)[0]


def test_a_layer_that_scores_higher_everywhere_is_filled_first():
    pools = [channel_pool(20)] * 2
    low, high = np.linspace(1, 0, 20), np.linspace(3, 2, 20)
    assert global_counts(pools, 0.5, [low, high]) == [1, 19]
