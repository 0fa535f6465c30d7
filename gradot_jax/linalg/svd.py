"""Singular value decomposition of a batch of matrices, checked."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

_RESIDUAL_LIMIT = 1e-4


class SVD(NamedTuple):
    """`W = left diag(values) right^T`, with K = min(D_in, D_out).

    Attributes:
        left: `[..., D_in, K]`, orthonormal columns.
        values: `[..., K]`, falling, not negative.
        right: `[..., D_out, K]`, orthonormal columns.
    """

    left: jax.Array
    values: jax.Array
    right: jax.Array


def svd(matrices: jax.Array) -> SVD:
    """Decomposes matrices in float32 on the device, or in float64 on the host where that fails.

    Signs are canonical: the entry of largest magnitude in each left vector is positive.
    Given a non-finite matrix `jnp.linalg.svd` returns silent NaNs or, on a CPU, never returns; on
    an accelerator it may spoil one matrix of many. So input and result are checked.

    Args:
        matrices: `[N, D_in, D_out]`, any float dtype.

    Returns:
        Factors in float32.

    Raises:
        ValueError: when a matrix holds NaN or infinity.
    """
    chex.assert_rank(matrices, 3)
    matrices = matrices.astype(jnp.float32)
    finite = np.asarray(jnp.isfinite(matrices).all((-2, -1)))
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(f"matrix {index} of {len(finite)} to decompose is not finite")
    result, residual = _svd_with_residual(matrices)
    failed = np.flatnonzero(~(np.asarray(residual) <= _RESIDUAL_LIMIT))
    if failed.size:
        u, s, vt = np.linalg.svd(np.asarray(matrices, np.float64)[failed], full_matrices=False)
        host = _canonical(*(jnp.asarray(a, jnp.float32) for a in (u, s, vt)))
        result = SVD(*(full.at[failed].set(part) for full, part in zip(result, host, strict=True)))
    return result


@jax.jit
def _svd_with_residual(matrices: jax.Array) -> tuple[SVD, jax.Array]:
    result = _canonical(*jnp.linalg.svd(matrices, full_matrices=False))
    error = jnp.linalg.norm(matrices - reconstruct(result), axis=(-2, -1))
    scale = jnp.linalg.norm(matrices, axis=(-2, -1))
    return result, error / jnp.where(scale > 0, scale, 1)


def _canonical(u: jax.Array, s: jax.Array, vt: jax.Array) -> SVD:
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(-2)[..., None, :], axis=-2)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(u.dtype)
    return SVD(u * sign, s, jnp.swapaxes(vt, -1, -2) * sign)


def reconstruct(decomposition: SVD) -> jax.Array:
    """The matrices `[..., D_in, D_out]` that a decomposition stands for."""
    left = decomposition.left * decomposition.values[..., None, :]
    return jnp.einsum(
        "...ik,...ok->...io", left, decomposition.right, precision=jax.lax.Precision.HIGHEST
    )
