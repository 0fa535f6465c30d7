"""Export: an emulator as a standard dense OPT that any program reads."""

import dataclasses

import jax
import jax.numpy as jnp

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    Block,
    Params,
    Segment,
    Shared,
    concatenate_blocks,
    take_blocks,
)
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.linear import Dense, Linear, dense_kernel


def export_params(config: OPTConfig, params: Params) -> tuple[OPTConfig, Params]:
    """Multiplies factors back and pads pruned MLPs with zeros.

    Padding is exact: a channel of zeros has activation relu(0) = gelu(0) = 0. The product of two
    factors is taken in float32 and rounded once to their dtype.

    Args:
        config: of the full model.
        params: an assembled emulator, `Emulator.assemble`.

    Returns:
        A configuration with the emulator's depth, and equal weights in one segment of dense
        blocks; shared blocks are written out once for each place at which they run.

    Raises:
        InputError: for an emulator with harmonizers: no block of an OPT computes what they do.
    """
    blocks = concatenate_blocks([_dense_block(stack, config.ffn_dim) for stack in params.segments])
    exported = dataclasses.replace(config, num_hidden_layers=params.num_layers)
    return exported, Params(params.shell, (blocks,))


def _dense_block(stack: Segment, ffn_dim: int) -> Block:
    if isinstance(stack, Shared):
        stack = take_blocks(stack.blocks, stack.order)
    if isinstance(stack, Harmonizer):
        raise InputError("export: the emulator has harmonizers, which no OPT block can express")
    fc1, fc2 = stack.fc1, stack.fc2
    fc1_bias = None if fc1.bias is None else _pad(fc1.bias, -1, ffn_dim)
    return stack.replace(
        fc1=Dense(_pad(fc1.kernel, -1, ffn_dim), fc1_bias),
        fc2=Dense(_pad(fc2.kernel, -2, ffn_dim), fc2.bias),
        **{site: _dense(getattr(stack, site)) for site in ATTENTION_SITES},
    )


def _dense(weights: Linear) -> Dense:
    stored = jax.tree.leaves(weights)[0].dtype
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    return Dense(dense_kernel(exact).astype(stored), weights.bias)


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)
