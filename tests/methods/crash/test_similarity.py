from itertools import combinations, pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.methods.crash.similarity import (
    adjacent_cka,
    contiguous_clusters,
    nearest_kept,
    representatives,
    spread_positions,
)

SHAPES = [(3, 7, 4), (3, 4, 7), (2, 2, 5), (4, 6, 1)]
ADJACENT = np.random.default_rng(0).permutation(7) / 7


def representations(shape, seed=0) -> np.ndarray:
    # Layers that resemble each other, far from the origin.
    rng = np.random.default_rng(seed)
    return 3 + rng.normal(size=shape[1:]) + 0.7 * rng.normal(size=shape)


def cka_written_out(x, y) -> float:
    centre = np.eye(len(x)) - np.full((len(x), len(x)), 1 / len(x))

    def hsic(a, b):
        return ((centre @ a @ a.T @ centre) * (centre @ b @ b.T @ centre)).sum()

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("shape", SHAPES)
def test_cka_is_its_definition(shape, assert_close):
    layers = representations(shape)
    expected = np.array([cka_written_out(x, y) for x, y in pairwise(layers)])
    assert_close(adjacent_cka(jnp.asarray(layers, jnp.float32)), expected, "float32")


def test_cka_sees_neither_rotation_nor_scale_nor_shift(assert_close):
    layers = representations((3, 9, 5))
    rng = np.random.default_rng(1)
    moved = [
        scale * layer @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + rng.normal(size=5)
        for scale, layer in zip((1.0, 1e-3, 40.0), layers, strict=True)
    ]
    expected = adjacent_cka(jnp.asarray(layers, jnp.float32))
    assert_close(adjacent_cka(jnp.asarray(np.stack(moved), jnp.float32)), expected, "float32_model")


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_cka_stays_finite_at_extreme_scales(scale, assert_close):
    layers = representations((2, 6, 4))
    expected = np.array([cka_written_out(*layers)])
    assert_close(adjacent_cka(jnp.asarray(scale * layers, jnp.float32)), expected, "float32")


def test_a_layer_is_like_itself(assert_close):
    layer = representations((1, 6, 4))
    twice = jnp.asarray(np.concatenate([layer, layer]), jnp.float32)
    assert_close(adjacent_cka(twice), np.ones(1), "float32")


def test_cka_compiles_once():
    layers = jnp.asarray(representations((3, 5, 4)), jnp.float32)
    traced = jax.jit(chex.assert_max_traces(adjacent_cka.__wrapped__, n=1))
    traced(layers)
    traced(layers + 1)


def test_layers_without_an_input_axis_are_refused():
    with pytest.raises(AssertionError):
        adjacent_cka(jnp.ones((3, 4)))


def merged(adjacent, count) -> list[list[int]]:
    """Singletons, merged where the last of the left is most like the first of the right."""
    clusters = [[layer] for layer in range(len(adjacent) + 1)]
    while len(clusters) > count:
        borders = [adjacent[left[-1]] for left in clusters[:-1]]
        at = int(np.argmax(borders))
        clusters[at : at + 2] = [clusters[at] + clusters[at + 1]]
    return clusters


@pytest.mark.parametrize("count", range(1, 9))
def test_cuts_are_what_merging_leaves(count):
    clusters = contiguous_clusters(ADJACENT, count)
    assert [list(cluster) for cluster in clusters] == merged(ADJACENT, count)


@pytest.mark.parametrize("count", range(1, 9))
def test_no_partition_is_more_alike_within(count):
    def within(cuts) -> float:
        return sum(value for layer, value in enumerate(ADJACENT) if layer + 1 not in cuts)

    partitions = combinations(range(1, 8), count - 1)
    best = max(partitions, key=within)
    assert tuple(cluster[0] for cluster in contiguous_clusters(ADJACENT, count)[1:]) == best


def test_the_lower_of_equal_borders_is_cut():
    assert contiguous_clusters(np.array([0.9, 0.5, 0.5, 0.5]), 3) == ((0, 1), (2,), (3, 4))


def test_one_layer_is_one_cluster():
    assert contiguous_clusters(np.zeros(0), 1) == ((0,),)


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_number_of_clusters_is_refused(count):
    with pytest.raises(ValueError, match=r"count must lie in \[1, 8\]"):
        contiguous_clusters(ADJACENT, count)


def test_the_middle_stands_for_a_cluster_and_the_upper_of_two():
    assert representatives(((0,), (1, 2), (3, 4, 5), (6, 7, 8, 9))) == (0, 2, 4, 8)


@pytest.mark.parametrize(
    ("kept", "trained"),
    [
        ((0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23), (0, 5, 18, 23)),
        ((0, 1, 2, 3, 5, 8, 10, 11, 12, 17, 22, 23), (0, 5, 12, 23)),
    ],
)
def test_trained_layers_are_the_published_ones(kept, trained):
    assert tuple(kept[position] for position in spread_positions(12, 4)) == trained


def test_spread_positions_are_distinct_and_reach_both_ends():
    assert spread_positions(22, 4) == (0, 7, 14, 21)
    assert spread_positions(3, 3) == (0, 1, 2)
    assert spread_positions(5, 1) == (0,)
    for count in range(2, 12):
        positions = spread_positions(11, count)
        assert sorted(set(positions)) == list(positions) and len(positions) == count
        assert (positions[0], positions[-1]) == (0, 10)


@pytest.mark.parametrize("kept", [(0, 2, 5, 9), (3,), (1, 2), (0, 9), tuple(range(10))])
def test_nearest_layer_is_found_by_walking_outwards(kept):
    expected = []
    for place in range(10):
        distance = 0
        while place + distance not in kept and place - distance not in kept:
            distance += 1
        expected.append(place + distance if place + distance in kept else place - distance)
    assert nearest_kept(kept, 10) == tuple(expected)
