import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.channel import (
    cut_channels,
    elimination_costs,
    prune_channels,
    refit_channels,
)
from gradot_jax.compression.rank import keep_order
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_rows
from gradot_jax.nn.layout import Channels
from gradot_jax.nn.linear import Dense

D, F, TOKENS = 3, 5, 30
MLP, GATED = Channels(into=("fc1",), out="fc2"), Channels(into=("gate", "up"), out="down")
RNG = np.random.default_rng(0)
FC2 = Dense(RNG.normal(size=(F, D)), RNG.normal(size=D))
KEPT = np.array([0, 2, 4])
ACTIVATIONS = (RNG.normal(size=(TOKENS, F)) + 1).astype(np.float32)
FACTORS = KroneckerFactors(
    jnp.asarray(ACTIVATIONS.T @ ACTIVATIONS / TOKENS), jnp.asarray(ACTIVATIONS.mean(0)), None, None
)


def into(bias):
    return Dense(RNG.normal(size=(D, F)), bias)


def apply(weights, x):
    return x @ weights.kernel + (0 if weights.bias is None else weights.bias)


@pytest.mark.parametrize("bias", [RNG.normal(size=F), None])
@pytest.mark.parametrize("channels", [MLP, GATED])
def test_pruned_mlp_is_the_mlp_with_those_channels_zeroed(channels, bias):
    first, *others = channels.into
    layer = {first: into(bias), **{site: into(None) for site in others}, channels.out: FC2}
    x = RNG.normal(size=(7, D))

    def mlp(layer):
        hidden = np.maximum(apply(layer[first], x), 0)
        for site in others:
            hidden = hidden * apply(layer[site], x)
        return apply(layer[channels.out], hidden)

    alive = np.isin(np.arange(F), KEPT)
    zeroed = {
        site: Dense(layer[site].kernel * alive, None if layer[site].bias is None else bias * alive)
        for site in channels.into
    }
    zeroed[channels.out] = Dense(FC2.kernel * alive[:, None], FC2.bias)
    small = prune_channels(channels, layer, KEPT)
    assert small.keys() == layer.keys()
    assert all(small[site].shape == (D, 3) for site in channels.into)
    assert small[channels.out].shape == (3, D)
    np.testing.assert_allclose(mlp(small), mlp(zeroed), rtol=1e-12)
    assert small[channels.out].bias is FC2.bias


def float32_layer(channels, dtype=jnp.float32):
    layer = {site: into(RNG.normal(size=F)) for site in channels.into} | {channels.out: FC2}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), layer)


@pytest.mark.parametrize("channels", [MLP, GATED])
def test_all_channels_keep_the_original(channels):
    layer = float32_layer(channels)
    given = {**layer, "q_proj": layer[channels.out]}
    got, kept = cut_channels(channels, given, np.arange(F)[::-1], F, compensation="refit")
    assert got.keys() == layer.keys() and all(got[site] is layer[site] for site in layer)
    assert kept == tuple(range(F))


@pytest.mark.parametrize("channels", [MLP, GATED])
def test_the_first_of_an_order_are_kept_ascending(channels):
    layer = float32_layer(channels)
    got, kept = cut_channels(channels, layer, np.array([3, 0, 4, 1, 2]), 3)
    assert kept == (0, 3, 4)
    expected = prune_channels(channels, layer, np.array(kept))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_refitted_mlp_is_nearer_to_the_original_on_its_activations():
    layer = float32_layer(GATED)

    def cut(name):
        options = {"compensation": name, "factors": FACTORS, "damping": 1e-6}
        return cut_channels(GATED, layer, np.arange(F), 3, **options)[0]

    def error(out):
        lost = ACTIVATIONS[:, :3] @ np.asarray(out.kernel) - ACTIVATIONS @ FC2.kernel
        return np.square(lost).sum()

    refit, plain = cut("refit"), cut("none")
    assert error(refit["down"]) < error(plain["down"])
    for site in GATED.into:
        jax.tree.map(np.testing.assert_array_equal, refit[site], plain[site])
    np.testing.assert_array_equal(refit["down"].bias, plain["down"].bias)


