import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

from gradot_jax.compression.budget import (
    Pool,
    channel_pool,
    check_budget,
    global_counts,
    rank_pool,
    uniform_counts,
    whole_layers,
)
from gradot_jax.errors import InputError

BUDGETS = [0.01, 0.1, 0.25, 0.5, 0.6, 0.9, 0.999, 1.0]
NARROW = [(24, 24), (24, 6), (24, 6), (24, 24), (24, 80), (80, 24)]
"""Sizes of kernels whose components differ in cost: a key and value narrower than the query."""


def narrow_pools(multiple=1):
    return [rank_pool(*size, multiple) for size in NARROW]


def descending(pool, rng):
    return np.sort(rng.uniform(size=pool.size))[::-1]


def parameters(pools, counts):
    return sum(pool.parameters(count) for pool, count in zip(pools, counts, strict=True))


def share(budget, pools):
    """Parameters that a budget of a decimal figure holds, exactly."""
    return Fraction(str(budget)) * sum(pool.whole for pool in pools)


def least_said(refusal) -> float:
    return float(re.search(r"the least is (\S+)$", str(refusal.value))[1])


@pytest.mark.parametrize(
    ("d_in", "d_out"), [(8, 8), (128, 128), (64, 256), (2, 2), (9, 9), (8, 12), (1, 5), (1, 1)]
)
def test_rank_cap_is_the_first_rank_that_saves_nothing(d_in, d_out):
    pool = rank_pool(d_in, d_out)
    assert pool.cap * (d_in + d_out) >= d_in * d_out > (pool.cap - 1) * (d_in + d_out)
    assert pool.cap <= pool.size == min(d_in, d_out)
    assert pool.parameters(pool.cap) == pool.whole == d_in * d_out


@pytest.mark.parametrize(("size", "floor"), [(1, 1), (20, 1), (21, 2), (100, 5), (128, 7)])
def test_floor_is_five_percent_rounded_up(size, floor):
    assert rank_pool(size, size).floor == channel_pool(size, 3).floor == floor


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("size", [(48, 48), (9, 9), (8, 12), (24, 80), "channels"])
def test_uniform_count_is_the_largest_admissible_one_within_the_budget(budget, multiple, size):
    pool = channel_pool(48, 5, multiple) if size == "channels" else rank_pool(*size, multiple)
    admissible = [n for n in range(1, pool.cap) if n % multiple == 0 and n >= pool.floor]
    within = [n for n in [*admissible, pool.cap] if pool.parameters(n) <= share(budget, [pool])]
    if within:
        assert uniform_counts([pool, pool], budget) == [max(within)] * 2
    else:
        with pytest.raises(InputError, match="the least is"):
            uniform_counts([pool, pool], budget)


@pytest.mark.parametrize(
    ("size", "budget", "count"),
    [
        ((9, 9), 0.888, 3),
        ((9, 9), 0.889, 4),
        ((9, 9), 0.9999, 4),
        ((9, 9), 1.0, 5),
        ((8, 12), 0.833, 3),
        ((8, 12), 0.834, 4),
        ((8, 12), 0.9999, 4),
        ((8, 12), 1.0, 5),
    ],
)
def test_a_rank_between_two_counts_is_rounded_down_and_the_original_costs_itself(
    size, budget, count
):
    # Two factors break even at ranks 4.5 and 4.8: the fifth component is the original.
    pool = rank_pool(*size)
    assert uniform_counts([pool], budget) == [count]
    assert global_counts([pool], budget, [np.arange(pool.size)[::-1]]) == [count]


def test_decimal_budgets_do_not_lose_a_candidate_to_rounding():
    # 0.29 * 100 and 0.7 * 10 are just below an integer in floating point.
    assert uniform_counts([channel_pool(100, 1), channel_pool(10, 1)], 0.29)[0] == 29
    assert uniform_counts([channel_pool(10, 1)], 0.7) == [7]


def test_multiple_larger_than_the_matrix_keeps_the_original_or_nothing():
    pools = [rank_pool(8, 8, 128), channel_pool(12, 3, 128)]
    assert uniform_counts(pools, 1) == global_counts(pools, 1, [np.ones(8), np.ones(12)]) == [4, 12]
    for allocate in (uniform_counts, lambda *a: global_counts(*a, [np.ones(8), np.ones(12)])):
        with pytest.raises(InputError, match=r"in multiples of 128, the least is 1$"):
            allocate(pools, 0.999)


