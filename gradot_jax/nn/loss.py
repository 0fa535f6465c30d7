"""Next-token loss.

With `p` the softmax of the logits `z = h W` and `t` the target, a token's loss is
`logsumexp(z) - z_t` and its gradient `dz = p - onehot(t)`, `dh = dz W^T`, `dW = h^T dz`. So all
gradients can be had while the logits are there, and logits need not be there for all tokens at
once: they are the largest array of a language model by far.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

MAX_LOGITS = 2**25
"""Logits, in float32, that may be there at once."""

_MAX_LOGITS_CPU = 2**21
"""The same on CPU, whose caches hold no more."""

_MIN_TOKENS_CPU = 128
"""Tokens for which a CPU reads the head once, however many logits that is."""


class LossCotangents(NamedTuple):
    """The loss of a batch and its derivatives.

    Attributes:
        loss: nats, summed over tokens by their weights, float32.
        hidden: derivative of `loss`, `[B, T, E]`; None where not asked for.
        kernel: derivative of `loss`, `[E, V]`; None where not asked for.
        sampled: what `hidden` would be, were the targets drawn from the model; None likewise.
    """

    loss: jax.Array
    hidden: jax.Array | None
    kernel: jax.Array | None
    sampled: jax.Array | None


def token_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target.

    Args:
        logits: `[..., V]`.
        targets: `[...]` token ids.

    Returns:
        `[...]`, nats, float32.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@jax.custom_vjp
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Loss of a linear head in nats, summed over tokens by their weights, float32.

    Logits exist for `MAX_LOGITS / (B V)` positions at a time and are not kept. Where a gradient
    is taken, the forward pass computes it: of `hidden`, of `kernel`, or of both, as asked for.

    Args:
        hidden: `[B, T, E]`, what the head reads.
        kernel: `[E, V]`, of the same dtype.
        targets: `[B, T]` token ids.
        weights: `[B, T]`, not differentiated.
    """
    return loss_cotangents(hidden, kernel, targets, weights, of_hidden=False).loss


def _forward(hidden, kernel, targets, weights):
    if weights.perturbed:
        raise TypeError("cross_entropy is not differentiable in its weights")
    result = loss_cotangents(
        hidden.value,
        kernel.value,
        targets.value,
        weights.value,
        of_hidden=hidden.perturbed,
        of_kernel=kernel.perturbed,
    )
    return result.loss, (result.hidden, result.kernel)


def _backward(residual, cotangent: jax.Array):
    scaled = jax.tree.map(lambda leaf: (leaf * cotangent).astype(leaf.dtype), residual)
    return *scaled, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def loss_cotangents(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    of_hidden: bool = True,
    of_kernel: bool = False,
    key: jax.Array | None = None,
) -> LossCotangents:
    """The loss of a linear head and its derivatives, a few positions of each sequence at a time.

    Args:
        hidden: `[B, T, E]`, what the head reads.
        kernel: `[E, V]`, of the same dtype.
        targets: `[B, T]` token ids.
        weights: `[B, T]`, 0 where a token does not count.
        of_hidden: whether to give the derivative in `hidden`.
        of_kernel: whether to give that in `kernel`; it is summed in float32.
        key: where given, also that in `hidden` for targets drawn from the model's softmax, whose
            second moment is the Fisher information.
    """
    batch, length, width = hidden.shape
    chex.assert_shape(kernel, (width, None))
    chex.assert_shape([targets, weights], (batch, length))
    # Sequences are cut, not the batch, whose rows may lie on several devices.
    most = MAX_LOGITS
    if jax.default_backend() == "cpu":
        most = max(_MAX_LOGITS_CPU, _MIN_TOKENS_CPU * kernel.shape[1])
    pieces = min(math.ceil(batch * length * kernel.shape[1] / most), length)
    size = math.ceil(length / pieces)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, size * pieces - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, width)[:, :length]

    def step(sums, piece):
        part = _piece(kernel, *piece, of_hidden, of_kernel)
        sums = jax.tree.map(jnp.add, sums, (part.loss, part.kernel))
        return sums, (part.hidden, part.sampled)

    keys = None if key is None else jax.random.split(key, pieces)
    parts = (cut(hidden), cut(targets), cut(weights.astype(jnp.float32)), keys)
    zeros = (jnp.zeros(()), jnp.zeros(kernel.shape) if of_kernel else None)
    (loss, gradient), rows = jax.lax.scan(step, zeros, parts)
    rows, sampled = jax.tree.map(join, rows)
    gradient = None if gradient is None else gradient.astype(kernel.dtype)
    return LossCotangents(loss, rows, gradient, sampled)


def _piece(
    kernel: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    key: jax.Array | None,
    of_hidden: bool,
    of_kernel: bool,
) -> LossCotangents:
    """As `loss_cotangents`, on logits that are all there at once; `kernel` in float32."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)

    def slope(targets: jax.Array) -> jax.Array:
        expected = jax.nn.one_hot(targets, logits.shape[-1])
        return ((probabilities - expected) * weights[..., None]).astype(hidden.dtype)

    of_logits = slope(targets)
    of_weights = sampled = None
    if of_kernel:
        of_weights = jnp.einsum(
            "BTE,BTV->EV", hidden, of_logits, preferred_element_type=jnp.float32
        )
    if key is not None:
        sampled = jnp.dot(slope(jax.random.categorical(key, logits)), kernel.T)
    return LossCotangents(
        loss=-(token_log_likelihood(logits, targets) * weights).sum(),
        hidden=jnp.dot(of_logits, kernel.T) if of_hidden else None,
        kernel=of_weights,
        sampled=sampled,
    )
