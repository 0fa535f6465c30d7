"""Next-token loss.

With `p` the softmax of the logits `z = h W` and `t` the target, a token's loss is
`logsumexp(z) - z_t` and its gradient `dz = p - onehot(t)`, `dh = dz W^T`, `dW = h^T dz`. So all
gradients can be had while the logits are there, and logits need not be there for all tokens at
once: they are the largest array of a language model by far.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gradot_jax.nn.platform import by_platform

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

    Positions that count go first, and pieces in which none does are skipped: of a prompt with its
    completion the head reads little more than the completion.

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

    def compute(weights, hidden, targets, key):
        part = _piece(kernel, hidden, targets, weights, key, of_hidden, of_kernel)
        return (part.loss, part.kernel), (part.hidden, part.sampled)

    weights = weights.astype(jnp.float32)
    sums, rows = _by_pieces(compute, weights, kernel.shape[1], (hidden, targets), key)
    loss, gradient = sums
    return LossCotangents(
        loss, rows[0], None if gradient is None else gradient.astype(kernel.dtype), rows[1]
    )


class TargetScores(NamedTuple):
    """Scores of each token; 0 and true where a token does not count.

    Attributes:
        log_likelihood: of the target, nats, `[B, T]`, float32.
        exact: whether the target is the most likely token, `[B, T]`.
    """

    log_likelihood: jax.Array
    exact: jax.Array


def target_scores(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, counted: jax.Array
) -> TargetScores:
    """What a linear head makes of targets, a few positions of each sequence at a time.

    Args:
        hidden: `[B, T, E]`, what the head reads.
        kernel: `[E, V]`, of the same dtype.
        targets: `[B, T]` token ids.
        counted: `[B, T]`, whether a token counts.
    """
    chex.assert_shape(kernel, (hidden.shape[2], None))
    chex.assert_shape([targets, counted], hidden.shape[:2])

    def compute(counted, hidden, targets, _):
        logits = jnp.dot(hidden, kernel)
        likelihood = jnp.where(counted, token_log_likelihood(logits, targets), 0.0)
        # Pieces that are skipped are zero: none of them is a miss.
        return (), (likelihood, counted & (logits.argmax(-1) != targets))

    _, rows = _by_pieces(compute, counted, kernel.shape[1], (hidden, targets), None)
    likelihood, missed = rows
    return TargetScores(likelihood, ~missed)


def _by_pieces(
    compute: Callable[..., tuple[Any, Any]],
    weights: jax.Array,
    vocab_size: int,
    arrays: tuple[jax.Array, ...],
    key: jax.Array | None,
) -> tuple[Any, Any]:
    """Sums and rows `[B, T, ...]` of what is computed for a few positions at a time.

    Args:
        compute: from weights, arrays and key of a piece to its sums and its rows, which are zero
            where no weight is set.
        weights: `[B, T]`.
        vocab_size: V.
        arrays: `[B, T, ...]`.
        key: split for the pieces, if there is one.
    """
    batch, length = weights.shape

    def pieces_of(most: int) -> int:
        # Sequences are cut, not the batch, whose rows may lie on several devices.
        return max(min(math.ceil(batch * length * vocab_size / most), length), 1)

    choices, pieces = {}, pieces_of(MAX_LOGITS)
    on_cpu = pieces_of(max(_MAX_LOGITS_CPU, _MIN_TOKENS_CPU * vocab_size))
    if on_cpu != pieces:
        choices["cpu"] = partial(_in_pieces, compute, on_cpu)
    return by_platform(partial(_in_pieces, compute, pieces), (weights, arrays, key), **choices)


def _in_pieces(
    compute: Callable[..., tuple[Any, Any]],
    pieces: int,
    weights: jax.Array,
    arrays: tuple[jax.Array, ...],
    key: jax.Array | None,
) -> tuple[Any, Any]:
    """As `_by_pieces`, in so many of them."""
    batch, length = weights.shape
    size = math.ceil(length / pieces)
    keys = None if key is None else jax.random.split(key, pieces)
    if pieces == 1:
        return compute(weights, *arrays, None if keys is None else keys[0])
    # Stable, so that a text stays as it is.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)

    def moved(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(batch, length, *[1] * (x.ndim - 2)), axis=1)

    def cut(x: jax.Array) -> jax.Array:
        x = moved(x, order)
        x = jnp.pad(x, [(0, 0), (0, size * pieces - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return moved(x.reshape(batch, -1, *x.shape[3:])[:, :length], back)

    def zeros(piece) -> Any:
        shapes = jax.eval_shape(lambda piece: compute(*piece), piece)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def step(sums, piece):
        counted = (piece[0] != 0).any()
        part, rows = jax.lax.cond(counted, lambda piece: compute(*piece), zeros, piece)
        return jax.tree.map(jnp.add, sums, part), rows

    parts = (cut(weights), *map(cut, arrays), keys)
    start, _ = zeros(jax.tree.map(lambda leaf: leaf[0], parts))
    sums, rows = jax.lax.scan(step, start, parts)
    return sums, jax.tree.map(join, rows)


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