@pytest.mark.parametrize("budget", BUDGETS[1:])
@pytest.mark.parametrize("multiple", [1, 3])
def test_global_counts_are_admissible_and_within_the_budget(budget, multiple):
    rng = np.random.default_rng(0)
    pools = [rank_pool(40, 40, multiple)] * 3 + [rank_pool(26, 26, multiple)]
    scores = [descending(pool, rng) for pool in pools]
    if parameters(pools, [pool.least for pool in pools]) > share(budget, pools):
        with pytest.raises(InputError, match="the least is"):
            global_counts(pools, budget, scores)
        return
    counts = global_counts(pools, budget, scores)
    for pool, count in zip(pools, counts, strict=True):
        assert max(pool.floor, 1) <= count <= pool.cap
        assert count == pool.cap or count % multiple == 0
    assert parameters(pools, counts) <= share(budget, pools)
    if budget == 1:
        assert counts == [pool.cap for pool in pools]


@pytest.mark.parametrize("multiple", [1, 2, 5])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_pools_of_unequal_cost_never_exceed_the_budget_in_parameters(multiple, allocation):
    rng = np.random.default_rng(multiple)
    pools, allocated = narrow_pools(multiple), 0
    scores = [descending(pool, rng) for pool in pools]
    for budget in np.round(np.linspace(0.01, 1, 100), 2):
        try:
            if allocation == "uniform":
                counts = uniform_counts(pools, budget)
            else:
                counts = global_counts(pools, budget, scores)
        except InputError:
            continue
        allocated += 1
        assert parameters(pools, counts) <= share(budget, pools)
        for pool, count in zip(pools, counts, strict=True):
            assert pool.least <= count <= pool.cap
            if allocation == "uniform":
                assert pool.parameters(count) <= share(budget, [pool])
    # At budget 1 at the least; what is refused is checked below.
    assert allocated and parameters(pools, counts) == sum(pool.whole for pool in pools)


def greedy(pools, budget, scores):
    """Buys, again and again, what has the highest score per parameter of all that comes next.

    A pool whose next candidates cost more than what is left is done.
    """
    counts = [pool.least for pool in pools]
    left = share(budget, pools) - parameters(pools, counts)
    open_pools = set(range(len(pools)))

    def following(index):
        return min(counts[index] + pools[index].multiple, pools[index].cap)

    def worth(index):
        return scores[index][counts[index] : following(index)].mean() / pools[index].cost

    while open_pools := {i for i in open_pools if counts[i] < pools[i].cap}:
        best = max(open_pools, key=worth)
        price = pools[best].parameters(following(best)) - pools[best].parameters(counts[best])
        if price > left:
            open_pools.remove(best)
            continue
        counts[best] = following(best)
        left -= price
    return counts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.93])
def test_global_counts_are_the_greedy_choice_by_score_per_parameter(seed, multiple, budget):
    rng = np.random.default_rng(seed)
    pools = narrow_pools(multiple)
    scores = [descending(pool, rng) * rng.uniform(0.5, 2) for pool in pools]
    assert global_counts(pools, budget, scores) == greedy(pools, budget, scores)


def test_equal_scores_go_to_the_cheaper_candidates_first():
    pools = [rank_pool(12, 12), rank_pool(12, 4)]
    budget = (parameters(pools, [1, 1]) + 2 * 16) / (144 + 48)
    assert global_counts(pools, budget, [np.ones(12), np.ones(4)]) == [1, 3]


def test_equal_scores_fill_the_budget_whatever_their_mean_rounds_to():
    # The mean of three times 0.7 is less than that of two.
    pools = [channel_pool(20, 1, 3)] * 2
    assert np.mean([0.7] * 3) < np.mean([0.7] * 2)
    assert global_counts(pools, 0.9, [np.full(20, 0.7)] * 2) == [20, 15]


