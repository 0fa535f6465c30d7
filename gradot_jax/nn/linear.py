"""Linear maps `y = x W + b`, dense or as two factors `W ~ left right`."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Dense:
    """A dense linear map.

    Attributes:
        kernel: `[..., D_in, D_out]`; leading axes, if any, stack layers.
        bias: `[..., D_out]`, or None.
    """

    kernel: jax.Array
    bias: jax.Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(D_in, D_out)` of the map."""
        return self.kernel.shape[-2], self.kernel.shape[-1]


@flax.struct.dataclass
class LowRank:
    """A linear map stored as two factors.

    Attributes:
        left: `[..., D_in, R]`.
        right: `[..., R, D_out]`.
        bias: `[..., D_out]`, or None.
    """

    left: jax.Array
    right: jax.Array
    bias: jax.Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(D_in, D_out)` of the map."""
        return self.left.shape[-2], self.right.shape[-1]

    @property
    def rank(self) -> int:
        """Number of components `R`."""
        return self.left.shape[-1]


Linear = Dense | LowRank


def linear(weights: Linear, x: jax.Array) -> jax.Array:
    """Applies a linear map to `x` `[..., D_in]`; returns `[..., D_out]`."""
    # Rows of tokens: the gradient of a kernel is then a product that no backend has to transpose.
    y = x.reshape(-1, x.shape[-1])
    if isinstance(weights, LowRank):
        y = jnp.dot(jnp.dot(y, weights.left), weights.right)
    else:
        y = jnp.dot(y, weights.kernel)
    y = y.reshape(*x.shape[:-1], -1)
    return y if weights.bias is None else y + jnp.broadcast_to(weights.bias, y.shape)


def dense_kernel(weights: Linear) -> jax.Array:
    """The kernel `[..., D_in, D_out]` that the map stands for, factors multiplied back."""
    if isinstance(weights, LowRank):
        return jnp.matmul(weights.left, weights.right, precision=jax.lax.Precision.HIGHEST)
    return weights.kernel
