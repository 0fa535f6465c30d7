"""Normalisation over the last axis: layer norm and, without mean and bias, RMS norm.

    y = (x - mean) / sigma * scale + bias
    dx = (h - mean(h) - n mean(h n)) / sigma,   h = scale dy,   n = (x - mean) / sigma

and for the RMS norm, with `n = x / rms`,

    y = n * scale,   dx = (h - n mean(h n)) / rms

The derivative is written out because that needs nothing kept but x and two numbers per row.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

EPSILON = 1e-5


@flax.struct.dataclass
class LayerNorm:
    """Gain and shift of a layer norm, `[..., D]` each, or None when it has no parameters."""

    scale: jax.Array | None
    bias: jax.Array | None


@jax.custom_vjp
def layer_norm(weights: LayerNorm, x: jax.Array) -> jax.Array:
    """Normalises `x` `[..., D]` to zero mean and unit variance, in float32; keeps its dtype."""
    return _forward(weights, x)[0]


def _forward(weights: LayerNorm, x: jax.Array):
    h = x.astype(jnp.float32)
    mean = h.mean(-1, keepdims=True)
    h = h - mean
    inverse = jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + EPSILON)
    h = h * inverse
    if weights.scale is not None:
        h = h * _row(weights.scale, h)
    if weights.bias is not None:
        h = h + _row(weights.bias, h)
    return h.astype(x.dtype), (weights, x, mean, inverse)


def _backward(residual, cotangent: jax.Array):
    weights, x, mean, inverse = residual
    normal = (x.astype(jnp.float32) - mean) * inverse
    slope = cotangent.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    scale, bias = weights.scale, weights.bias
    gradient = LayerNorm(
        None if scale is None else (slope * normal).sum(rows).astype(scale.dtype),
        None if bias is None else slope.sum(rows).astype(bias.dtype),
    )
    if scale is not None:
        slope = slope * _row(scale, slope)
    along = (slope * normal).mean(-1, keepdims=True)
    slope = (slope - slope.mean(-1, keepdims=True) - normal * along) * inverse
    return gradient, slope.astype(x.dtype)


def _row(weights: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(weights.astype(jnp.float32), like.shape)


layer_norm.defvjp(_forward, _backward)


@flax.struct.dataclass
class RMSNorm:
    """Gain of an RMS norm (Zhang and Sennrich 2019), `[..., D]`."""

    scale: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(weights: RMSNorm, x: jax.Array, epsilon: float) -> jax.Array:
    """Divides `x` `[..., D]` by its root mean square, in float32; keeps its dtype.

    The quotient is rounded to that dtype before it is scaled, as Hugging Face does.
    """
    return _rms_forward(weights, x, epsilon)[0]


def _rms_forward(weights: RMSNorm, x: jax.Array, epsilon: float):
    h = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + epsilon)
    normal = (h * inverse).astype(x.dtype)
    return normal * jnp.broadcast_to(weights.scale, x.shape), (weights, x, inverse)


def _rms_backward(epsilon: float, residual, cotangent: jax.Array):
    del epsilon
    weights, x, inverse = residual
    normal, slope = x.astype(jnp.float32) * inverse, cotangent.astype(jnp.float32)
    gradient = (slope * normal).sum(tuple(range(x.ndim - 1))).astype(weights.scale.dtype)
    slope = slope * _row(weights.scale, slope)
    slope = (slope - normal * (slope * normal).mean(-1, keepdims=True)) * inverse
    return RMSNorm(gradient), slope.astype(x.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)