def test_refit_without_factors_is_refused():
    with pytest.raises(ValueError, match="compensation 'refit' needs Kronecker factors"):
        cut_channels(MLP, float32_layer(MLP), np.arange(F), 3, compensation="refit")


@pytest.mark.parametrize("compensation", ["none", "refit"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_half_precision_and_on_the_host(dtype, compensation):
    """On a device every new number of channels would be a program to compile."""
    layer = float32_layer(GATED, dtype)
    options = {"compensation": compensation, "factors": FACTORS, "damping": 1e-4}
    cut, _ = cut_channels(GATED, layer, np.arange(F), 3, **options)
    leaves = jax.tree.leaves(cut)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_channels_are_refitted_in_the_dtype_of_the_kernel(dtype, assert_close):
    kept, out = np.array([0, 1, 4]), Dense(jnp.asarray(FC2.kernel, dtype), None)
    got = refit_channels(out, kept, FACTORS, 1e-4)
    assert got.dtype == dtype
    moment, kernel = np.asarray(FACTORS.input_covariance), np.asarray(out.kernel, np.float64)
    expected = refit_rows(moment, kernel, kept, 1e-4)
    tolerance = "float32" if dtype == jnp.float32 else "bfloat16"
    assert_close(got.astype(jnp.float32), expected, tolerance)


def fisher(size, tokens, seed=0, dead=()):
    """Of removals with few tokens and a common part, so that sets matter."""
    rng = np.random.default_rng(seed)
    removals = rng.normal(size=(tokens, size)) + rng.normal(size=(tokens, 1))
    removals[:, list(dead)] = 0
    return (removals.T @ removals / tokens).astype(np.float32)


def set_cost(m, removed):
    m = m.astype(np.float64)
    return sum(m[i, j] for i in removed for j in removed)


def eliminated_by_trial(m):
    """Every set is costed anew at every step; of equals, the highest index goes first."""
    left, removed = list(range(len(m))), []
    while left:
        best = min(reversed(left), key=lambda j: set_cost(m, [*removed, j]))
        left.remove(best)
        removed.append(best)
    return removed


def order(costs):
    return np.asarray(keep_order(jnp.asarray(costs), 0))


@pytest.mark.parametrize(
    ("size", "tokens", "dead"), [(1, 3, ()), (7, 20, ()), (9, 3, ()), (8, 4, (1, 5, 6))]
)
def test_order_is_greedy_elimination_backwards(size, tokens, dead):
    for seed in range(3):
        m = fisher(size, tokens, seed, dead)
        assert order(elimination_costs(jnp.asarray(m)))[::-1].tolist() == eliminated_by_trial(m)


def test_costs_are_marginal_costs_that_never_fall(assert_close):
    m = fisher(9, 4)
    removed = eliminated_by_trial(m)
    totals = [set_cost(m, removed[:count]) for count in range(10)]
    assert_close(
        np.asarray(elimination_costs(jnp.asarray(m)))[removed],
        np.maximum.accumulate(np.diff(totals)),
        "float32",
    )


@pytest.mark.parametrize("scale", [1e-9, 1 / 3, 0.7, 1e5])
def test_order_survives_a_change_of_scale(scale):
    # Few tokens and many channels: cancellation makes long runs of costs that would fall.
    m = fisher(64, 2, seed=1)
    costs = elimination_costs(jnp.asarray(m))
    np.testing.assert_array_equal(order(costs * np.float32(scale)), order(costs))
    assert len(set(np.asarray(costs).tolist())) == 64


def test_set_wise_choice_costs_less_than_single_scores():
    for seed in range(5):
        m = fisher(24, 12, seed)
        single, sets = order(np.diag(m)), order(elimination_costs(jnp.asarray(m)))
        for kept in (6, 12, 18):
            assert set_cost(m, sets[kept:]) < set_cost(m, single[kept:])


def test_independent_channels_keep_their_own_costs(assert_close):
    costs = np.array([3.0, 0.5, 2.0, 0.0], np.float32)
    assert_close(elimination_costs(jnp.diag(jnp.asarray(costs))), costs, "float32")


def test_non_finite_fisher_shows_in_the_costs():
    m = fisher(5, 6)
    m[2, 3] = np.nan
    assert not np.isfinite(jax.jit(elimination_costs)(jnp.asarray(m))).all()
