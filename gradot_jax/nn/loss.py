"""Next-token loss."""

import jax
import jax.numpy as jnp


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
