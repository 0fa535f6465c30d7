"""DRD, dynamic rank decomposition: which singular components a map keeps, and the map cut to them.

GradOT, section 3.2. Cuts are made on the host: on a device each new rank would be a new program to
compile. Compensation, letting what is kept stand in for what was removed, is not in the paper.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import rank_pool
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_right
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.linear import Dense, Linear, LowRank, dense_kernel

RankCompensation = Literal["none", "bias", "refit"]


def keep_order(scores: jax.Array, floor: int) -> jax.Array:
    """Order in which candidates are kept: the first `floor`, then by falling score.

    Ties go to the lower index, so that the order is the same everywhere.

    Args:
        scores: `[K]`, larger is more worth keeping; candidates in order of falling singular value.
        floor: number always kept whatever their score.

    Returns:
        `[K]` int32, a permutation.
    """
    protected = jnp.arange(scores.shape[0]) < floor
    return jnp.argsort(jnp.where(protected, jnp.inf, scores), descending=True, stable=True)


def factorise(decomposition: SVD, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two factors from the kept components, each carrying the root of the singular values.

    Args:
        decomposition: of the kernel `[D_in, D_out]`.
        kept: indices of components, `[R]`.

    Returns:
        `left [D_in, R]` and `right [R, D_out]`.
    """
    u, s, v = map(np.asarray, decomposition)
    root = np.sqrt(s[kept])
    return u[:, kept] * root, np.ascontiguousarray(v.T[kept]) * root[:, None]


def cut_rank(
    original: Dense,
    decomposition: SVD,
    order: np.ndarray,
    rank: int,
    *,
    compensation: RankCompensation = "none",
    factors: KroneckerFactors | None = None,
    damping: float = 0.0,
) -> tuple[Linear, tuple[int, ...] | None]:
    """A map at its rank, and the components that it keeps.

    Args:
        original: kernel `[D_in, D_out]`.
        decomposition: of that kernel.
        order: its `keep_order`, `[K]`.
        rank: components to keep; from the rank where two factors save nothing the original
            matrix is kept.
        compensation: `bias` shifts the bias by the mean of what was removed, `refit` fits the right
            factor on the calibration inputs.
        factors: of the same map; read by a compensation only.
        damping: of the refit.

    Returns:
        The map, and ascending indices or None for the original.

    Raises:
        ValueError: for a compensation without factors.
    """
    if rank >= rank_pool(*original.shape).cap:
        return original, None
    kept = np.sort(order[:rank])
    reduced = LowRank(*factorise(decomposition, kept), original.bias)
    if compensation != "none":
        if factors is None:
            raise ValueError(f"compensation {compensation!r} needs Kronecker factors")
        if compensation == "bias":
            reduced = shift_bias(original, reduced, factors)
        else:
            reduced = refit_low_rank(original, reduced, factors, damping)
    left, right = (leaf.astype(original.kernel.dtype) for leaf in (reduced.left, reduced.right))
    bias = None if original.bias is None else reduced.bias.astype(original.bias.dtype)
    return LowRank(left, right, bias), tuple(map(int, kept))


def shift_bias(original: Dense, reduced: LowRank, factors: KroneckerFactors) -> LowRank:
    """Moves the bias by the mean of what was removed: `b + E[x] (W - left right)`."""
    lost = original.kernel.astype(jnp.float32) - dense_kernel(reduced)
    shift = jnp.dot(factors.input_mean, lost, precision=jax.lax.Precision.HIGHEST)
    return reduced.replace(bias=original.bias + shift)


def refit_low_rank(
    original: Dense, reduced: LowRank, factors: KroneckerFactors, damping: float
) -> LowRank:
    """Least-squares refit of the right factor on the calibration inputs, `refit_right`."""
    right = refit_right(
        np.asarray(factors.input_covariance),
        np.asarray(original.kernel),
        np.asarray(reduced.left),
        damping,
    )
    return reduced.replace(right=right.astype(reduced.right.dtype))
