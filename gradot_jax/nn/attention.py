"""Causal multi-head attention between projected queries, keys and values.

Scores are never kept: the backward pass makes them again from queries and keys. In half precision
on NVIDIA GPUs that is cuDNN's flash attention. Elsewhere queries are taken in a few spans, each
with the keys up to its end and no others, and a span whose scores would be large piece by piece.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gradot_jax.nn.platform import by_platform

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
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    mask: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention in which token t sees the unmasked tokens 0..t.

    The softmax is taken in float32. A query whose every key is masked (padding) attends evenly
    to those in sight, so that it stays finite. Which kernel runs is a matter of the devices that
    the arrays are on.

    Args:
        query: `[B, T, H K]`, scaled here by `K^-1/2`.
        key: `[B, T, G K]`.
        value: `[B, T, G K]`.
        num_heads: H, a multiple of G.
        mask: `[B, T]`, true at real tokens; None when all are.
        window: tokens that a query sees at most, itself the last; None for all before it.

    Returns:
        `[B, T, H K]`.
    """
    chex.assert_equal_shape([key, value])
    batch, length, width = query.shape
    if window is not None and window >= length:
        window = None

    def spans(most: int, query, key, value, mask) -> jax.Array:
        return _attention(query, key, value, mask, num_heads, window, most)

    def flash(query, key, value, mask) -> jax.Array:
        parts = (a.reshape(batch, length, -1, width // num_heads) for a in (query, key, value))
        return _library_attention(*parts, mask, window, "cudnn")

    choices = {}
    if _fits_cudnn(query, key, num_heads) and cudnn_is_there():
        choices["cuda"] = flash
    # Below that nothing is taken in pieces anywhere.
    if batch * num_heads * _span(length) * length > _MAX_SCORES_CPU:
        choices["cpu"] = partial(spans, _MAX_SCORES_CPU)
    return by_platform(partial(spans, MAX_SCORES), (query, key, value, mask), **choices)


def _span(length: int) -> int:
    return max(math.ceil(length / _SPANS), _MIN_SPAN)


def _attend_in_spans(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    num_heads: int,
    window: int | None,
    most: int,
) -> jax.Array:
    """As `causal_attention`, in any dtype and on any device, with `most` scores at once."""
    batch, length, width = query.shape
    size = width // num_heads
    groups = key.shape[-1] // size
    # Queries that see the same keys are rows of one product, token by token.
    scale = size**-0.5
    if query.dtype == jnp.float32:
        # Exact enough, and cheaper, before the product.
        query, scale = query * scale, 1.0
    query = query.reshape(batch, length, groups, -1, size).swapaxes(1, 2)
    query = query.reshape(batch, groups, -1, size)
    shared = num_heads // groups
    # Features before tokens: then no product, forward or back, has to transpose scores.
    key, value = (
        a.reshape(batch, length, groups, size).transpose(0, 2, 3, 1) for a in (key, value)
    )
    step = _span(length)
    spans = []
    for start in range(0, length, step):
        first = 0 if window is None else max(start - window + 1, 0)
        seen = slice(first, start + step)
        span = _Span(start - first, shared, window, scale)
        real = None if mask is None else mask[:, seen]
        queries = query[:, :, start * shared : (start + step) * shared]
        spans.append(_attend_span(queries, key[..., seen], value[..., seen], real, span, most))
    mixed = jnp.concatenate(spans, axis=2).reshape(batch, groups, length, -1)
    return mixed.swapaxes(1, 2).reshape(batch, length, width)


# A rule of its own, because a policy of rematerialisation around it would keep the scores.
_attention = jax.custom_vjp(_attend_in_spans, nondiff_argnums=(4, 5, 6))


def _forward(query, key, value, mask, *options):
    mixed = _attention(query, key, value, mask, *options)
    return mixed, (query, key, value, mask)


def _backward(num_heads: int, window: int | None, most: int, residual, cotangent: jax.Array):
    *operands, mask = residual
    batch, length, _ = cotangent.shape
    if batch * num_heads * length**2 > MAX_SCORES:
        # Else the compiler would see that the forward pass had these scores, and keep them.
        operands = jax.lax.optimization_barrier(operands)
    options = mask, num_heads, window, most
    _, pull = jax.vjp(lambda *qkv: _attend_in_spans(*qkv, *options), *operands)
    return *pull(cotangent), None


_attention.defvjp(_forward, _backward)


class _Span(NamedTuple):
    """Where the rows of some queries stand among the keys that they see.

    Attributes:
        first: number of the first row's token, counted from the first key.
        shared: rows of one token, of all heads that see the same keys.
        window: see `causal_attention`.
        scale: of the scores.
    """

    first: int
    shared: int
    window: int | None
    scale: float


def _attend_span(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    span: _Span,
    most: int,
) -> jax.Array:
    """As `_attend`, with at most so many scores at once."""
    batch, groups, rows, width = query.shape
    pieces = min(math.ceil(batch * groups * rows * key.shape[-1] / most), rows)
    if pieces == 1:
        return _attend(query, key, value, mask, 0, span)
    size = math.ceil(rows / pieces)
    query = jnp.pad(query, [(0, 0), (0, 0), (0, size * pieces - rows), (0, 0)])
    query = jnp.moveaxis(query.reshape(batch, groups, pieces, size, width), 2, 0)

    def attend(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(piece[0], key, value, mask, piece[1], span)

    mixed = jax.lax.map(attend, (query, size * jnp.arange(pieces)))
    return jnp.moveaxis(mixed, 0, 2).reshape(batch, groups, -1, width)[:, :, :rows]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    row: jax.Array | int,
    span: _Span,
) -> jax.Array:
    """Some rows of a span from `row` on, `[B, G, r, K]`, on keys and values `[B, G, K, s]`."""
    weights, total = _weights(query, key, mask, row, span)
    mixed = jnp.einsum(
        "BGrs,BGKs->BGrK", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(value.dtype)


def _attend_forward(*operands):
    return _attend(*operands), operands[:-1]


def _attend_backward(span: _Span, residual, cotangent: jax.Array):
    query, key, value, mask, row = residual
    weights, total = _weights(query, key, mask, row, span)
    weights /= total
    of_weights = jnp.einsum("BGrK,BGKs->BGrs", cotangent, value, preferred_element_type=jnp.float32)
    # The mean is of the very numbers that it is taken from: as the product of cotangent and
    # output it would be rounded otherwise, and what should cancel would not.
    mean = (weights * of_weights).sum(-1, keepdims=True)
    of_scores = (weights * (of_weights - mean) * span.scale).astype(query.dtype)
    return (
        jnp.einsum("BGrs,BGKs->BGrK", of_scores, key),
        jnp.einsum("BGrK,BGrs->BGKs", query, of_scores),
        jnp.einsum("BGrK,BGrs->BGKs", cotangent, weights.astype(value.dtype)),
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array | None, row, span: _Span):
    """Weights `[B, G, r, s]` in float32, and their sums, by which they are not yet divided."""
    scores = jnp.einsum("BGrK,BGKs->BGrs", query, key, preferred_element_type=jnp.float32)
    scores = scores * span.scale + _bias(query.shape[2], key.shape[3], mask, row, span)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _bias(rows: int, columns: int, mask: jax.Array | None, row, span: _Span) -> jax.Array:
    """What is added to scores, `[B or 1, 1, r, s]`: nothing, or what makes their weight zero."""
    tokens = span.first + (row + jnp.arange(rows)[:, None]) // span.shared
    # Rows that pad the last piece see a key, too, or their gradient would be 0 / 0.
    tokens = jnp.minimum(tokens, columns - 1)
    keys = jnp.arange(columns)[None]
    seen = tokens >= keys
    if span.window is not None:
        seen &= tokens - keys < span.window
    bias = jnp.where(seen, 0.0, -jnp.inf)[None, None]
    if mask is None:
        return bias
    # Finite, so that a row of padding alone is not 0 / 0, and larger than any score.
    return bias + jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None]


def cached_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    num_heads: int,
    position: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of one new token of each sequence on all tokens so far, its own among them.

    Args:
        query: `[B, 1, H K]`.
        keys: `[B, C, G K]`, that of token t at index t; what lies after the new one is not seen.
        values: likewise.
        num_heads: H.
        position: `[B]`, index of the new token.
        window: see `causal_attention`.

    Returns:
        `[B, 1, H K]`.
    """
    (batch, room, _), size = keys.shape, query.shape[-1] // num_heads
    keys, values = (a.reshape(batch, room, -1, size) for a in (keys, values))
    query = query.reshape(batch, keys.shape[2], -1, size)
    scores = jnp.einsum("BGMK,BCGK->BGMC", query, keys, preferred_element_type=jnp.float32)
    scores *= size**-0.5
    before = position[:, None] - jnp.arange(room)[None]
    seen = before >= 0 if window is None else (before >= 0) & (before < window)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("BGMC,BCGK->BGMK", weights.astype(values.dtype), values)
    return mixed.reshape(batch, 1, -1)


def cudnn_is_there() -> bool:
    """Whether this process has NVIDIA GPUs, all of them of a generation that cuDNN's runs on."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    # Ampere is the first.
    return all(float(device.compute_capability) >= 8 for device in devices)


def _fits_cudnn(query: jax.Array, key: jax.Array, num_heads: int) -> bool:
    """Whether cuDNN's flash attention takes queries and keys of this kind."""
    # Gradients with a mask need an even length, and no head may lie on two devices.
    width = query.shape[2] // num_heads
    splits = jax.typeof(query).sharding.mesh.shape.get("model", 1)
    half = query.dtype in (jnp.float16, jnp.bfloat16)
    fits = query.shape[1] % 2 == 0 and width % 8 == 0 and width <= 128
    return half and fits and key.shape[2] // width % splits == 0


def _library_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    window: int | None,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """JAX's own attention on `[B, T, H, K]` and `[B, T, G, K]`; returns `[B, T, H K]`."""
    batch, length = query.shape[:2]
    if mask is not None:
        mask = mask.astype(bool)[:, None, None, :]
        mask = jnp.broadcast_to(mask, (batch, 1, length, length))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        # Tokens to the left, without the query's own.
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return mixed.reshape(batch, length, -1)
