from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradot_jax.models.opt.forward import forward
from gradot_jax.models.opt.params import (
    Block,
    concatenate_blocks,
    depth,
    get_block,
    segment_blocks,
    stack_blocks,
    unstack_blocks,
)
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.split import AdapterSpec, split_blocks

SMALL = ({"q_proj": 1, "v_proj": 3}, 5)
SIZES = (SMALL, SMALL, ({"q_proj": 2, "v_proj": 1}, 9))
"""Ranks and channels of three layers, which differ in sizes alone."""


def cut(block: Block, ranks: dict[str, int], channels: int) -> Block:
    def factors(site):
        whole = getattr(block, site)
        u, s, vt = np.linalg.svd(np.asarray(whole.kernel), full_matrices=False)
        rank = ranks[site]
        return LowRank(jnp.asarray(u[:, :rank] * s[:rank]), jnp.asarray(vt[:rank]), whole.bias)

    fc1 = Dense(block.fc1.kernel[:, :channels], block.fc1.bias[:channels])
    fc2 = Dense(block.fc2.kernel[:channels], block.fc2.bias)
    return block.replace(fc1=fc1, fc2=fc2, **{site: factors(site) for site in ranks})


@pytest.fixture(scope="module")
def ragged(toy_model):
    """A configuration, a shell, an adapter and middle blocks, the first two of equal shape."""
    config, params = toy_model(activation_function="gelu")
    adapter, middle = split_blocks(params, AdapterSpec(1, 1))
    blocks = [cut(get_block(middle, i), *size) for i, size in enumerate(SIZES)]
    return config, params.shell, adapter, blocks


def logits_and_gradient(config, shell, adapter, middle, batch):
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(adapter):
        logits = forward(config, Emulator(shell, adapter, middle).assemble(), batch.input_ids)
        return -token_log_likelihood(logits, batch.targets).sum(), logits

    tree, logits = gradient(adapter)
    return logits, ravel_pytree(tree)[0]


def test_scan_equals_unrolled_equals_padded(ragged, toy_batch, assert_close):
    config, shell, adapter, blocks = ragged
    unrolled = tuple(stack_blocks([block]) for block in blocks)
    scanned, padded = segment_blocks(blocks), segment_blocks(blocks, pad=True)
    depths = [[depth(stack) for stack in middle] for middle in (unrolled, scanned, padded)]
    assert depths == [[1, 1, 1], [2, 1], [3]]
    batch = toy_batch(size=4)
    expected = logits_and_gradient(config, shell, adapter, unrolled, batch)
    for middle in (scanned, padded):
        got = logits_and_gradient(config, shell, adapter, middle, batch)
        assert_close(got, expected, "float32_model")


def test_layers_of_equal_shape_share_a_segment(ragged):
    _, _, _, (first, _, second) = ragged
    third = second.replace(q_proj=second.k_proj)
    blocks = [first, first, second, second, second, third, first]
    segments = segment_blocks(blocks)
    assert [depth(stack) for stack in segments] == [2, 3, 1, 1]
    for got, expected in zip(unstack_blocks(segments), blocks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert segment_blocks([]) == segment_blocks([], pad=True) == ()


def test_padding_fills_ranks_and_channels_with_zeros_at_their_end(ragged):
    _, _, _, (first, _, second) = ragged
    (stack,) = segment_blocks([first, second], pad=True)
    assert (stack.q_proj.rank, stack.v_proj.rank, stack.fc1.shape) == (2, 3, (8, 9))
    padded = get_block(stack, 0)
    np.testing.assert_array_equal(padded.q_proj.left[:, :1], first.q_proj.left)
    np.testing.assert_array_equal(padded.fc2.kernel[:5], first.fc2.kernel)
    beyond = (padded.q_proj.left[:, 1:], padded.q_proj.right[1:], padded.fc1.bias[5:])
    assert not any(np.asarray(part).any() for part in beyond)


def test_blocks_of_another_dtype_or_kind_are_not_padded_together(ragged):
    _, _, _, (first, _, second) = ragged
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), second)
    assert len(segment_blocks([first, half], pad=True)) == 2
    dense = second.replace(q_proj=second.k_proj)
    assert len(segment_blocks([first, dense], pad=True)) == 2


def test_assembled_model_puts_the_adapter_around_the_middle(ragged):
    _, shell, adapter, blocks = ragged
    emulator = Emulator(shell, adapter, segment_blocks(blocks))
    whole = unstack_blocks(emulator.assemble().segments)
    expected = [get_block(adapter.bottom, 0), *blocks, get_block(adapter.top, 0)]
    for got, block in zip(whole, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, block)
    tuned = jax.tree.map(lambda leaf: leaf + 1, adapter)
    first = emulator.assemble(tuned).segments[0]
    jax.tree.map(np.testing.assert_array_equal, first, tuned.bottom)


def test_empty_middle_and_one_sided_adapter_assemble_without_empty_stacks(toy_model, toy_batch):
    config, params = toy_model()
    adapter, middle = split_blocks(params, AdapterSpec(0, 2))
    empty = Emulator(params.shell, adapter, ()).assemble()
    assert [depth(stack) for stack in empty.segments] == [2]
    assert np.isfinite(forward(config, empty, toy_batch().input_ids)).all()
    whole = Emulator(params.shell, adapter, (middle,)).assemble()
    joined = concatenate_blocks(whole.segments)
    jax.tree.map(np.testing.assert_array_equal, joined, params.segments[0])
