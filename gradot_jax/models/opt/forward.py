"""The forward pass of OPT, from token ids to logits and losses, as pure functions.

A `Params` may hold the original blocks, an emulator's, or any mixture: shapes are read from the
arrays, so low-rank maps and pruned MLPs need no configuration of their own.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.linalg.gram import Gram
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Block, Layer, Params, Segment, Shared, Shell, get_block
from gradot_jax.models.opt.partition import gather_over_data, keep_all_but_weights
from gradot_jax.nn.attention import causal_attention
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.harmonizer import Harmonizer, harmonize
from gradot_jax.nn.linear import linear
from gradot_jax.nn.loss import cross_entropy
from gradot_jax.nn.norm import layer_norm
from gradot_jax.nn.tap import (
    InputMoments,
    tap_input,
    tap_output,
    tap_removal,
    zero_input_tap,
    zero_output_tap,
    zero_removal_tap,
)
from gradot_jax.parallel import along_data

INPUT_OF_SITE = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "out_proj": "out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}
"""Which tapped input each site reads; q, k and v share one."""


class BlockTaps(NamedTuple):
    """Factor taps of one block.

    Attributes:
        inputs: per tapped input, see `INPUT_OF_SITE`.
        outputs: per site; None where only inputs are looked at.
        removals: of the hidden channels, at fc2's input; None where not asked for.
    """

    inputs: dict[str, InputMoments]
    outputs: dict[str, Gram] | None
    removals: Gram | None = None


def zero_taps(block: Block, *, with_outputs: bool = True, with_removals: bool = False) -> BlockTaps:
    """Taps that fit a single dense block; those of removals only when asked for."""
    inputs = {name: zero_input_tap(getattr(block, s).shape[0]) for s, name in INPUT_OF_SITE.items()}
    outputs = None
    if with_outputs:
        outputs = {site: zero_output_tap(getattr(block, site).shape[1]) for site in INPUT_OF_SITE}
    removals = zero_removal_tap(block.fc2.shape[0]) if with_removals else None
    return BlockTaps(inputs, outputs, removals)


def embed(
    config: OPTConfig,
    shell: Shell,
    input_ids: jax.Array,
    mask: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Token plus position embeddings `[B, T, D]`, the start of the residual stream.

    Positions count the unmasked tokens so far, as in Hugging Face; padding reads row 1. All that
    follows is computed in `dtype`, by default that of the stored embedding.
    """
    del config
    shell = gather_over_data(shell)
    dtype = shell.embed_tokens.dtype if dtype is None else dtype
    tokens = shell.embed_tokens[input_ids].astype(dtype)
    if shell.project_in is not None:
        tokens = linear(cast(shell.project_in, dtype), tokens)
    if mask is None:
        positions = jnp.arange(input_ids.shape[1])[None] + 2
    else:
        mask = mask.astype(jnp.int32)
        positions = jnp.cumsum(mask, axis=1) * mask + 1
    return tokens + shell.embed_positions[positions].astype(dtype)


def apply_block(
    config: OPTConfig,
    block: Block,
    hidden: jax.Array,
    mask: jax.Array | None = None,
    taps: BlockTaps | None = None,
) -> jax.Array:
    """One decoder block on the residual stream `[B, T, D]`.

    Args:
        config: the model's variant; its sizes are not read.
        block: weights without a layer axis, in any dtype; that of `hidden` is computed in.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, or None when every token is real.
        taps: zeros whose cotangents are the Kronecker factors, summed over tokens; None for none.
    """
    block = gather_over_data(cast(block, hidden.dtype))
    hidden = along_data(hidden)

    def read(name: str, x: jax.Array) -> jax.Array:
        return x if taps is None else tap_input(x, taps.inputs[name], mask)

    def apply(site: str, x: jax.Array) -> jax.Array:
        y = linear(getattr(block, site), x)
        return y if taps is None or taps.outputs is None else tap_output(y, taps.outputs[site])

    activation = jax.nn.relu if config.activation_function == "relu" else _gelu
    pre = config.do_layer_norm_before

    x = layer_norm(block.self_attn_layer_norm, hidden) if pre else hidden
    x = read("self_attn", x)
    heads = config.num_attention_heads
    x = causal_attention(apply("q_proj", x), apply("k_proj", x), apply("v_proj", x), heads, mask)
    hidden = hidden + apply("out_proj", read("out_proj", x))
    if not pre:
        hidden = layer_norm(block.self_attn_layer_norm, hidden)

    x = layer_norm(block.final_layer_norm, hidden) if pre else hidden
    x = activation(apply("fc1", read("fc1", x)))
    if taps is not None and taps.removals is not None:
        x = tap_removal(x, taps.removals, mask)
    hidden = hidden + apply("fc2", read("fc2", x))
    return along_data(hidden if pre else layer_norm(block.final_layer_norm, hidden))


_gelu = partial(jax.nn.gelu, approximate=False)


def apply_layer(
    config: OPTConfig, layer: Layer, hidden: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """A decoder block, or what stands in its place, on the residual stream `[B, T, D]`."""
    if isinstance(layer, Harmonizer):
        return harmonize(gather_over_data(layer), hidden)
    return apply_block(config, layer, hidden, mask)


def run_blocks(
    config: OPTConfig,
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


def head(config: OPTConfig, shell: Shell, hidden: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` from the residual stream after the last block."""
    del config
    return jnp.dot(*head_operands(shell, hidden))


def head_operands(shell: Shell, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the head multiplies: its input `[B, T, E]` and its kernel `[E, V]`, in one dtype.

    Args:
        shell: of the model, in any dtype.
        hidden: the residual stream after the last block, `[B, T, D]`.
    """
    shell = gather_over_data(shell)
    kernel = shell.embed_tokens.T if shell.lm_head is None else shell.lm_head
    dtype = hidden.dtype
    if shell.final_layer_norm is not None:
        hidden = layer_norm(cast(shell.final_layer_norm, dtype), hidden)
    if shell.project_out is not None:
        hidden = linear(cast(shell.project_out, dtype), hidden)
    return hidden, kernel.astype(dtype)


@partial(jax.jit, static_argnames=("config", "remat"))
def forward(
    config: OPTConfig,
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
    config: OPTConfig, params: Params, batch: Batch, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss in nats, summed over the counted targets, and their number.

    Logits of a whole batch are never there at once, see `gradot_jax.nn.loss`.
    """
    hidden = _run(config, params, batch.input_ids, batch.attention_mask, remat)
    weights = batch.loss_mask.astype(jnp.float32)
    operands = head_operands(params.shell, hidden)
    return cross_entropy(*operands, batch.targets, weights), weights.sum()


def _run(
    config: OPTConfig, params: Params, input_ids: jax.Array, mask: jax.Array | None, remat: bool
) -> jax.Array:
    """The residual stream after the last block, `[B, T, D]`."""
    if input_ids.ndim != 2 or input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids must be [B, T] with T <= {config.max_position_embeddings}, "
            f"got shape {input_ids.shape}"
        )
    hidden = embed(config, params.shell, input_ids, mask)
    return run_blocks(config, params.segments, hidden, mask, remat=remat)
