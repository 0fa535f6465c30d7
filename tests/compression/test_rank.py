import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.rank import (
    cut_rank,
    factorise,
    keep_order,
    refit_low_rank,
    shift_bias,
)
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_right
from gradot_jax.linalg.svd import SVD, svd
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel

SCORES = jnp.array([1.0, 5.0, 3.0, 5.0, 0.0, 3.0, -1.0])
TOKENS, D_IN, D_OUT, RANK = 30, 6, 4, 2
CAP = 3
"""Of a map of 6 by 4: at rank 2.4 two factors have as many parameters."""
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(TOKENS, D_IN)) + 1).astype(np.float32)
ORIGINAL = Dense(*(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((D_IN, D_OUT), (D_OUT,))))
LEFT = jnp.asarray(RNG.normal(size=(D_IN, RANK)), jnp.float32)
REDUCED = LowRank(LEFT, jnp.asarray(RNG.normal(size=(RANK, D_OUT)), jnp.float32), ORIGINAL.bias)
FACTORS = KroneckerFactors(jnp.asarray(X.T @ X / TOKENS), jnp.asarray(X.mean(0)), None, None)


def outputs(weights):
    return X.astype(np.float64) @ np.asarray(dense_kernel(weights)) + np.asarray(weights.bias)


def decompose(kernel) -> SVD:
    return jax.tree.map(lambda part: part[0], svd(jnp.asarray(kernel, jnp.float32)[None]))


@pytest.mark.parametrize("floor", [0, 1, 3, 7])
def test_floor_comes_first_then_falling_score_with_ties_to_the_lower_index(floor):
    rest = sorted(range(floor, 7), key=lambda k: (-float(SCORES[k]), k))
    order = np.asarray(keep_order(SCORES, floor))
    np.testing.assert_array_equal(order[floor:], rest)
    np.testing.assert_array_equal(order[:floor], np.arange(floor))


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (6, 3)])
def test_factors_multiply_to_the_kept_components(shape, assert_close):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    single = decompose(w)
    u, s, v = (np.asarray(part, np.float64) for part in single)
    every = np.arange(min(shape))
    for kept in (every, every[::2], every[-1:]):
        left, right = factorise(single, kept)
        assert left.shape == (shape[0], len(kept)) and right.shape == (len(kept), shape[1])
        expected = sum(s[k] * np.outer(u[:, k], v[:, k]) for k in kept)
        assert_close(np.asarray(left, np.float64) @ np.asarray(right), expected, "float32")
        norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
        assert_close(norms[0], norms[1], "float32")
    assert_close(
        np.asarray(factorise(single, every)[0] @ factorise(single, every)[1]), w, "float32"
    )


@pytest.mark.parametrize("rank", [CAP, CAP + 1])
@pytest.mark.parametrize("compensation", ["none", "refit"])
def test_rank_from_break_even_on_keeps_the_original(rank, compensation):
    cut, kept = cut_rank(
        ORIGINAL, decompose(ORIGINAL.kernel), np.arange(4), rank, compensation=compensation
    )
    assert cut is ORIGINAL and kept is None


def test_components_below_break_even_are_kept_ascending(assert_close):
    order = np.array([3, 0, 2, 1])
    cut, kept = cut_rank(ORIGINAL, decompose(ORIGINAL.kernel), order, 2)
    assert isinstance(cut, LowRank) and cut.rank == 2 and kept == (0, 3)
    u, s, vt = np.linalg.svd(np.asarray(ORIGINAL.kernel, np.float64), full_matrices=False)
    assert_close(dense_kernel(cut), (u[:, [0, 3]] * s[[0, 3]]) @ vt[[0, 3]], "float32")
    np.testing.assert_array_equal(cut.bias, ORIGINAL.bias)


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_compensated_cut_is_nearer_to_the_original_on_its_inputs(compensation):
    def error(name):
        decomposition = decompose(ORIGINAL.kernel)
        options = {"compensation": name, "factors": FACTORS, "damping": 1e-6}
        cut, kept = cut_rank(ORIGINAL, decomposition, np.arange(4), 1, **options)
        assert kept == (0,)
        return np.square(outputs(cut) - outputs(ORIGINAL)).sum()

    assert error(compensation) < error("none")


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_compensation_without_factors_is_refused(compensation):
    with pytest.raises(ValueError, match=f"compensation '{compensation}' needs Kronecker factors"):
        cut_rank(ORIGINAL, decompose(ORIGINAL.kernel), np.arange(4), 1, compensation=compensation)


@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_half_precision(dtype, compensation):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), ORIGINAL)
    options = {"compensation": compensation, "factors": FACTORS, "damping": 1e-4}
    for rank in (2, CAP):
        cut, _ = cut_rank(half, decompose(half.kernel), np.arange(4), rank, **options)
        assert {leaf.dtype for leaf in jax.tree.leaves(cut)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("compensation", ["none", "refit"])
def test_a_cut_is_made_on_the_host(compensation):
    """Else every new rank would be a program to compile."""
    options = {"compensation": compensation, "factors": FACTORS, "damping": 1e-4}
    cut, _ = cut_rank(ORIGINAL, decompose(ORIGINAL.kernel), np.arange(4), 2, **options)
    assert all(isinstance(factor, np.ndarray) for factor in (cut.left, cut.right))


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
    assert refit.right.dtype == REDUCED.right.dtype
    np.testing.assert_array_equal(refit.left, LEFT)
    np.testing.assert_array_equal(refit.bias, ORIGINAL.bias)
