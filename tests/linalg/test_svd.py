import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg.spread import over_devices
from gradot_jax.linalg.svd import SVD, decompose_all, quality, reconstruct, svd
from gradot_jax.parallel import make_mesh

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


@pytest.mark.parametrize("algorithm", ["svd", "polar", "gram"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_out_of_range_do_not_spoil_the_decomposition(scale, algorithm, assert_close):
    w = random((4, 6))
    scaled = svd(jnp.asarray(w * np.float32(scale)), algorithm=algorithm)
    assert_close(scaled.values / scale, svd(w).values, "float32")


@pytest.mark.parametrize("mesh_shape", [None, (2, 2)])
def test_host_repairs_only_what_the_device_spoiled(mesh_shape, monkeypatch, assert_close):
    w = jnp.asarray(random((4, 6)))
    mesh = None if mesh_shape is None else make_mesh(*mesh_shape)
    expected, honest = svd(w), module.over_devices

    def spoil_the_second(*arguments):
        result, quality, finite = honest(*arguments)
        values = result.values.at[1].set(jnp.nan)
        quality = quality._replace(residual=quality.residual.at[1].set(jnp.nan))
        return result._replace(values=values), quality, finite

    monkeypatch.setattr(module, "over_devices", spoil_the_second)
    repaired = svd(w, mesh=mesh)
    assert_close(repaired, expected, "float32")
    for got, wanted in zip(repaired, expected, strict=True):
        np.testing.assert_array_equal(got[np.array([0, 2])], wanted[np.array([0, 2])])


@pytest.mark.parametrize(
    ("count", "algorithm"), [(1, "svd"), (3, "polar"), (4, "gram"), (6, "svd")]
)
def test_over_devices_equals_on_one(count, algorithm):
    w = random((5, 4), count)
    expected, mesh = svd(w, algorithm=algorithm), make_mesh(2, 2)
    for matrices in (w, jnp.asarray(w), jax.device_put(w, mesh.sharding(None, None, "model"))):
        got = svd(matrices, mesh=mesh, algorithm=algorithm)
        assert all(part.sharding.is_fully_replicated for part in got)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_non_finite_matrix_is_refused_by_its_index_over_devices_too():
    w = random((4, 3))
    w[2, 0, 0] = np.nan
    with pytest.raises(ValueError, match="matrix 2 of 3"):
        svd(w, mesh=make_mesh(2, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_on_the_host_are_as_good_as_on_a_device(dtype):
    w = np.asarray(jnp.asarray(random((4, 6)), dtype))
    w.flags.writeable = False
    expected = svd(jnp.asarray(w))
    for mesh in (None, make_mesh(2, 2)):
        jax.tree.map(np.testing.assert_array_equal, svd(w, mesh=mesh), expected)


def test_quality_sees_what_is_wrong():
    w = jnp.asarray(random((4, 6), count=1))
    good = svd(w)
    assert quality(w, good).error[0] < 1e-6
    turned = good._replace(left=good.left[..., ::-1])
    assert quality(w, turned).residual[0] > 0.1 and quality(w, turned).orthogonality[0] < 1e-6
    # The product is right, the vectors are not.
    scaled = SVD(good.left * 1.1, good.values / 1.1, good.right)
    assert quality(w, scaled).residual[0] < 1e-6 and quality(w, scaled).orthogonality[0] > 0.1
    assert np.isnan(quality(w, good._replace(right=good.right * jnp.nan)).error[0])


def test_compiles_once_for_all_matrices_of_a_shape():
    program = chex.assert_max_traces(decompose_all, n=1)
    for seed in range(3):
        over_devices(program, random((7, 5), seed=seed), make_mesh(2, 2), "gram")
