"""Export: an emulator as a standard dense checkpoint that any program reads."""

import dataclasses

import jax
import jax.numpy as jnp

from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.params import Params, Segment, Shared, merge_segments, take_blocks
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.layout import Block, maps
from gradot_jax.nn.linear import Dense, Linear, dense_kernel


def export_params(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Multiplies factors back and pads pruned MLPs with zeros.

    Padding is exact: a channel of zeros adds zero, relu(0) = gelu(0) = silu(0) = 0. The product of
    two factors is taken in float32 and rounded once to their dtype.

    Args:
        config: of the full model.
        params: an assembled emulator, `Emulator.assemble`.

    Returns:
        A configuration with the emulator's depth, and equal weights in one segment of dense
        blocks; shared blocks are written out once for each place at which they run.

    Raises:
        InputError: for an emulator with harmonizers: no block of the original computes them.
    """
    size = channel_count(config)
    blocks = merge_segments([_dense_block(stack, size) for stack in params.segments])
    exported = dataclasses.replace(config, num_hidden_layers=params.num_layers)
    return exported, Params(params.shell, blocks)


def _dense_block(stack: Segment, size: int) -> Block:
    if isinstance(stack, Shared):
        stack = take_blocks(stack.blocks, stack.order)
    if isinstance(stack, Harmonizer):
        raise InputError("export: the emulator has harmonizers, which no block can express")
    layout, sites = stack.layout, maps(stack)
    fields = {site: _dense(sites[site]) for site in layout.low_rank}
    for site in layout.channels.into:
        kernel, bias = sites[site].kernel, sites[site].bias
        padded = None if bias is None else _pad(bias, -1, size)
        fields[site] = Dense(_pad(kernel, -1, size), padded)
    out = sites[layout.channels.out]
    fields[layout.channels.out] = Dense(_pad(out.kernel, -2, size), out.bias)
    return stack.replace(**fields)


def _dense(weights: Linear) -> Dense:
    stored = jax.tree.leaves(weights)[0].dtype
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    return Dense(dense_kernel(exact).astype(stored), weights.bias)


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)
