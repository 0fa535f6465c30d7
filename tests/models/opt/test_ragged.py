import math
from itertools import combinations, pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.opt.forward import run_blocks
from gradot_jax.models.opt.params import (
    Shared,
    count_params,
    depth,
    get_block,
    segment_blocks,
    unstack_blocks,
)
from gradot_jax.models.opt.ragged import merge_segments
from gradot_jax.nn.linear import Dense, LowRank

D, F = 8, 12
SIZES = [(1, 5), (2, 5), (2, 6), (4, 10), (4, 12), (1, 12), (3, 3)]
"""Ranks of v and channels of layers in depth order."""


@pytest.fixture(scope="module")
def layers(toy_model):
    """Layers of `SIZES`, on the host, each a stack of its own."""
    _, params = toy_model()
    rng = np.random.default_rng(0)

    def layer(index, rank, channels):
        block = jax.tree.map(np.asarray, get_block(params.segments[0], index % 5))
        left, right = (rng.normal(size=s).astype(np.float32) for s in ((D, rank), (rank, D)))
        fc1 = Dense(block.fc1.kernel[:, :channels], block.fc1.bias[:channels])
        fc2 = Dense(block.fc2.kernel[:channels], block.fc2.bias)
        low = LowRank(left, right, block.v_proj.bias)
        return jax.tree.map(lambda leaf: leaf[None], block.replace(v_proj=low, fc1=fc1, fc2=fc2))

    return [layer(i, *size) for i, size in enumerate(SIZES)]


def padded_size(stacks):
    return count_params(merge_segments(stacks, waste=math.inf))


@pytest.mark.parametrize("waste", [0.0, 0.02, 0.05, 0.1, 0.2, 0.5, math.inf])
def test_stacks_are_the_fewest_that_the_zeros_allow(layers, waste):
    weights = count_params(layers)

    def zeros(cuts):
        bounds = [0, *cuts, len(layers)]
        sizes = [padded_size(layers[a:b]) for a, b in pairwise(bounds)]
        return sum(sizes) / weights - 1

    def least(number):
        return min(map(zeros, combinations(range(1, len(layers)), number - 1)))

    merged = merge_segments(layers, waste=waste)
    added = count_params(merged) / weights - 1
    assert added <= waste and added == pytest.approx(least(len(merged)))
    assert len(merged) == 1 or least(len(merged) - 1) > waste


def test_without_zeros_equal_layers_alone_are_joined(layers):
    given = [layers[0], layers[0], layers[1], layers[2], layers[2], layers[2]]
    merged = merge_segments(given)
    assert [depth(stack) for stack in merged] == [2, 1, 3]
    assert merged[1] is given[2]
    for got, expected in zip(unstack_blocks(merged), unstack_blocks(given), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_stacks_are_joined_whole_and_stay_where_they_are(layers):
    blocks = [get_block(layers[i], 0) for i in (0, 0, 1)]
    on_device = merge_segments(segment_blocks(blocks), waste=math.inf)
    on_host = merge_segments([layers[0], layers[0], layers[1]], waste=math.inf)
    assert [depth(stack) for stack in on_device] == [3]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    jax.tree.map(np.testing.assert_array_equal, on_device, on_host)


def test_padding_fills_ranks_and_channels_with_zeros_at_their_end(layers):
    first, second = layers[0], layers[3]
    (stack,) = merge_segments([first, second], waste=math.inf)
    assert (stack.v_proj.rank, stack.fc1.shape) == (4, (D, 10))
    padded, first = get_block(stack, 0), get_block(first, 0)
    np.testing.assert_array_equal(padded.v_proj.left[:, :1], first.v_proj.left)
    np.testing.assert_array_equal(padded.fc2.kernel[:5], first.fc2.kernel)
    beyond = (padded.v_proj.left[:, 1:], padded.v_proj.right[1:], padded.fc1.bias[5:])
    assert not any(part.any() for part in beyond)
    jax.tree.map(np.testing.assert_array_equal, get_block(stack, 1), get_block(second, 0))


def test_another_dtype_another_kind_and_shared_blocks_stay_apart(layers):
    first, second = layers[:2]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), second)
    dense = second.replace(v_proj=second.k_proj)
    shared = Shared(second, (0, 0))
    for other in (half, dense, shared):
        merged = merge_segments([first, other, other], waste=math.inf)
        assert merged[0] is first and len(merged) == (3 if other is shared else 2)
    assert merge_segments([]) == ()


def test_output_and_gradient_are_the_same_however_arranged(layers, toy_model, assert_close):
    config, _ = toy_model()
    hidden = jax.random.normal(jax.random.key(0), (2, 6, D))

    @jax.jit
    @chex.assert_max_traces(n=3)
    def step(stacks, hidden):
        output, pull = jax.vjp(lambda h: run_blocks(config, stacks, h), hidden)
        return output, pull(output)[0]

    arranged = [tuple(layers), *(merge_segments(layers, waste=w) for w in (0.1, math.inf))]
    outcomes = [(step(stacks, 2 * hidden), step(stacks, hidden))[1] for stacks in arranged]
    for outcome in outcomes[1:]:
        assert_close(outcome, outcomes[0], "float32_model")
