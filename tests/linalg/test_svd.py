import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg.svd import SVD, reconstruct, svd

module = importlib.import_module("gradot_jax.linalg.svd")

SHAPES = [(1, 1), (5, 1), (4, 6), (6, 3)]


def random(shape, count=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_product_equal_float64_numpy(shape, assert_close):
    w = random(shape)
    result = svd(jnp.asarray(w))
    assert_close(result.values, np.linalg.svd(w.astype(np.float64), compute_uv=False), "float32")
    u, s, v = (np.asarray(part, np.float64) for part in result)
    assert_close(np.einsum("nik,nk,nok->nio", u, s, v), w, "float32")
    assert_close(reconstruct(result), w, "float32")


@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_are_orthonormal_even_for_zero_and_rank_one(shape, assert_close):
    w = random(shape)
    w[0] = 0
    w[1] = np.outer(w[1, :, 0], w[1, 0])
    left, values, right = map(np.asarray, svd(jnp.asarray(w)))
    identity = np.stack([np.eye(min(shape))] * 3)
    assert_close(np.swapaxes(left, 1, 2) @ left, identity, "float32")
    assert_close(np.swapaxes(right, 1, 2) @ right, identity, "float32")
    assert not values[0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_is_canonical(shape, assert_close):
    w = jnp.asarray(random(shape))
    result, negated = svd(w), svd(-w)
    left = np.asarray(result.left)
    largest = np.take_along_axis(left, np.abs(left).argmax(1)[:, None], 1)
    assert (largest > 0).all()
    assert_close(negated, SVD(result.left, result.values, -result.right), "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_matrix_is_refused_by_its_index(bad):
    w = random((4, 3))
    w[1, 2, 0] = bad
    with pytest.raises(ValueError, match="matrix 1 of 3"):
        svd(jnp.asarray(w))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_decomposed_in_float32(dtype, assert_close):
    w = jnp.asarray(random((4, 6)), dtype)
    result = svd(w)
    assert all(part.dtype == jnp.float32 for part in result)
    assert_close(reconstruct(result), w.astype(jnp.float32), "float32")


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_out_of_range_do_not_spoil_the_decomposition(scale, assert_close):
    w = random((4, 6))
    assert_close(svd(jnp.asarray(w * np.float32(scale))).values / scale, svd(w).values, "float32")


def test_host_repairs_only_what_the_device_spoiled(monkeypatch, assert_close):
    w = jnp.asarray(random((4, 6)))
    expected, on_device = svd(w), module._svd_with_residual

    def spoil_the_second(matrices):
        result, residual = on_device(matrices)
        values = result.values.at[1].set(jnp.nan)
        return result._replace(values=values), residual.at[1].set(jnp.nan)

    monkeypatch.setattr(module, "_svd_with_residual", spoil_the_second)
    repaired = svd(w)
    assert_close(repaired, expected, "float32")
    for got, wanted in zip(repaired, expected, strict=True):
        np.testing.assert_array_equal(got[np.array([0, 2])], wanted[np.array([0, 2])])
