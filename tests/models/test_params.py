import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.params import (
    Shared,
    depth,
    get_block,
    merge_segments,
    segment_blocks,
    unstack_blocks,
)
from gradot_jax.models.run import run_blocks
from gradot_jax.nn.linear import Dense, LowRank

D = 8
SIZES = [(1, 5), (2, 5), (2, 5), (4, 12)]
"""Ranks of v and channels of layers in depth order; two neighbours are of equal shape."""


@pytest.fixture(scope="module")
def layers(toy_model):
    """Layers of `SIZES`, on the host, each a stack of its own."""
    _, params = toy_model()
    rng = np.random.default_rng(0)

    def layer(index, rank, channels):
        block = jax.tree.map(np.asarray, get_block(params.segments[0], index))
        left, right = (rng.normal(size=s).astype(np.float32) for s in ((D, rank), (rank, D)))
        fc1 = Dense(block.fc1.kernel[:, :channels], block.fc1.bias[:channels])
        fc2 = Dense(block.fc2.kernel[:channels], block.fc2.bias)
        low = LowRank(left, right, block.v_proj.bias)
        return jax.tree.map(lambda leaf: leaf[None], block.replace(v_proj=low, fc1=fc1, fc2=fc2))

    return [layer(i, *size) for i, size in enumerate(SIZES)]


def test_neighbours_of_equal_shape_alone_are_joined(layers):
    given = [layers[0], layers[0], layers[1], layers[3], layers[3], layers[3]]
    merged = merge_segments(given)
    assert [depth(stack) for stack in merged] == [2, 1, 3]
    assert merged[1] is given[2]
    for got, expected in zip(unstack_blocks(merged), unstack_blocks(given), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_stacks_are_joined_whole_and_stay_where_they_are(layers):
    blocks = [get_block(layers[i], 0) for i in (1, 2)]
    pair, single = segment_blocks(blocks), segment_blocks(blocks[:1])
    on_device = merge_segments([*pair, *single])
    on_host = merge_segments([layers[1], layers[2], layers[1]])
    assert [depth(stack) for stack in on_device] == [3]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    jax.tree.map(np.testing.assert_array_equal, on_device, on_host)


def test_another_dtype_another_kind_and_shared_blocks_stay_apart(layers):
    first = second = layers[1]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), second)
    dense = second.replace(v_proj=second.k_proj)
    shared = Shared(second, (0, 0))
    for other in (half, dense, shared):
        merged = merge_segments([first, other, other])
        assert merged[0] is first and len(merged) == (3 if other is shared else 2)
    assert merge_segments([shared, second])[1] is second
    assert merge_segments([]) == ()


def test_output_and_gradient_are_the_same_joined_and_separate(layers, toy_model, assert_close):
    config, _ = toy_model()
    hidden = jax.random.normal(jax.random.key(0), (2, 6, D))

    @jax.jit
    @chex.assert_max_traces(n=2)
    def step(stacks, hidden):
        output, pull = jax.vjp(lambda h: run_blocks(config, stacks, h), hidden)
        return output, pull(output)[0]

    arranged = (tuple(layers), merge_segments(layers))
    assert [depth(stack) for stack in arranged[1]] == [1, 2, 1]
    separate, joined = [(step(stacks, 2 * hidden), step(stacks, hidden))[1] for stacks in arranged]
    assert_close(joined, separate, "float32_model")
