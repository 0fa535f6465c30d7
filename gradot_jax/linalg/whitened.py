"""Singular value decomposition in the norm of second moments: best approximation where it counts.

With `A = P P^T` and `G = Q Q^T`, the truncated SVD of `P^T W Q` yields the W' of rank R with the
least

    || P^T (W - W') Q ||_F^2  =  tr((W - W')^T A (W - W') G)

With A alone that is `E || x (W - W') ||^2` (SVD-LLM, Wang et al. 2024); with the Kronecker factors
A and G of a map it is the quadratic form of its KFAC curvature.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.linalg.svd import SVD, svd

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def whitened_svd(
    kernels: jax.Array,
    input_moments: jax.Array,
    output_moments: jax.Array | None = None,
    *,
    damping: float,
) -> SVD:
    """Decomposes kernels in the norm of second moments of their inputs, and of their outputs.

    Args:
        kernels: W, `[N, D_in, D_out]`.
        input_moments: A, `[N, D_in, D_in]`.
        output_moments: G, `[N, D_out, D_out]`; None for the identity.
        damping: ridge on each moment, as a multiple of its mean diagonal.

    Returns:
        `W = left diag(values) right^T`, float32, where values fall and are singular values of
        `P^T W Q`. The columns of `left` are orthonormal in `A + ridge I`, those of `right` in
        `G + ridge I`; where a value vanishes they are zero.

    Raises:
        ValueError: when a matrix holds NaN or infinity.
    """
    count, d_in, d_out = kernels.shape
    chex.assert_shape(input_moments, (count, d_in, d_in))
    kernels = kernels.astype(jnp.float32)
    rotated = kernels
    if output_moments is not None:
        chex.assert_shape(output_moments, (count, d_out, d_out))
        rotated = _matmul(kernels, _root(_finite(output_moments), damping))
    root = _root(_finite(input_moments), damping)
    return _map_back(kernels, rotated, root, svd(_matmul(jnp.swapaxes(root, 1, 2), rotated)))


@jax.jit
def _map_back(kernels: jax.Array, rotated: jax.Array, root: jax.Array, decomposition: SVD) -> SVD:
    # P^-T u = W Q v / s and Q^-T v = W^T P u / s need no inverse of an ill-conditioned root.
    u, s, v = decomposition
    noise = s[:, :1] * max(kernels.shape[1:]) * jnp.finfo(s.dtype).eps
    inverse = jnp.where(s > noise, 1 / jnp.where(s > noise, s, 1), 0)[:, None]
    left = _matmul(rotated, v) * inverse
    right = _matmul(jnp.swapaxes(kernels, 1, 2), _matmul(root, u)) * inverse
    return SVD(left, s, right)


def _finite(moments: jax.Array) -> jax.Array:
    # As in `svd`: given NaN, a decomposition may never return.
    finite = np.asarray(jnp.isfinite(moments).all((-2, -1)))
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(f"second moment {index} of {len(finite)} to whiten with is not finite")
    return moments


@partial(jax.jit, static_argnames=("damping",))
def _root(moments: jax.Array, damping: float) -> jax.Array:
    """P with `P P^T = A + ridge I`, `[N, D, D]`."""
    moments = moments.astype(jnp.float32)
    mean = jnp.trace(moments, axis1=1, axis2=2) / moments.shape[1]
    ridge = damping * jnp.where(mean > 0, mean, 1)
    # Not Cholesky: rounding makes eigenvalues below the ridge negative, which here is harmless.
    values, vectors = jnp.linalg.eigh(moments)
    return vectors * jnp.sqrt(jnp.maximum(values, 0) + ridge[:, None])[:, None]
