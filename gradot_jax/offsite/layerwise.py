"""A model taken layer by layer over all batches at once, one layer's weights on the devices.

Weights may lie in host memory, or in a mapped file, in the dtype in which they are stored; what
stays on the devices is the residual streams.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.curvature.sweep import ApplyLayer, Cotangents
from gradot_jax.errors import InputError
from gradot_jax.files.mapped import release_pages
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import apply_block, apply_layer, embed, head_operands
from gradot_jax.models.opt.params import Layer, Params, Shell, layers_at
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.loss import loss_cotangents
from gradot_jax.offsite.training import place, place_batch
from gradot_jax.parallel import DeviceMesh


class Streams(NamedTuple):
    """All batches of a pass, at one depth.

    Attributes:
        batches: S batches of equal shape, on the devices.
        hidden: their residual streams, `[S, B, T, D]`.
        mask: `[S, B, T]`, 1 at real tokens.
    """

    batches: list[Batch]
    hidden: jax.Array
    mask: jax.Array


class HeadSums(NamedTuple):
    """What the head yields over all batches.

    Attributes:
        loss: next-token loss, summed over the counted targets, nats.
        count: of those.
        cotangents: at the last layer's output.
    """

    loss: float
    count: float
    cotangents: Cotangents


def place_layer(params: Params, index: int, mesh: DeviceMesh | None) -> Layer:
    """One layer of a model on its devices, as it is stored; of a mapped file nothing is kept."""
    (layer,) = layers_at(params, [index])
    placed = place(layer, mesh)
    if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layer)):
        jax.block_until_ready(placed)
        release_pages(jax.tree.leaves(layer))
    return placed


def embed_batches(
    config: OPTConfig,
    shell: Shell,
    batches: Iterable[Batch],
    dtype: DTypeLike,
    mesh: DeviceMesh | None,
) -> Streams:
    """The streams before the first layer.

    Args:
        config: the model's configuration.
        shell: on the devices.
        batches: at least one, of equal shapes.
        dtype: of the arithmetic.
        mesh: devices to spread each batch over.

    Raises:
        InputError: for batches of unequal shapes.
    """
    batches = list(batches)
    shapes = sorted({tuple(batch.input_ids.shape) for batch in batches})
    if len(shapes) > 1:
        raise InputError(f"batches must have one shape, got {shapes}")
    placed = [place_batch(batch, mesh) for batch in batches]
    hidden = [_embed(config, shell, batch, jnp.dtype(dtype)) for batch in placed]
    return Streams(placed, jnp.stack(hidden), jnp.stack([b.attention_mask for b in placed]))


@partial(jax.jit, static_argnames=("config", "dtype"))
def _embed(config: OPTConfig, shell: Shell, batch: Batch, dtype) -> jax.Array:
    return embed(config, shell, batch.input_ids, batch.attention_mask, dtype)


@cache
def layer_function(config: OPTConfig) -> ApplyLayer:
    """One function object per configuration, so that a pass compiles once for equal shapes."""

    def apply(layer, hidden, mask, taps):
        if taps is None:
            return apply_layer(config, layer, hidden, mask)
        return apply_block(config, layer, hidden, mask, taps)

    return apply


def to_memory(hidden: jax.Array, kind: Literal["device", "pinned_host"]) -> jax.Array:
    """An array in the memory of the devices that it is on, or in that of their host."""
    return jax.device_put(hidden, hidden.sharding.with_memory_kind(kind))


def head_cotangents(
    shell: Shell,
    streams: Streams,
    *,
    sample: bool = False,
    true_too: bool = False,
    seed: int = 0,
) -> HeadSums:
    """Loss, and its cotangents, of streams after the last layer.

    Args:
        shell: on the devices.
        streams: after the last layer.
        sample: whether the Fisher's targets are drawn from the model instead of the text.
        true_too: whether cotangents of the loss on the text are wanted beside those.
        seed: of what is drawn.
    """
    true, sampled = [], []
    total = counted = 0.0
    for index, batch in enumerate(streams.batches):
        key = jax.random.fold_in(jax.random.key(seed), index) if sample else None
        loss, count, *cotangents = _head_of_batch(
            shell, streams.hidden[index], batch, key, true_too
        )
        true.append(cotangents[0])
        sampled.append(cotangents[1])
        total, counted = total + float(loss), counted + float(count)
    fisher = jnp.stack(sampled if sample else true)
    return HeadSums(total, counted, Cotangents(fisher, jnp.stack(true) if true_too else None))


@partial(jax.jit, static_argnames=("true_too",))
def _head_of_batch(shell: Shell, hidden: jax.Array, batch: Batch, key, true_too: bool):
    (rows, kernel), pull = jax.vjp(partial(head_operands, shell), hidden)
    weights = batch.loss_mask.astype(jnp.float32)
    sums = loss_cotangents(
        rows, kernel, batch.targets, weights, of_hidden=key is None or true_too, key=key
    )
    back = [
        None if c is None else pull((c, jnp.zeros_like(kernel)))[0]
        for c in (sums.hidden, sums.sampled)
    ]
    return sums.loss, weights.sum(), *back