def test_the_floor_is_charged_at_its_cost():
    pools = narrow_pools()
    floors = [pool.floor for pool in pools]
    assert floors == [2, 1, 1, 2, 2, 2]
    total, charged = sum(pool.whole for pool in pools), parameters(pools, floors)
    assert charged == 2 * 48 + 2 * 30 + 2 * 48 + 2 * (2 * 104)
    # Scores that prefer the narrow kernels, whose next component costs 30.
    scores = [np.full(pool.size, 9.0 if pool.cost == 30 else 1.0) for pool in pools]
    assert global_counts(pools, charged / total, scores) == floors
    assert global_counts(pools, (charged + 29) / total, scores) == floors
    assert global_counts(pools, (charged + 30) / total, scores) == [2, 2, 1, 2, 2, 2]
    with pytest.raises(InputError, match="the least is"):
        global_counts(pools, (charged - 1) / total, scores)


@pytest.mark.parametrize("multiple", [1, 2, 5, 8])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(
    "sizes", [NARROW, NARROW[:2], [(9, 9), (8, 12)], [(1, 1), (30, 7)], [(100, 100)]]
)
def test_less_than_the_least_is_refused_with_a_figure_that_is_accepted(sizes, allocation, multiple):
    pools = [rank_pool(*size, multiple) for size in sizes]
    scores = [np.arange(pool.size)[::-1] for pool in pools]

    def allocate(budget):
        if allocation == "uniform":
            return uniform_counts(pools, budget, "kernels")
        return global_counts(pools, budget, scores, "kernels")

    with pytest.raises(InputError, match=r"^budget 0\.001 of the kernels: with 5 %") as refusal:
        allocate(0.001)
    assert f"in multiples of {multiple}, " in str(refusal.value)
    figure = least_said(refusal)
    counts = allocate(figure)
    assert all(count >= pool.least for pool, count in zip(pools, counts, strict=True))
    assert parameters(pools, counts) <= share(figure, pools)
    with pytest.raises(InputError):
        allocate(figure - 2e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0.4, 0.5, 0.8])
def test_global_counts_keep_the_greatest_total_score(seed, budget):
    rng = np.random.default_rng(seed)
    pools = [Pool(5, 1, 4, 1, 1), Pool(6, 1, 5, 2, 1), Pool(3, 1, 3, 1, 1)]
    scores = [descending(pool, rng) for pool in pools]
    limit = int(budget * 12)

    def kept(counts):
        return sum(row[:count].sum() for row, count in zip(scores, counts, strict=True))

    choices = itertools.product(*(range(pool.floor, pool.cap + 1) for pool in pools))
    best = max((c for c in choices if sum(c) <= limit), key=kept)
    assert global_counts(pools, budget, scores) == list(best)


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_global_counts_of_equal_layers_are_uniform(budget):
    pools = [channel_pool(40, 3)] * 4
    scores = [np.linspace(1, 0, 40)] * 4
    counts = global_counts(pools, budget, scores)
    assert max(counts) - min(counts) <= 1
    assert min(counts) == uniform_counts(pools, budget)[0]


def test_a_layer_that_scores_higher_everywhere_is_filled_first():
    pools = [channel_pool(20, 7)] * 2
    low, high = np.linspace(1, 0, 20), np.linspace(3, 2, 20)
    assert global_counts(pools, 0.5, [low, high]) == [1, 19]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 10, 12, 24])
def test_whole_layers_are_rounded_down_and_never_none(num_layers):
    for budget in np.round(np.linspace(0.01, 1, 100), 2):
        held = [n for n in range(1, num_layers + 1) if n <= Fraction(str(budget)) * num_layers]
        if held:
            assert whole_layers(num_layers, budget) == max(held)
            continue
        with pytest.raises(InputError, match=f"less than one of {num_layers} layers") as refusal:
            whole_layers(num_layers, budget)
        assert whole_layers(num_layers, least_said(refusal)) == 1


def test_a_budget_is_a_share_above_zero():
    for budget in (1e-9, 0.5, 1):
        check_budget("budget", budget)
    for budget in (0, -0.1, 1.001, float("nan")):
        with pytest.raises(InputError, match=r"^mlp_budget must lie in \(0, 1\], got"):
            check_budget("mlp_budget", budget)
