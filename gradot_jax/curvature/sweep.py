"""One layer's steps of a calibration: forward, and back with factors, gradients and cotangents.

A sweep stores only the residual stream at layer boundaries and walks back layer by layer, so the
factors of one layer are alive at a time. The layer is an injected function; nothing here knows
a model. Weights may be stored in another dtype than the stream's, in which all is computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.linalg.summation import add, zero_sum
from gradot_jax.nn.dtypes import cast
from gradot_jax.parallel import spread_rows

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
