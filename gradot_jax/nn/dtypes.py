"""Which numbers are held in which dtype, decided here and nowhere else.

Weights keep the dtype in which they are *stored*. Arithmetic has the dtype of the residual
stream, float32 or bfloat16, which the embedding sets; a layer's weights are cast to it as the
layer is applied, so that no second copy of a model exists. Kronecker factors, scores,
decompositions, the weights that training updates and the state of its optimiser are float32:
sums over many tokens, small differences and updates of 1e-6 are lost in less.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """A tree of arrays in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def compute_dtype(stored: DTypeLike, asked: DTypeLike | None = None) -> jnp.dtype:
    """The dtype of arithmetic on stored weights.

    Args:
        stored: dtype of the weights.
        asked: what the caller wants; None for that of the weights, or float32 where they are
            float16, whose range gradients leave.
    """
    if asked is not None:
        return jnp.dtype(asked)
    stored = jnp.dtype(stored)
    return jnp.dtype(jnp.float32) if stored == jnp.float16 else stored
