import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg.gram import gram, symmetric, zero_gram

RNG = np.random.default_rng(0)
WIDTHS = (1, 5, 128, 129, 300, 1030)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_whole_matrix_is_the_product_of_transpose_and_rows(width, weighted, assert_close):
    x = RNG.normal(size=(7, width)).astype(np.float32)
    weights = np.array([1, 1, 0, 1, 0, 2, 1], np.float32) if weighted else np.ones(7)
    expected = (x.astype(np.float64) * weights[:, None]).T @ x.astype(np.float64)
    got = symmetric(gram(jnp.asarray(x), jnp.asarray(weights) if weighted else None))
    assert_close(got, expected, "float32")
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_has_the_shapes_of_a_gram_and_block_rows_tile_the_upper_half(width):
    zero = zero_gram(width)
    chex.assert_trees_all_equal_shapes_and_dtypes(zero, gram(jnp.ones((2, width))))
    assert sum(row.shape[0] for row in zero.rows) == width
    for start, row in zip(
        np.cumsum([0, *(r.shape[0] for r in zero.rows)]), zero.rows, strict=False
    ):
        assert row.shape[1] == width - start


def test_wide_matrices_cost_nine_sixteenths_of_the_whole():
    entries = sum(row.size for row in zero_gram(8192).rows)
    assert entries == 9 / 16 * 8192**2


def test_sums_of_grams_are_grams_of_all_rows(assert_close):
    x = RNG.normal(size=(2, 6, 200)).astype(np.float32)
    summed = jax.tree.map(jnp.add, gram(x[0]), gram(x[1]))
    assert_close(symmetric(summed), symmetric(gram(x.reshape(12, 200))), "float32")


def test_half_precision_is_multiplied_out_in_float32():
    got = symmetric(gram(jnp.ones((5_000, 3), jnp.bfloat16)))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full((3, 3), 5_000))
