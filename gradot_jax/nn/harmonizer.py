"""Harmonizer: the small residual map that stands in for a whole layer (ScaleOT)."""

import flax.struct
import jax

from gradot_jax.nn.linear import Dense, linear


@flax.struct.dataclass
class Harmonizer:
    """`x + up(relu(down(x)))`, or a stack of such (a leading layer axis on each leaf).

    Attributes:
        down: `D -> R`.
        up: `R -> D`.
    """

    down: Dense
    up: Dense


def harmonize(weights: Harmonizer, hidden: jax.Array) -> jax.Array:
    """Applies a harmonizer to the residual stream `[B, T, D]`."""
    return hidden + linear(weights.up, jax.nn.relu(linear(weights.down, hidden)))
