"""The forward pass of a model, from token ids to logits and losses, as pure functions.

A `Params` may hold the original blocks, an emulator's, or any mixture.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.curvature.tap import BlockTaps
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Layer, Params, Segment, Shared, get_block
from gradot_jax.models.partition import gather_over_data, keep_all_but_weights
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.harmonizer import Harmonizer, harmonize
from gradot_jax.nn.loss import cross_entropy
from gradot_jax.parallel import along_data


def embed(
    config: ModelConfig,
    shell: Any,
    input_ids: jax.Array,
    mask: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """The start of the residual stream, `[B, T, D]`; in `dtype` or the embedding's."""
    return config.family.embed(config, gather_over_data(shell), input_ids, mask, dtype)


def apply_layer(
    config: ModelConfig,
    layer: Layer,
    hidden: jax.Array,
    mask: jax.Array | None = None,
    taps: BlockTaps | None = None,
) -> jax.Array:
    """A decoder block, or what stands in its place, on the residual stream `[B, T, D]`.

    Args:
        config: the model's variant.
        layer: weights without a layer axis, in any dtype; that of `hidden` is computed in.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, or None when every token is real.
        taps: zeros whose cotangents are the block's Kronecker factors, summed over tokens.
    """
    if isinstance(layer, Harmonizer):
        return harmonize(gather_over_data(layer), hidden)
    block = gather_over_data(cast(layer, hidden.dtype))
    return along_data(config.family.apply_block(config, block, along_data(hidden), mask, taps))


def run_blocks(
    config: ModelConfig,
    segments: tuple[Segment, ...],
    hidden: jax.Array,
    mask: jax.Array | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """All layers in depth order, one `lax.scan` per segment; `[B, T, D]` in and out.

    Args:
        config: the model's variant.
        segments: stacks of layers of equal shape, or shared blocks.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, or None.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    def step(carry: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return apply_layer(config, layer, carry, mask), None

    step = jax.checkpoint(step, prevent_cse=False, policy=None if remat else keep_all_but_weights)
    for segment in segments:
        if isinstance(segment, Shared):
            order = jnp.asarray(segment.order, jnp.int32)
            shared_step = partial(_shared_step, step, segment)
            hidden, _ = jax.lax.scan(shared_step, hidden, order)
        else:
            hidden, _ = jax.lax.scan(step, hidden, segment)
    return hidden


def _shared_step(step, segment: Shared, carry: jax.Array, index: jax.Array):
    return step(carry, get_block(segment, index))


def head(config: ModelConfig, shell: Any, hidden: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` from the residual stream after the last block."""
    return jnp.dot(*head_operands(config, shell, hidden))


def head_operands(
    config: ModelConfig, shell: Any, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the head multiplies: its input `[B, T, E]` and its kernel `[E, V]`, in one dtype."""
    return config.family.head_operands(config, gather_over_data(shell), hidden)


@partial(jax.jit, static_argnames=("config", "remat"))
def forward(
    config: ModelConfig,
    params: Params,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """Logits of a model.

    Args:
        config: the model's configuration.
        params: its weights, or those of an emulator (`Emulator.assemble`).
        input_ids: `[B, T]`, T at most `max_position_embeddings`.
        attention_mask: `[B, T]`, 1 at real tokens and 0 at padding; None when all are real.
        remat: recompute blocks in the backward pass.

    Returns:
        `[B, T, V]`; rows at padding are meaningless.

    Raises:
        ValueError: when T exceeds the position table.
    """
    hidden = _run(config, params, input_ids, attention_mask, remat)
    return head(config, params.shell, hidden)


@partial(jax.jit, static_argnames=("config", "remat"))
def summed_loss(
    config: ModelConfig, params: Params, batch: Batch, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss in nats, summed over the counted targets, and their number.

    Logits of a whole batch are never there at once, see `gradot_jax.nn.loss`.
    """
    hidden = _run(config, params, batch.input_ids, batch.attention_mask, remat)
    weights = batch.loss_mask.astype(jnp.float32)
    operands = head_operands(config, params.shell, hidden)
    return cross_entropy(*operands, batch.targets, weights), weights.sum()


def _run(
    config: ModelConfig, params: Params, input_ids: jax.Array, mask: jax.Array | None, remat: bool
) -> jax.Array:
    """The residual stream after the last block, `[B, T, D]`."""
    if input_ids.ndim != 2 or input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids must be [B, T] with T <= {config.max_position_embeddings}, "
            f"got shape {input_ids.shape}"
        )
    hidden = embed(config, params.shell, input_ids, mask)
    return run_blocks(config, params.segments, hidden, mask, remat=remat)
