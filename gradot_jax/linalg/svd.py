"""Singular value decomposition of a batch of matrices, checked."""

from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.linalg.decomposition import Algorithm, decompose, default_algorithm
from gradot_jax.linalg.spread import home_of, host_device, over_devices
from gradot_jax.parallel import DeviceMesh, put, to_host

ERROR_LIMIT = 1e-4
"""Largest `Quality.error` that passes: a fifth of what storage in float16 rounds off a weight."""

_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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


class Quality(NamedTuple):
    """How far decompositions `W ~ U S V^T` can be trusted; `[...]` each.

    Attributes:
        residual: `|| W - U S V^T || / || W ||`, Frobenius.
        orthogonality: the largest entry of `| U^T U - I |` and `| V^T V - I |`.
    """

    residual: jax.Array
    orthogonality: jax.Array

    @property
    def error(self) -> jax.Array:
        """The worse of both; NaN where either is."""
        return jnp.maximum(self.residual, self.orthogonality)


def svd(
    matrices: jax.Array | np.ndarray,
    *,
    mesh: DeviceMesh | None = None,
    algorithm: Literal["auto"] | Algorithm = "auto",
) -> SVD:
    """Decomposes matrices in float32 on the device, or in float64 on the host where that fails.

    Signs are canonical: the entry of largest magnitude in each left vector is positive.
    Given a non-finite matrix a decomposition returns silent NaNs or, on a CPU, never returns; on
    an accelerator it may spoil one matrix of many. So input and result are checked.

    Args:
        matrices: `[N, D_in, D_out]`, any float dtype.
        mesh: devices to spread N over; with several processes all of them call this.
        algorithm: see `linalg.decomposition`; `auto` is the default of the platform.

    Returns:
        Factors in float32, whole on each device of the mesh.

    Raises:
        ValueError: when a matrix holds NaN or infinity.
    """
    chex.assert_rank(matrices, 3)
    if algorithm == "auto":
        home = home_of(matrices, mesh)
        algorithm = default_algorithm((host_device(home) or home).platform)
    result, found, finite = over_devices(decompose_all, matrices, mesh, algorithm)
    check_finite(finite, "matrix {} of {} to decompose")
    failed = np.flatnonzero(~(np.asarray(found.error) <= ERROR_LIMIT))
    if failed.size:
        repaired = _on_host(to_host(matrices)[failed])
        if mesh is not None:
            repaired = put(repaired, mesh.replicated)
        result = jax.tree.map(lambda full, part: full.at[failed].set(part), result, repaired)
    return result


def check_finite(finite: jax.Array, what: str) -> None:
    """Raises ValueError for the first that is false.

    Args:
        finite: `[N]`, whole on some device of this process.
        what: format of index and N.
    """
    finite = np.asarray(finite)
    if not finite.all():
        raise ValueError(f"{what.format(int(np.argmin(finite)), len(finite))} is not finite")


def quality(matrices: jax.Array, decomposition: SVD) -> Quality:
    """Compares decompositions with the matrices `[..., D_in, D_out]` that they are of."""
    scale = jnp.linalg.norm(matrices, axis=(-2, -1))
    lost = jnp.linalg.norm(matrices - reconstruct(decomposition), axis=(-2, -1))
    off = map(_non_orthogonality, (decomposition.left, decomposition.right))
    return Quality(lost / jnp.where(scale > 0, scale, 1), jnp.maximum(*off))


def reconstruct(decomposition: SVD) -> jax.Array:
    """The matrices `[..., D_in, D_out]` that decompositions stand for."""
    left = decomposition.left * decomposition.values[..., None, :]
    return _product("...ik,...ok->...io", left, decomposition.right)


def decompose_all(matrices: jax.Array, algorithm: Algorithm) -> tuple[SVD, Quality, jax.Array]:
    """Components `[N, ...]`, how good they are, and whether each matrix is finite, `[N]`."""
    matrices = matrices.astype(jnp.float32)
    finite = jnp.isfinite(matrices).all((-2, -1))
    matrices = jnp.where(finite[:, None, None], matrices, 0)
    result = _canonical(*decompose(matrices, algorithm))
    return result, quality(matrices, result), finite


def _canonical(u: jax.Array, s: jax.Array, v: jax.Array) -> SVD:
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(-2, keepdims=True), axis=-2)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(u.dtype)
    return SVD(u * sign, s, v * sign)


def _non_orthogonality(vectors: jax.Array) -> jax.Array:
    products = _product("...dj,...dk->...jk", vectors, vectors)
    identity = jnp.broadcast_to(jnp.eye(vectors.shape[-1], dtype=vectors.dtype), products.shape)
    return jnp.abs(products - identity).max((-2, -1))


def _on_host(matrices: np.ndarray) -> SVD:
    u, s, vt = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    parts = (np.asarray(part, np.float32) for part in (u, s, np.swapaxes(vt, -1, -2)))
    return jax.tree.map(np.asarray, _canonical(*map(jnp.asarray, parts)))
