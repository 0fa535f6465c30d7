"""Passes over all batches at once, one layer after the other, forward and back.

A pass stores the residual stream at layer boundaries only, and one layer's weights, factors and
gradient are on the devices at a time. Weights may lie in host memory, or in a mapped file, in the
dtype in which they are stored. The layer of a step is an injected function, so that steps know no
model.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.pages import release_pages
from gradot_jax.linalg.summation import add, zero_sum
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Layer, Params, layers_at
from gradot_jax.models.partition import place, place_batch
from gradot_jax.models.run import apply_layer, embed, head_operands
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.loss import loss_cotangents
from gradot_jax.parallel import DeviceMesh, spread_rows

ApplyLayer = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
"""`(weights, hidden [B, T, D], mask [B, T], taps) -> hidden [B, T, D]`; without taps for None."""


class Cotangents(NamedTuple):
    """Cotangents of the residual stream, per batch.

    Attributes:
        fisher: of the loss whose Fisher is taken, `[S, B, T, D]`.
        loss: of the loss on the true targets, the same shape; None where it is the same loss or
            no gradient is wanted.
    """

    fisher: jax.Array
    loss: jax.Array | None


class LayerSums(NamedTuple):
    """What one layer yields, summed over all tokens.

    Attributes:
        taps: cotangents of the taps: moments of inputs and `g^T g` of outputs; None without.
        gradient: of the loss with respect to the weights, float32; or None.
    """

    taps: Any
    gradient: Any | None


@partial(jax.jit, static_argnames=("apply",))
def forward_layer(apply: ApplyLayer, weights: Any, hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Outputs `[S, B, T, D]` of one layer over all batches; arguments as in `sweep_layer`."""
    return jax.lax.map(lambda batch: apply(weights, *batch, None), (hidden, mask))


@partial(jax.jit, static_argnames=("apply",))
def input_moments(
    apply: ApplyLayer, weights: Any, taps: Any, hidden: jax.Array, mask: jax.Array
) -> tuple[Any, jax.Array]:
    """Moments of one layer's tapped inputs, and its outputs, by a forward pass alone.

    Arguments as in `sweep_layer`; cotangents of taps that need one are zero.
    """

    def one_batch(running, batch):
        x, m = batch
        y, pull = jax.vjp(lambda t: apply(weights, x, m, t), taps)
        return add(running, spread_rows(pull(jnp.zeros_like(y))[0])), y

    running, hidden = jax.lax.scan(one_batch, zero_sum(taps), (hidden, mask))
    return running.total, hidden


@partial(jax.jit, static_argnames=("apply", "with_gradient"))
def sweep_layer(
    apply: ApplyLayer,
    weights: Any,
    taps: Any,
    hidden: jax.Array,
    mask: jax.Array,
    cotangents: Cotangents,
    *,
    with_gradient: bool,
) -> tuple[LayerSums, Cotangents]:
    """Factors of one layer over all batches, and the cotangents of its input.

    Args:
        apply: the layer; the same object each time, since it is a static argument.
        weights: its parameters.
        taps: zero taps that `apply` takes; None for a layer whose factors nobody reads.
        hidden: its inputs, `[S, B, T, D]` for S batches.
        mask: `[S, B, T]`, 1 at real tokens.
        cotangents: of its outputs.
        with_gradient: whether to take the gradient of the weights as well.

    Returns:
        Sums over batches and tokens, accumulated in float32 with compensation, and the
        cotangents of `hidden`.
    """
    weights = cast(weights, hidden.dtype)

    def one_batch(running, batch):
        x, m, cotangent = batch
        _, pull = jax.vjp(lambda w, h, t: apply(w, h, m, t), weights, x, taps)
        gradient, back, moments = pull(cotangent.fisher)
        loss_back = None
        if cotangent.loss is not None:
            gradient, loss_back, _ = pull(cotangent.loss)
        sums = LayerSums(spread_rows(moments), gradient if with_gradient else None)
        return add(running, cast(sums, jnp.float32)), Cotangents(back, loss_back)

    gradient = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    zeros = LayerSums(taps, gradient if with_gradient else None)
    running, cotangents = jax.lax.scan(one_batch, zero_sum(zeros), (hidden, mask, cotangents))
    return running.total, cotangents


