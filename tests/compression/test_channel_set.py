"""The objective against H written out, and the search against every subset of eight channels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.channel_set import channel_set_costs, channel_set_terms
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import ScoreTerms, channel_terms, combine
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.nn.layout import Channels
from gradot_jax.nn.linear import Dense

MLP, GATED = Channels(into=("fc1",), out="fc2"), Channels(into=("gate", "up"), out="down")
LAYOUTS = [MLP, GATED]


def mlp(channels, size, seed=0, width=4, tokens=9, biased=None, gradient=True):
    """Maps and factors of an MLP, float32; the maps into the channels of an OPT have biases."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layer, factors = {}, {}
    for site in (*channels.into, channels.out):
        d_in, d_out = (size, width) if site == channels.out else (width, size)
        has_bias = channels is MLP if biased is None else biased
        layer[site] = Dense(array(d_in, d_out), array(d_out) if has_bias else None)
        x, g = array(tokens, d_in) + 0.5, array(tokens, d_out)
        slope = Dense(x.T @ g / tokens, g.mean(0)) if gradient else None
        moments = x.T @ x / tokens, x.mean(0), g.T @ g / tokens
        factors[site] = KroneckerFactors(*moments, slope)
    return layer, factors


def written_out(channels, layer, factors, removed) -> ScoreTerms:
    """Both terms of a set, float64, with `np.kron`."""
    moved, raised = 0.0, 0.0
    for site, weights in layer.items():
        a, g = (np.asarray(factors[site][i], np.float64) for i in (0, 2))
        slope, delta = factors[site].gradient, -np.array(weights.kernel, np.float64)
        steps = None if slope is None else np.asarray(slope.kernel, np.float64)
        if site == channels.out:
            delta[~removed] = 0
        else:
            delta[:, ~removed] = 0
            if weights.bias is not None:
                mean = np.asarray(factors[site].input_mean, np.float64)
                a = np.block([[a, mean[:, None]], [mean, np.ones(1)]])
                delta = np.vstack([delta, np.where(removed, -np.asarray(weights.bias), 0)])
                steps = None if slope is None else np.vstack([steps, np.asarray(slope.bias)])
        moved += np.abs(np.kron(a, g) @ delta.reshape(-1)).sum()
        raised -= 0.0 if steps is None else (steps * delta).sum()
    return ScoreTerms(np.asarray(moved), np.asarray(raised))


def subsets(size, number):
    chosen = np.array(list(itertools.combinations(range(size), number)))
    return (chosen[:, :, None] == np.arange(size)).any(1)


def removed_by(scores, count):
    """The set that an order of keeping removes."""
    order = np.asarray(keep_order(jnp.asarray(scores), 0))
    return ~np.isin(np.arange(len(order)), order[:count])


def objectives(channels, layer, factors, sets, weight=0.0):
    """f of each set, in the unit of its first term."""
    terms = jax.vmap(lambda s: channel_set_terms(channels, layer, factors, s))(jnp.asarray(sets))
    hessian, gradient = (np.abs(t).mean() for t in channel_terms(channels, layer, factors))
    slope = weight * hessian / gradient if weight else 0.0
    return np.asarray(terms.hessian) + slope * np.asarray(terms.gradient)


