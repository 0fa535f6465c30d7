import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.compensation import refit_channels, refit_low_rank, shift_bias
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_right, refit_rows
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel

TOKENS, D_IN, D_OUT, RANK = 30, 6, 4, 2
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(TOKENS, D_IN)) + 1).astype(np.float32)
ORIGINAL = Dense(*(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((D_IN, D_OUT), (D_OUT,))))
LEFT = jnp.asarray(RNG.normal(size=(D_IN, RANK)), jnp.float32)
REDUCED = LowRank(LEFT, jnp.asarray(RNG.normal(size=(RANK, D_OUT)), jnp.float32), ORIGINAL.bias)
FACTORS = KroneckerFactors(jnp.asarray(X.T @ X / TOKENS), jnp.asarray(X.mean(0)), None, None)


def outputs(weights):
    return X.astype(np.float64) @ np.asarray(dense_kernel(weights)) + np.asarray(weights.bias)


def test_shifted_bias_restores_the_mean_output(assert_close):
    shifted = shift_bias(ORIGINAL, REDUCED, FACTORS)
    assert_close(outputs(shifted).mean(0), outputs(ORIGINAL).mean(0), "float32")
    np.testing.assert_array_equal(shifted.right, REDUCED.right)


def test_refit_lowers_the_output_error_and_keeps_dtype_left_and_bias(assert_close):
    refit = refit_low_rank(ORIGINAL, REDUCED, FACTORS, 1e-6)
    error = [np.square(outputs(w) - outputs(ORIGINAL)).sum() for w in (refit, REDUCED)]
    assert error[0] < error[1]
    expected = refit_right(FACTORS.input_covariance, ORIGINAL.kernel, LEFT, 1e-6)
    assert_close(refit.right, expected, "float32")
    np.testing.assert_array_equal(refit.left, LEFT)
    np.testing.assert_array_equal(refit.bias, ORIGINAL.bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_channels_are_refitted_in_the_dtype_of_the_kernel(dtype, assert_close):
    kept, fc2 = np.array([0, 1, 4]), Dense(ORIGINAL.kernel.astype(dtype), None)
    got = refit_channels(fc2, kept, FACTORS, 1e-4)
    assert got.dtype == dtype
    moment, kernel = np.asarray(FACTORS.input_covariance), np.asarray(fc2.kernel, np.float64)
    expected = refit_rows(moment, kernel, kept, 1e-4)
    tolerance = "float32" if dtype == jnp.float32 else "bfloat16"
    assert_close(got.astype(jnp.float32), expected, tolerance)
