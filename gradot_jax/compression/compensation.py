"""Compensation: letting what is kept stand in for what was removed.

Not part of the paper. On calibration inputs the refit lowers the gradient error of MLPs
markedly; it also makes the emulator a better model, and can lose what calibration never shows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_right, refit_rows
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel


def shift_bias(original: Dense, reduced: LowRank, factors: KroneckerFactors) -> LowRank:
    """Moves the bias by the mean of what was removed: `b + E[x] (W - left right)`.

    Args:
        original: kernel `[D_in, D_out]`, with a bias.
        reduced: its factors.
        factors: of the same map.
    """
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


def refit_channels(
    original: Dense, kept: np.ndarray, factors: KroneckerFactors, damping: float
) -> np.ndarray:
    """Least-squares refit of fc2's kept rows on the calibration activations, `refit_rows`.

    Args:
        original: fc2, kernel `[F, D]`.
        kept: indices of channels, `[C]`.
        factors: of fc2.
        damping: ridge towards the original weights, relative to the mean diagonal.

    Returns:
        Kernel `[C, D]`.
    """
    moment, kernel = np.asarray(factors.input_covariance), np.asarray(original.kernel)
    return refit_rows(moment, kernel, kept, damping).astype(original.kernel.dtype)
