from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.methods.scaleot.importance import (
    layer_groups,
    layers_to_replace,
    sample_network,
    update_importance,
)

KEYS = jax.random.split(jax.random.key(0), 400)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sample_many(importance, group_size):
    draw = partial(sample_network, importance=jnp.asarray(importance), group_size=group_size)
    return np.asarray(jax.jit(jax.vmap(draw))(KEYS))


@pytest.mark.parametrize(
    ("num_layers", "sizes"), [(8, [4, 4]), (7, [4, 3]), (6, [4, 2]), (9, [4, 5]), (1, [1])]
)
def test_groups_are_consecutive_and_none_is_a_single_layer(num_layers, sizes):
    groups = layer_groups(num_layers, 4)
    assert (np.diff(groups) >= 0).all()
    assert np.bincount(groups).tolist() == sizes


@pytest.mark.parametrize("num_layers", [6, 7, 8, 9])
def test_half_of_each_group_is_raw_rounded_down(num_layers):
    raw = sample_many(np.zeros(num_layers, np.float32), 4)
    for group in np.unique(layer_groups(num_layers, 4)):
        members = layer_groups(num_layers, 4) == group
        assert (raw[:, members].sum(1) == members.sum() // 2).all()


def test_raw_layers_are_those_above_the_median_of_their_group():
    importance = np.array([0.3, -1.0, 2.0, 0.0, 1.0, -0.5, 0.2, 0.1], np.float32)
    raw = sample_many(importance, 4)
    draws = np.stack([jax.random.uniform(key, (8,)) for key in KEYS]) * sigmoid(importance)
    halves = draws.reshape(-1, 2, 4)
    expected = halves > np.median(halves, axis=-1, keepdims=True)
    np.testing.assert_array_equal(raw, expected.reshape(-1, 8))


def test_important_layers_run_raw_more_often_and_others_still_do():
    raw = sample_many(np.array([3.0, -3.0, -3.0, -3.0], np.float32), 4).mean(0)
    assert raw[0] > 0.85
    assert (raw[1:] > 0.2).all()


def test_every_layer_is_tried():
    assert sample_many(np.zeros(9, np.float32), 4).any(0).all()


def test_update_equals_a_loop_in_float64(assert_close):
    rng = np.random.default_rng(0)
    importance = rng.normal(size=7)
    raw = rng.random((3, 7)) < 0.5
    losses = rng.uniform(1, 3, size=3)
    expected = importance.copy()
    mean = np.mean([np.exp(-loss) for loss in losses])
    for network, loss in zip(raw, losses, strict=True):
        for layer in np.flatnonzero(network):
            slope = sigmoid(importance[layer]) * (1 - sigmoid(importance[layer]))
            expected[layer] += 0.7 * (np.exp(-loss) - mean) * slope
    assert_close(
        update_importance(jnp.asarray(importance, jnp.float32), raw, jnp.asarray(losses), 0.7),
        expected,
        "float32",
    )


def test_layers_of_the_better_network_rise_and_of_the_worse_fall():
    raw = np.array([[True, False, True, False], [False, True, True, False]])
    change = update_importance(jnp.zeros(4), raw, jnp.array([1.0, 2.0]), 1.0)
    assert change[0] > 0 > change[1]
    # Raw in both, where the rewards cancel, or in neither.
    np.testing.assert_allclose(change[2:], 0, atol=1e-7)


def test_equal_losses_teach_nothing():
    raw = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(
        update_importance(jnp.array([0.5, -0.5]), raw, jnp.array([1.5, 1.5]), 1.0), [0.5, -0.5]
    )


def test_least_important_of_each_group_are_replaced_first():
    importance = np.array([0.4, 0.1, 0.3, 0.2, 9.0, 8.0, 6.0, 7.0])
    assert layers_to_replace(importance, 2, 4) == (1, 6)
    assert layers_to_replace(importance, 4, 4) == (1, 3, 6, 7)
    assert layers_to_replace(importance, 3, 4) == (1, 3, 6)
    assert layers_to_replace(importance, 0, 4) == ()
    assert layers_to_replace(importance, 8, 4) == tuple(range(8))


@pytest.mark.parametrize("num_layers", [5, 7, 8, 11, 20])
def test_replacements_are_spread_in_proportion_to_the_groups(num_layers):
    importance = np.random.default_rng(1).normal(size=num_layers)
    groups = layer_groups(num_layers, 4)
    sizes = np.bincount(groups)
    previous: set[int] = set()
    for count in range(num_layers + 1):
        chosen = layers_to_replace(importance, count, 4)
        shares = np.bincount(groups[list(chosen)], minlength=len(sizes)) / sizes
        assert len(set(chosen)) == count
        assert np.ptp(shares) <= 1 / sizes.min() + 1e-9
        assert previous <= set(chosen)
        previous = set(chosen)


def test_ties_go_to_the_lower_layer():
    assert layers_to_replace(np.zeros(8), 2, 4) == (0, 4)