@pytest.mark.parametrize("channels", LAYOUTS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_terms_of_a_set_equal_the_written_out_hessian(channels, biased, gradient, assert_close):
    layer, factors = mlp(channels, 6, width=3, biased=biased, gradient=gradient)
    for removed in np.random.default_rng(1).random((4, 6)) < 0.5:
        got = channel_set_terms(channels, layer, factors, jnp.asarray(removed))
        assert_close(got, written_out(channels, layer, factors, removed), "float32")


@pytest.mark.parametrize("channels", LAYOUTS)
def test_a_set_of_one_is_its_single_score_and_no_set_exceeds_the_sum(channels, assert_close):
    layer, factors = mlp(channels, 5)
    single = channel_terms(channels, layer, factors)
    ones = jnp.eye(5, dtype=bool)
    of_sets = jax.vmap(lambda s: channel_set_terms(channels, layer, factors, s))
    assert_close(of_sets(ones), single, "float32")
    pairs = subsets(5, 2)
    together = of_sets(jnp.asarray(pairs))
    assert (together.hessian < pairs @ np.asarray(single.hessian)).all()
    assert_close(together.gradient, pairs @ np.asarray(single.gradient), "float32")


@pytest.mark.parametrize("channels", LAYOUTS)
@pytest.mark.parametrize("weight", [0.0, 0.7, -0.7])
def test_search_finds_the_best_of_all_subsets_on_most_seeds(channels, weight):
    found = []
    for seed, count in itertools.product(range(8), (2, 4, 6)):
        layer, factors = mlp(channels, 8, seed)
        costs = channel_set_costs(channels, layer, factors, weight, count)
        single = combine(channel_terms(channels, layer, factors), weight)
        least = objectives(channels, layer, factors, subsets(8, 8 - count), weight).min()
        sets = np.stack([removed_by(costs, count), removed_by(single, count)])
        assert sets.sum(1).tolist() == [8 - count] * 2
        got, additive = objectives(channels, layer, factors, sets, weight)
        size = abs(least) + 1e-6
        assert got <= additive + 1e-5 * size
        found.append(got <= least + 1e-5 * size)
    assert np.mean(found) >= 0.8


@pytest.mark.parametrize("channels", LAYOUTS)
def test_elimination_takes_what_costs_least_at_every_step(channels, assert_close):
    for seed in range(3):
        layer, factors = mlp(channels, 9, seed)
        costs, removed, rises = channel_set_costs(channels, layer, factors), [], []
        before = 0.0
        while len(removed) < 9:
            left = [j for j in range(9) if j not in removed]
            sets = np.array([np.isin(np.arange(9), [*removed, j]) for j in left])
            values = objectives(channels, layer, factors, sets)
            removed.append(left[values.argmin()])
            rises.append(values.min() - before)
            before = values.min()
        assert np.argsort(costs).tolist() == removed
        raised = np.maximum.accumulate(rises)
        assert_close(np.asarray(costs)[removed], raised, "float32_model")


def test_rounds_of_many_channels_stay_below_single_scores():
    layer, factors = mlp(MLP, 96, width=6, tokens=30)
    costs = channel_set_costs(MLP, layer, factors)
    assert np.isfinite(costs).all() and len(set(np.asarray(costs).tolist())) == 96
    single = channel_terms(MLP, layer, factors).hessian
    for count in (30, 60):
        known = channel_set_costs(MLP, layer, factors, 0.0, count)
        sets = np.stack([removed_by(s, count) for s in (single, costs, known)])
        additive, nested, searched = objectives(MLP, layer, factors, sets)
        assert searched < additive and nested < additive


@pytest.mark.parametrize("count", [None, 20])
def test_blocks_change_nothing(count, assert_close):
    layer, factors = mlp(GATED, 37, width=5)
    whole = channel_set_costs(GATED, layer, factors, 0.0, count)
    for block in (1, 37 * 8):
        got = channel_set_costs(GATED, layer, factors, 0.0, count, block)
        assert_close(got, whole, "float32_model")
        np.testing.assert_array_equal(removed_by(got, 20), removed_by(whole, 20))


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_permuting_channels_permutes_the_costs(count, weight, assert_close):
    layer, factors = mlp(MLP, 12)
    p = np.random.default_rng(3).permutation(12)
    one, two = layer["fc1"], layer["fc2"]
    moved = {"fc1": Dense(one.kernel[:, p], one.bias[p]), "fc2": Dense(two.kernel[p], two.bias)}
    a, mean, g, slope, _ = factors["fc1"]
    first = KroneckerFactors(a, mean, g[p][:, p], Dense(slope.kernel[:, p], slope.bias[p]))
    a, mean, g, slope, _ = factors["fc2"]
    second = KroneckerFactors(a[p][:, p], mean[p], g, Dense(slope.kernel[p], slope.bias))
    got = channel_set_costs(MLP, moved, {"fc1": first, "fc2": second}, weight, count)
    expected = np.asarray(channel_set_costs(MLP, layer, factors, weight, count))[p]
    assert_close(got, expected, "float32_model")


@pytest.mark.parametrize("count", [None, 3])
def test_dead_channels_go_first_and_of_them_the_highest_index(count):
    layer, factors = mlp(GATED, 6)
    alive = jnp.asarray([True, False, True, False, False, True])
    for site in GATED.into:
        g = factors[site].gradient_covariance * jnp.outer(alive, alive)
        layer[site] = Dense(layer[site].kernel * alive[None], None)
        factors[site] = factors[site]._replace(gradient_covariance=g)
    layer["down"] = Dense(layer["down"].kernel * alive[:, None], None)
    costs = channel_set_costs(GATED, layer, factors, 0.0, count)
    assert np.asarray(keep_order(costs, 0))[3:].tolist() == [1, 3, 4]


def test_all_channels_kept_need_no_search():
    layer, factors = mlp(MLP, 5)
    single = channel_terms(MLP, layer, factors).hessian
    np.testing.assert_array_equal(channel_set_costs(MLP, layer, factors, 0.0, 5), single)


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("place", ["input_covariance", "gradient_covariance"])
def test_non_finite_factors_show_in_the_costs(place, count):
    layer, factors = mlp(MLP, 6)
    spoilt = getattr(factors["fc2"], place).at[1, 1].set(np.nan)
    factors["fc2"] = factors["fc2"]._replace(**{place: spoilt})
    assert not np.isfinite(channel_set_costs(MLP, layer, factors, 0.0, count)).all()


def test_lambda_and_layers_of_equal_shapes_share_a_trace():
    before = channel_set_costs._cache_size()
    for seed, weight in ((0, 0.0), (1, 0.0), (2, 0.5)):
        channel_set_costs(MLP, *mlp(MLP, 11, seed), weight, 4)
    assert channel_set_costs._cache_size() == before + 1


@pytest.mark.parametrize("count", [None, 100])
def test_nothing_is_held_for_all_pairs_of_channels(count):
    layer, factors = jax.eval_shape(lambda: mlp(GATED, 512))
    program = channel_set_costs.lower(GATED, layer, factors, 0.0, count, 512 * 8).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 512**2 / 2


def test_a_set_of_another_size_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        channel_set_terms(MLP, *mlp(MLP, 5), jnp.zeros(4, bool))
