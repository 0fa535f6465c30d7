"""Token batches: what every loss, sweep and evaluation consumes."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Token sequences with their next tokens.

    Attributes:
        input_ids: `[B, T]`.
        targets: `[B, T]`, the token that follows each input token.
        loss_mask: `[B, T]`, 1.0 where the target counts in the loss, else 0.0.
        attention_mask: `[B, T]`, 1 at real tokens and 0 at padding.
    """

    input_ids: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    attention_mask: jax.Array
