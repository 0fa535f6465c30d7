"""Causal multi-head attention between projected queries, keys and values."""

import jax
import jax.numpy as jnp


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, num_heads: int, mask: jax.Array | None
) -> jax.Array:
    """Softmax attention in which token t sees the unmasked tokens 0..t.

    The softmax is taken in float32. A query whose every key is masked (padding) attends evenly
    to all of them, so that it stays finite.

    Args:
        query: `[B, T, D]`, scaled here by `K^-1/2`.
        key: `[B, T, D]`.
        value: `[B, T, D]`.
        num_heads: H; D must be a multiple of it.
        mask: `[B, T]`, true at real tokens; None when all are.

    Returns:
        `[B, T, D]`.
    """
    batch, length, width = query.shape
    heads = (batch, length, num_heads, width // num_heads)
    query = query * (width // num_heads) ** -0.5
    query, key, value = (a.reshape(heads).swapaxes(1, 2) for a in (query, key, value))
    scores = jnp.einsum("BHtK,BHsK->BHts", query, key, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask is not None:
        visible = visible & mask.astype(bool)[:, None, None, :]
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("BHts,BHsK->BHtK", weights, value)
    return mixed.swapaxes(1, 2).reshape(batch, length, width)
