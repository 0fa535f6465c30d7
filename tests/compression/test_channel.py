import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.channel import elimination_costs, prune_channels
from gradot_jax.compression.rank import keep_order
from gradot_jax.nn.linear import Dense

D, F = 3, 5
RNG = np.random.default_rng(0)
FC2 = Dense(RNG.normal(size=(F, D)), RNG.normal(size=D))
KEPT = np.array([0, 2, 4])


@pytest.mark.parametrize("bias", [RNG.normal(size=F), None])
def test_pruned_mlp_is_the_mlp_with_those_channels_zeroed(bias):
    fc1 = Dense(RNG.normal(size=(D, F)), bias)
    x = RNG.normal(size=(7, D))

    def mlp(fc1, fc2):
        hidden = x @ fc1.kernel + (0 if fc1.bias is None else fc1.bias)
        return np.maximum(hidden, 0) @ fc2.kernel + fc2.bias

    alive = np.isin(np.arange(F), KEPT)
    zeroed1 = Dense(fc1.kernel * alive, None if bias is None else bias * alive)
    zeroed2 = Dense(FC2.kernel * alive[:, None], FC2.bias)
    small1, small2 = prune_channels(fc1, FC2, KEPT)
    assert small1.shape == (D, 3) and small2.shape == (3, D)
    np.testing.assert_allclose(mlp(small1, small2), mlp(zeroed1, zeroed2), rtol=1e-12)
    assert small2.bias is FC2.bias


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
