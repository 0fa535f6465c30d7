from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradot_jax.models.opt.block import Block
from gradot_jax.models.params import (
    concatenate_blocks,
    depth,
    get_block,
    layers_at,
    merge_segments,
    segment_blocks,
    stack_blocks,
    unstack_blocks,
)
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, adapter_of, split_model
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.offsite.emulator import Emulator, build_emulator

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
    adapter = adapter_of(params, AdapterSpec(1, 1))
    middle = layers_at(params.segments, range(1, 4))
    blocks = [cut(block, *size) for block, size in zip(middle, SIZES, strict=True)]
    return config, params.shell, adapter, blocks


def logits_and_gradient(config, shell, adapter, middle, batch):
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(adapter):
        logits = forward(config, Emulator(shell, adapter, middle).assemble(), batch.input_ids)
        return -token_log_likelihood(logits, batch.targets).sum(), logits

    tree, logits = gradient(adapter)
    return logits, ravel_pytree(tree)[0]


def test_scan_equals_unrolled(ragged, toy_batch, assert_close):
    config, shell, adapter, blocks = ragged
    unrolled = tuple(stack_blocks([block]) for block in blocks)
    scanned = merge_segments(unrolled)
    depths = [[depth(stack) for stack in middle] for middle in (unrolled, scanned)]
    assert depths == [[1, 1, 1], [2, 1]]
    batch = toy_batch(size=4)
    got, expected = (
        logits_and_gradient(config, shell, adapter, middle, batch) for middle in (scanned, unrolled)
    )
    assert_close(got, expected, "float32_model")


def test_layers_of_equal_shape_share_a_segment(ragged):
    _, _, _, (first, _, second) = ragged
    third = second.replace(q_proj=second.k_proj)
    blocks = [first, first, second, second, second, third, first]
    segments = segment_blocks(blocks)
    assert [depth(stack) for stack in segments] == [2, 3, 1, 1]
    for got, expected in zip(unstack_blocks(segments), blocks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert segment_blocks([]) == ()


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
    original = split_model(params, AdapterSpec(0, 2))
    empty = Emulator(params.shell, original.adapter, ()).assemble()
    assert [depth(stack) for stack in empty.segments] == [2]
    assert np.isfinite(forward(config, empty, toy_batch().input_ids)).all()
    whole = Emulator(params.shell, original.adapter, original.middle).assemble()
    assert [depth(stack) for stack in whole.segments] == [3, 2]
    joined = concatenate_blocks(whole.segments)
    jax.tree.map(np.testing.assert_array_equal, joined, params.segments[0])


@pytest.mark.parametrize("split", [AdapterSpec(1, 1), AdapterSpec(0, 2), AdapterSpec(1, 0, (2, 3))])
def test_splitting_a_model_on_the_host_copies_nothing_of_the_middle(toy_model, on_host, split):
    _, params = toy_model()
    given = on_host(params)
    model = split_model(given, split)
    middle = split.middle_layers(5)
    for segment, index in zip(model.middle, middle, strict=True):
        assert segment is given.segments[index]
    whole = unstack_blocks(model.assemble().segments)
    for got, expected in zip(whole, unstack_blocks(params.segments), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_emulator_is_where_its_shell_is(ragged, on_host, toy_model):
    _, shell, adapter, blocks = ragged
    params = on_host(toy_model(activation_function="gelu")[1])
    layers = jax.tree.map(np.asarray, blocks)
    stacked = build_emulator(shell, adapter, layers)
    single = build_emulator(params.shell, adapter_of(params, AdapterSpec(1, 1)), layers)
    assert [depth(segment) for segment in stacked.middle] == [2, 1]
    assert [depth(segment) for segment in single.middle] == [1, 1, 1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(single))
    for layer, segment in zip(layers, single.middle, strict=True):
        assert np.shares_memory(layer.fc1.kernel, segment.fc1.kernel)
    for got, expected in zip(single.stored_layers(), stacked.stored_layers(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert single.layer_map == stacked.layer_map