class Streams(NamedTuple):
    """All batches of a pass, at one depth.

    Attributes:
        batches: S batches of equal shape, on the devices.
        hidden: their residual streams, `[S, B, T, D]`; None once they have moved on.
        mask: `[S, B, T]`, 1 at real tokens.
    """

    batches: list[Batch]
    hidden: jax.Array | None
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
    (layer,) = layers_at(params.segments, [index])
    placed = place(layer, mesh)
    if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layer)):
        jax.block_until_ready(placed)
        release_pages(jax.tree.leaves(layer))
    return placed


def embed_batches(
    config: ModelConfig,
    shell: Any,
    batches: Iterable[Batch],
    dtype: DTypeLike,
    mesh: DeviceMesh | None,
) -> Streams:
    """The streams before the first layer, of at least one batch; the shell is on the devices.

    Raises:
        InputError: for batches of unequal shapes.
    """
    batches = list(batches)
    shapes = sorted({tuple(batch.input_ids.shape) for batch in batches})
    if len(shapes) > 1:
        raise InputError(f"batches must have one shape, got {shapes}")
    placed = [place_batch(batch, mesh) for batch in batches]
    hidden = [embed_batch(config, shell, batch, jnp.dtype(dtype)) for batch in placed]
    return Streams(placed, jnp.stack(hidden), jnp.stack([b.attention_mask for b in placed]))


@partial(jax.jit, static_argnames=("config", "dtype"))
def embed_batch(config: ModelConfig, shell: Any, batch: Batch, dtype) -> jax.Array:
    """The stream before the first layer, `[B, T, D]`."""
    return embed(config, shell, batch.input_ids, batch.attention_mask, dtype)


def layer_function(
    config: ModelConfig, window: int | None = None, skip_positions: int = 0
) -> ApplyLayer:
    """One function object per arguments, so that a pass compiles once for each."""
    # A cache tells arguments by how they were written, and not by what they are.
    return _layer_function(config, window, skip_positions)


@cache
def _layer_function(config: ModelConfig, window: int | None, skip_positions: int) -> ApplyLayer:
    return partial(apply_layer, config, window=window, skip_positions=skip_positions)


def to_memory(hidden: jax.Array, kind: Literal["device", "pinned_host"]) -> jax.Array:
    """An array in the memory of the devices that it is on, or in that of their host."""
    return jax.device_put(hidden, hidden.sharding.with_memory_kind(kind))


def head_cotangents(
    config: ModelConfig,
    shell: Any,
    streams: Streams,
    *,
    sample: bool = False,
    true_too: bool = False,
    seed: int = 0,
) -> HeadSums:
    """Loss, and its cotangents, of streams after the last layer.

    Args:
        config: the model's configuration.
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
        (loss, count), (of_text, of_draw) = head_of_batch(
            config, shell, streams.hidden[index], batch, key, true_too
        )
        true.append(of_text)
        sampled.append(of_draw)
        total, counted = total + float(loss), counted + float(count)
    fisher = jnp.stack(sampled if sample else true)
    return HeadSums(total, counted, Cotangents(fisher, jnp.stack(true) if true_too else None))


@partial(jax.jit, static_argnames=("config", "true_too"))
def head_of_batch(
    config: ModelConfig, shell: Any, hidden: jax.Array, batch: Batch, key, true_too: bool
):
    """(loss, targets) of a batch, and cotangents of the text's and of drawn targets, or None."""
    (rows, kernel), pull = jax.vjp(partial(head_operands, config, shell), hidden)
    weights = batch.loss_mask.astype(jnp.float32)
    sums = loss_cotangents(
        rows, kernel, batch.targets, weights, of_hidden=key is None or true_too, key=key
    )
    back = [
        None if c is None else pull((c, jnp.zeros_like(kernel)))[0]
        for c in (sums.hidden, sums.sampled)
    ]
    return (sums.loss, weights.sum()), back
