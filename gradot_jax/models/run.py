"""The forward pass of a model, from token ids to logits and losses, as pure functions.

A `Params` may hold the original blocks, an emulator's, or any mixture.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.curvature.tap import BlockTaps, TappedMaps
from gradot_jax.models.family import ModelConfig, attention_windows
from gradot_jax.models.params import Layer, Params, Segment, Shared, depth, get_block, slice_places
from gradot_jax.models.partition import gather_over_data, keep_all_but_weights
from gradot_jax.nn.attention import causal_attention
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.harmonizer import Harmonizer, harmonize
from gradot_jax.nn.layout import Projected
from gradot_jax.nn.loss import cross_entropy
from gradot_jax.parallel import along_data


def embed(
    config: ModelConfig,
    shell: Any,
    input_ids: jax.Array,
    mask: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """The start of the residual stream, `[B, T, D]`; in `dtype` or the embedding's.

    Positions count the unmasked tokens so far, as Hugging Face's OPT does.
    """
    if mask is None:
        positions = jnp.arange(input_ids.shape[1])[None]
    else:
        mask = mask.astype(jnp.int32)
        positions = jnp.cumsum(mask, axis=1) * mask - 1
    return config.family.embed(config, gather_over_data(shell), input_ids, positions, dtype)


def apply_layer(
    config: ModelConfig,
    layer: Layer,
    hidden: jax.Array,
    mask: jax.Array | None = None,
    taps: BlockTaps | None = None,
    window: int | None = None,
    skip_positions: int = 0,
) -> jax.Array:
    """A decoder block, or what stands in its place, on the residual stream `[B, T, D]`.

    Args:
        config: the model's variant.
        layer: weights without a layer axis, in any dtype; that of `hidden` is computed in.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, or None when every token is real.
        taps: zeros whose cotangents are the block's Kronecker factors, summed over tokens.
        window: tokens that attention sees at most, see `ModelConfig.window`.
        skip_positions: first tokens of each sequence that the taps do not count.
    """

    def attend(projected: Projected) -> tuple[jax.Array, None]:
        return causal_attention(*projected, config.num_attention_heads, mask, window), None

    counted = counted_tokens(mask, skip_positions)
    return apply_with_attention(config, layer, hidden, attend, counted=counted, taps=taps)[0]


def counted_tokens(mask: jax.Array | None, skip_positions: int) -> jax.Array | None:
    """The mask `[..., T]` without the first real tokens of each sequence.

    Raises:
        ValueError: when some are to be left out and there is no mask.
    """
    if not skip_positions:
        return mask
    if mask is None:
        raise ValueError("skip_positions needs a mask")
    return mask * (jnp.cumsum(mask, axis=-1) > skip_positions).astype(mask.dtype)


def apply_with_attention(
    config: ModelConfig,
    layer: Layer,
    hidden: jax.Array,
    attend: Callable[[Projected], tuple[jax.Array, Any]],
    *,
    counted: jax.Array | None = None,
    taps: BlockTaps | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """As `apply_layer`, with an attention that gives `[B, T, H K]` and something to return.

    That is None where a layer has no attention. `counted` is `[B, T]`, 1 at the tokens that the
    taps count, or None for all; positions are `[B, T]`, or None for 0..T-1.
    """
    layer, hidden = gather_over_data(cast(layer, hidden.dtype)), along_data(hidden)
    if isinstance(layer, Harmonizer):
        return harmonize(layer, hidden), None
    maps = TappedMaps(layer, counted, taps)
    mixed, state = attend(config.family.project(config, maps, hidden, positions))
    return along_data(config.family.finish(config, maps, hidden, mixed)), state


def run_blocks(
    config: ModelConfig,
    segments: tuple[Segment, ...],
    hidden: jax.Array,
    mask: jax.Array | None = None,
    *,
    remat: bool = False,
    first: int = 0,
    num_layers: int | None = None,
) -> jax.Array:
    """All layers in depth order; `[B, T, D]` in and out.

    One `lax.scan` per segment, and per run of layers in it that attend alike.

    Args:
        config: the model's variant.
        segments: stacks of layers of equal shape, or shared blocks.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, or None.
        remat: recompute each block in the backward pass instead of keeping its activations.
        first: place of the first of them in the model.
        num_layers: of that model; None where these are the rest of it.
    """
    policy = None if remat else keep_all_but_weights
    for run, window in runs(config, segments, first, num_layers):

        def step(carry: jax.Array, layer: Layer, run=run, window=window):
            layer = get_block(run, layer) if isinstance(run, Shared) else layer
            return apply_layer(config, layer, carry, mask, window=window), None

        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        layers = jnp.asarray(run.order, jnp.int32) if isinstance(run, Shared) else run
        hidden, _ = jax.lax.scan(step, hidden, layers)
    return hidden


def runs(
    config: ModelConfig,
    segments: tuple[Segment, ...],
    first: int = 0,
    num_layers: int | None = None,
) -> list[tuple[Segment, int | None]]:
    """Runs of layers of equal shape that attend alike, each with its window; see `run_blocks`."""
    windows = attention_windows(config, num_layers or first + sum(map(depth, segments)))
    parts: list[tuple[Segment, int | None]] = []
    for segment in filter(depth, segments):
        size = depth(segment)
        own = windows[first : first + size]
        changes = [i for i in range(1, size) if own[i] != own[i - 1]]
        for start, stop in pairwise([0, *changes, size]):
            part = segment if stop - start == size else slice_places(segment, start, stop)
            parts.append((part, own[start]))
        first += size
    return parts


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
    hidden = last_hidden(config, params, input_ids, attention_mask, remat=remat)
    return head(config, params.shell, hidden)


@partial(jax.jit, static_argnames=("config", "remat"))
def summed_loss(
    config: ModelConfig, params: Params, batch: Batch, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss in nats, summed over the counted targets, and their number.

    Logits of a whole batch are never there at once, see `gradot_jax.nn.loss`.
    """
    hidden = last_hidden(config, params, batch.input_ids, batch.attention_mask, remat=remat)
    weights = batch.loss_mask.astype(jnp.float32)
    operands = head_operands(config, params.shell, hidden)
    return cross_entropy(*operands, batch.targets, weights), weights.sum()


def last_hidden(
    config: ModelConfig,
    params: Params,
    input_ids: jax.Array,
    mask: jax.Array | None,
    *,
    remat: bool = False,
) -> jax.Array:
    """The residual stream after the last block, `[B, T, D]`; see `forward`."""
    if input_ids.ndim != 2 or input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids must be [B, T] with T <= {config.max_position_embeddings}, "
            f"got shape {input_ids.shape}"
        )
    hidden = embed(config, params.shell, input_ids, mask)
    return run_blocks(config, params.segments, hidden, mask, remat=remat)
