import dataclasses
import re

import jax
import numpy as np
import pytest

from gradot_jax.compression.budget import channel_pool, rank_pool
from gradot_jax.compression.score import LayerTerms, ScoreTerms
from gradot_jax.errors import InputError
from gradot_jax.methods.allocation import (
    LayerPools,
    global_orders_and_counts,
    kind_budgets,
    layer_orders,
    layer_pools,
    uniform_layer_counts,
)
from gradot_jax.methods.options import CompressionOptions

SIZES = {"query": (40, 40), "key": (40, 24), "out": (40, 40)}
F = 60
POOLS = LayerPools({site: rank_pool(*shape) for site, shape in SIZES.items()}, channel_pool(F, 120))
WHOLE = sum(pool.whole for pool in POOLS.ranks.values()), POOLS.channels.whole


def terms(num_layers, seed=0) -> LayerTerms:
    rng = np.random.default_rng(seed)

    def draw(size) -> ScoreTerms:
        hessian, gradient = rng.random((num_layers, size)), rng.normal(size=(num_layers, size))
        return ScoreTerms(hessian.astype(np.float32), gradient.astype(np.float32))

    return LayerTerms({site: draw(min(shape)) for site, shape in SIZES.items()}, draw(F))


def parameters(counts) -> tuple[int, int]:
    """Of attention and MLPs over all layers."""
    ranks = [(POOLS.ranks[site], n) for own in counts for site, n in own.ranks.items()]
    attention = sum(pool.parameters(count) for pool, count in ranks)
    return attention, sum(POOLS.channels.parameters(own.channels) for own in counts)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (0.6, 0.6)),
        ({"attention_budget": 0.4}, (0.4, 0.6)),
        ({"mlp_budget": 0.4}, (0.6, 0.4)),
        ({"budget": 0.9, "attention_budget": 0.9, "mlp_budget": 0.8}, (0.9, 0.8)),
    ],
)
def test_what_is_not_asked_for_is_the_whole_budget(asked, expected):
    assert kind_budgets(POOLS, CompressionOptions(**asked)) == expected


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("share", [0.61, 0.7, 0.85])
def test_what_one_kind_has_above_the_whole_budget_the_other_lacks(kind, share):
    name = ("attention_budget", "mlp_budget")[kind]
    budgets = kind_budgets(POOLS, CompressionOptions(budget=0.6, **{name: share}))
    assert budgets[kind] == share and 0 < budgets[1 - kind] < 0.6
    assert np.dot(budgets, WHOLE) == pytest.approx(0.6 * sum(WHOLE), rel=1e-12)


@pytest.mark.parametrize("kind", ["attention_budget", "mlp_budget"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_kind_that_leaves_the_other_nothing_is_refused(kind, allocation):
    def counts(budget):
        options = CompressionOptions(budget=budget, allocation=allocation, **{kind: 1.0})
        assert np.dot(kind_budgets(POOLS, options), WHOLE) <= budget * sum(WHOLE) * (1 + 1e-9)
        uniform_layer_counts(POOLS, options, 3)

    with pytest.raises(InputError, match=r"^budget 0.3: with 1 of the .* the least is") as error:
        counts(0.3)
    counts(float(str(error.value).split()[-1]))


def test_both_kinds_together_may_not_exceed_the_whole_budget():
    options = CompressionOptions(budget=0.6, attention_budget=0.9, mlp_budget=0.6)
    with pytest.raises(InputError, match=r"budget 0.9 and mlp_budget 0.6 are together") as e:
        kind_budgets(POOLS, options)
    together = float(re.search(r"together ([\d.]+)", str(e.value))[1])
    assert together == pytest.approx(np.dot((0.9, 0.6), WHOLE) / sum(WHOLE), abs=1e-4)
    kind_budgets(POOLS, dataclasses.replace(options, budget=together))


def test_candidates_are_components_outside_the_channels_and_channels(toy_model):
    options = CompressionOptions(rank_multiple=2, channel_multiple=3)
    pools = layer_pools(toy_model()[0], options)
    sites = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert pools.ranks == dict.fromkeys(sites, rank_pool(8, 8, 2))
    assert pools.channels == channel_pool(12, 16, 3)


def test_counts_wait_for_scores_only_where_layers_share_a_budget():
    counts = uniform_layer_counts(POOLS, CompressionOptions(budget=0.5), 3)
    assert counts.ranks == {"query": 10, "key": 7, "out": 10} and counts.channels == 30
    assert uniform_layer_counts(POOLS, CompressionOptions(allocation="global"), 3) is None


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_a_layer_keeps_its_floor_and_then_by_falling_score(weight):
    single = jax.tree.map(lambda leaf: leaf[0], terms(1))
    orders = layer_orders(single, weight, 0.0)
    for site, (hessian, gradient) in single.components.items():
        floor = -(-hessian.size // 20)
        score = hessian / np.abs(hessian).mean() + weight * gradient / np.abs(gradient).mean()
        rest = floor + np.argsort(-score[floor:])
        np.testing.assert_array_equal(orders.components[site], [*range(floor), *rest])
    np.testing.assert_array_equal(orders.channels, np.argsort(-single.channels.hessian))


def test_over_a_single_layer_one_threshold_orders_as_the_layer_does():
    options = CompressionOptions(allocation="global", lambda_mlp=2.0)
    (got,), _ = global_orders_and_counts(terms(1), POOLS, options)
    expected = layer_orders(jax.tree.map(lambda leaf: leaf[0], terms(1)), 0.0, 2.0)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("asked", [{}, {"attention_budget": 0.7}, {"mlp_budget": 0.2}])
def test_counts_of_all_layers_stay_within_the_budget_of_their_kind(asked):
    options = CompressionOptions(allocation="global", budget=0.5, **asked)
    _, counts = global_orders_and_counts(terms(4), POOLS, options)
    assert len({own.channels for own in counts}) > 1
    for kept, whole, budget in zip(
        parameters(counts), WHOLE, kind_budgets(POOLS, options), strict=True
    ):
        # What is left over is less than the dearest of what was left out.
        assert budget * 4 * whole - 40 * 40 < kept <= budget * 4 * whole


def test_a_layer_of_higher_scores_keeps_more():
    raised = jax.tree.map(lambda leaf: leaf * np.array([[1], [3]], np.float32), terms(2))
    options = CompressionOptions(allocation="global", budget=0.5)
    _, (low, high) = global_orders_and_counts(raised, POOLS, options)
    assert low.channels < high.channels
    assert all(low.ranks[site] < high.ranks[site] for site in SIZES)


@pytest.mark.parametrize("multiples", [(1, 1), (1, 40), (16, 1)])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_least_that_is_named_is_enough_for_both_kinds(allocation, multiples):
    ranks, channels = multiples
    pools = LayerPools(
        {site: rank_pool(*shape, ranks) for site, shape in SIZES.items()},
        channel_pool(F, 120, channels),
    )

    def counts(budget):
        options = CompressionOptions(budget=budget, allocation=allocation)
        uniform_layer_counts(pools, options, 3)

    with pytest.raises(InputError) as error:
        counts(0.01)
    counts(float(str(error.value).split()[-1]))
