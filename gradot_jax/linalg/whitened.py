"""Singular value decomposition in the norm of second moments: best approximation where it counts.

With `A = P P^T` and `G = Q Q^T`, the truncated SVD of `P^T W Q` yields the W' of rank R with the
least

    || P^T (W - W') Q ||_F^2  =  tr((W - W')^T A (W - W') G)

With A alone that is `E || x (W - W') ||^2` (SVD-LLM, Wang et al. 2024); with the Kronecker factors
A and G of a map it is the quadratic form of its KFAC curvature.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.linalg.decomposition import each
from gradot_jax.linalg.spread import over_devices
from gradot_jax.linalg.svd import SVD, check_finite, svd
from gradot_jax.parallel import DeviceMesh

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def whitened_svd(
    kernels: jax.Array | np.ndarray,
    input_moments: jax.Array,
    output_moments: jax.Array | None = None,
    *,
    damping: float,
    mesh: DeviceMesh | None = None,
) -> SVD:
    """Decomposes kernels in the norm of second moments of their inputs, and of their outputs.

    Args:
        kernels: W, `[N, D_in, D_out]`, any float dtype.
        input_moments: A, `[N, D_in, D_in]`.
        output_moments: G, `[N, D_out, D_out]`; None for the identity.
        damping: ridge on each moment, as a multiple of its mean diagonal.
        mesh: devices to spread N over; with several processes all of them call this.

    Returns:
        `W = left diag(values) right^T`, float32, where values fall and are singular values of
        `P^T W Q`. The columns of `left` are orthonormal in `A + ridge I`, those of `right` in
        `G + ridge I`; where a value vanishes they are zero.

    Raises:
        ValueError: when a matrix holds NaN or infinity.
    """
    count, d_in, d_out = kernels.shape
    chex.assert_shape(input_moments, (count, d_in, d_in))
    if output_moments is not None:
        chex.assert_shape(output_moments, (count, d_out, d_out))
    root = _root(input_moments, damping, mesh)
    right = None if output_moments is None else _root(output_moments, damping, mesh)
    rotated, whitened = over_devices(whiten, (kernels, root, right), mesh)
    decomposition = svd(whitened, mesh=mesh)
    return over_devices(map_back, Whitened(kernels, rotated, root, decomposition), mesh)


def _root(moments: jax.Array, damping: float, mesh: DeviceMesh | None) -> jax.Array:
    """P, checked; so it is there before any other decomposition begins."""
    root, finite = over_devices(decompose_moments, moments, mesh, damping)
    check_finite(finite, "second moment {} of {} to whiten with")
    return root


def whiten(batch) -> tuple[jax.Array, jax.Array]:
    """W Q and P^T W Q."""
    kernels, root, right = batch
    rotated = kernels.astype(jnp.float32)
    if right is not None:
        rotated = _matmul(rotated, right)
    return rotated, _matmul(jnp.swapaxes(root, 1, 2), rotated)


class Whitened(NamedTuple):
    """Kernels W, W Q, the root P of the inputs, and the decomposition of P^T W Q."""

    kernels: jax.Array
    rotated: jax.Array
    root: jax.Array
    decomposition: SVD


def map_back(whitened: Whitened) -> SVD:
    """Components of the kernels from those of `P^T W Q`."""
    # P^-T u = W Q v / s and Q^-T v = W^T P u / s need no inverse of an ill-conditioned root.
    u, s, v = whitened.decomposition
    noise = s[:, :1] * max(whitened.kernels.shape[1:]) * jnp.finfo(s.dtype).eps
    inverse = jnp.where(s > noise, 1 / jnp.where(s > noise, s, 1), 0)[:, None]
    left = _matmul(whitened.rotated, v) * inverse
    transposed = jnp.swapaxes(whitened.kernels.astype(jnp.float32), 1, 2)
    return SVD(left, s, _matmul(transposed, _matmul(whitened.root, u)) * inverse)


def decompose_moments(moments: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """P with `P P^T = A + ridge I`, `[N, D, D]`, and whether A is finite, `[N]`."""
    moments = moments.astype(jnp.float32)
    finite = jnp.isfinite(moments).all((-2, -1))
    # As in `svd`: given NaN, a decomposition may never return.
    moments = jnp.where(finite[:, None, None], moments, 0)
    mean = jnp.trace(moments, axis1=1, axis2=2) / moments.shape[1]
    ridge = damping * jnp.where(mean > 0, mean, 1)
    # Not Cholesky: rounding makes eigenvalues below the ridge negative, which here is harmless.
    values, vectors = each(jnp.linalg.eigh, moments)
    return vectors * jnp.sqrt(jnp.maximum(values, 0) + ridge[:, None])[:, None], finite
