"""Layer normalisation over the last axis."""

import flax.struct
import jax
import jax.numpy as jnp

EPSILON = 1e-5


@flax.struct.dataclass
class LayerNorm:
    """Gain and shift of a layer norm, `[..., D]` each, or None when it has no parameters."""

    scale: jax.Array | None
    bias: jax.Array | None


def layer_norm(weights: LayerNorm, x: jax.Array) -> jax.Array:
    """Normalises `x` `[..., D]` to zero mean and unit variance, in float32; keeps its dtype."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + EPSILON)
    if weights.scale is not None:
        h = h * jnp.broadcast_to(weights.scale.astype(jnp.float32), h.shape)
    if weights.bias is not None:
        h = h + jnp.broadcast_to(weights.bias.astype(jnp.float32), h.shape)
    return h.astype(x.dtype)
