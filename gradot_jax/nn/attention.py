"""Causal multi-head attention between projected queries, keys and values.

Scores are never kept: the backward pass makes them again from queries and keys. In half precision
on NVIDIA GPUs that is cuDNN's flash attention. Elsewhere queries are taken in a few spans, each
with the keys up to its end and no others, and a span whose scores would be large piece by piece.
"""

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp

_SPANS = 8
"""Of a long sequence; n spans compute the share (n + 1) / 2n of all pairs."""

_MIN_SPAN = 128
"""Queries: what a shorter span leaves out does not pay for products as small as its own."""

MAX_SCORES = 2**26
"""Scores of a span, in float32, that may be there at once."""

_MAX_SCORES_CPU = 2**23
"""The same on CPU, where many small products cost no more than one large one that no cache holds,
and where spans, which wait for nothing, may run side by side."""


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, num_heads: int, mask: jax.Array | None
) -> jax.Array:
    """Softmax attention in which token t sees the unmasked tokens 0..t.

    The softmax is taken in float32. A query whose every key is masked (padding) attends evenly
    to tokens 0..t, so that it stays finite. Which kernel runs is decided as the function is
    traced, by the default device.

    Args:
        query: `[B, T, D]`, scaled here by `K^-1/2`.
        key: `[B, T, D]`.
        value: `[B, T, D]`.
        num_heads: H; D must be a multiple of it.
        mask: `[B, T]`, true at real tokens; None when all are.

    Returns:
        `[B, T, D]`.
    """
    chex.assert_equal_shape([query, key, value])
    batch, length, width = query.shape
    heads = (batch, length, num_heads, width // num_heads)
    if _cudnn_takes(query, num_heads):
        parts = (a.reshape(heads) for a in (query, key, value))
        return _library_attention(*parts, mask, "cudnn")
    return _attention(query, key, value, mask, num_heads)


def _attend_in_spans(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, num_heads: int
) -> jax.Array:
    """As `causal_attention`, in any dtype and on any device."""
    batch, length, width = query.shape
    heads = (batch, length, num_heads, width // num_heads)
    query = (query * heads[-1] ** -0.5).reshape(heads).swapaxes(1, 2)
    # Features before tokens: then no product, forward or back, has to transpose scores.
    key, value = (a.swapaxes(1, 2).reshape(batch, *heads[2:], length) for a in (key, value))
    size = max(math.ceil(length / _SPANS), _MIN_SPAN)
    spans = []
    for start in range(0, length, size):
        seen = slice(start + size)
        real = None if mask is None else mask[:, seen]
        queries = query[:, :, start : start + size]
        spans.append(_attend_span(queries, key[..., seen], value[..., seen], real, start))
    return jnp.concatenate(spans, axis=2).swapaxes(1, 2).reshape(batch, length, width)


# A rule of its own, because a policy of rematerialisation around it would keep the scores.
_attention = jax.custom_vjp(_attend_in_spans, nondiff_argnums=(4,))


def _forward(query, key, value, mask, num_heads: int):
    return _attention(query, key, value, mask, num_heads), (query, key, value, mask)


def _backward(num_heads: int, residual, cotangent: jax.Array):
    *operands, mask = residual
    batch, length, _ = cotangent.shape
    if batch * num_heads * length**2 > MAX_SCORES:
        # Else the compiler would see that the forward pass had these scores, and keep them.
        operands = jax.lax.optimization_barrier(operands)
    _, pull = jax.vjp(lambda *qkv: _attend_in_spans(*qkv, mask, num_heads), *operands)
    return *pull(cotangent), None


_attention.defvjp(_forward, _backward)


def _attend_span(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, first: int
) -> jax.Array:
    """As `_attend`, with at most `MAX_SCORES` scores at once."""
    batch, heads, rows, width = query.shape
    most = _MAX_SCORES_CPU if jax.default_backend() == "cpu" else MAX_SCORES
    pieces = min(math.ceil(batch * heads * rows * key.shape[-1] / most), rows)
    if pieces == 1:
        return _attend(query, key, value, mask, first)
    size = math.ceil(rows / pieces)
    query = jnp.pad(query, [(0, 0), (0, 0), (0, size * pieces - rows), (0, 0)])
    query = jnp.moveaxis(query.reshape(batch, heads, pieces, size, width), 2, 0)
    firsts = first + size * jnp.arange(pieces)

    def attend(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(piece[0], key, value, mask, piece[1])

    mixed = jax.lax.map(attend, (query, firsts))
    return jnp.moveaxis(mixed, 0, 2).reshape(batch, heads, -1, width)[:, :, :rows]


@jax.custom_vjp
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    first: jax.Array | int,
) -> jax.Array:
    """Queries of tokens first, first + 1, ... `[B, H, t, K]` on keys of tokens 0..s-1.

    Keys and values are `[B, H, K, s]`.
    """
    weights, total = _weights(query, key, mask, first)
    mixed = jnp.einsum(
        "BHts,BHKs->BHtK", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(value.dtype)


def _attend_forward(*operands):
    return _attend(*operands), operands


def _attend_backward(residual, cotangent: jax.Array):
    query, key, value, mask, first = residual
    weights, total = _weights(query, key, mask, first)
    weights /= total
    of_weights = jnp.einsum("BHtK,BHKs->BHts", cotangent, value, preferred_element_type=jnp.float32)
    # The mean is of the very numbers that it is taken from: as the product of cotangent and
    # output it would be rounded otherwise, and what should cancel would not.
    mean = (weights * of_weights).sum(-1, keepdims=True)
    of_scores = (weights * (of_weights - mean)).astype(query.dtype)
    return (
        jnp.einsum("BHts,BHKs->BHtK", of_scores, key),
        jnp.einsum("BHtK,BHts->BHKs", query, of_scores),
        jnp.einsum("BHtK,BHts->BHKs", cotangent, weights.astype(value.dtype)),
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array | None, first):
    """Weights `[B, H, t, s]` in float32, and their sums, by which they are not yet divided."""
    scores = jnp.einsum("BHtK,BHKs->BHts", query, key, preferred_element_type=jnp.float32)
    scores = scores + _bias(query.shape[2], key.shape[3], mask, first)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _bias(rows: int, columns: int, mask: jax.Array | None, first: jax.Array | int) -> jax.Array:
    """What is added to scores, `[B or 1, 1, t, s]`: nothing, or what makes their weight zero."""
    causal = first + jnp.arange(rows)[:, None] >= jnp.arange(columns)[None]
    bias = jnp.where(causal, 0.0, -jnp.inf)[None, None]
    if mask is None:
        return bias
    # Finite, so that a row of padding alone is not 0 / 0, and larger than any score.
    return bias + jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None]


def _cudnn_takes(query: jax.Array, num_heads: int) -> bool:
    """Whether cuDNN's flash attention is there and takes queries `[B, T, D]` of this kind."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    # Ampere is the first generation that it runs on.
    if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8:
        return False
    # Gradients with a mask need an even length, and no head may lie on two devices.
    width = query.shape[2] // num_heads
    splits = jax.typeof(query).sharding.mesh.shape.get("model", 1)
    half = query.dtype in (jnp.float16, jnp.bfloat16)
    fits = query.shape[1] % 2 == 0 and width % 8 == 0 and width <= 128
    return half and fits and num_heads % splits == 0


def _library_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """JAX's own attention on `[B, T, H, K]`; returns `[B, T, D]`."""
    batch, length = query.shape[:2]
    if mask is not None:
        mask = mask.astype(bool)[:, None, None, :]
        mask = jnp.broadcast_to(mask, (batch, 1, length, length))
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation=implementation
    )
    return mixed.reshape(batch, length, -1)
