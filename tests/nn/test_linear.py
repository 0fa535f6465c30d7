import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn.linear import Dense, LowRank, dense_kernel, linear

RNG = np.random.default_rng(0)
X, LEFT, RIGHT, BIAS = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (5, 2), (2, 4), (4,))
)
PRODUCT = LEFT.astype(np.float64) @ RIGHT


@pytest.mark.parametrize("bias", [None, BIAS])
def test_dense_and_low_rank_are_the_same_map(bias, assert_close):
    expected = X.astype(np.float64) @ PRODUCT + (0 if bias is None else bias)
    for weights in (Dense(PRODUCT.astype(np.float32), bias), LowRank(LEFT, RIGHT, bias)):
        assert_close(linear(weights, X), expected, "float32")
        assert_close(dense_kernel(weights), PRODUCT, "float32")
        assert weights.shape == (5, 4)
    assert LowRank(LEFT, RIGHT, None).rank == 2


def test_stacked_layers_keep_their_axis(assert_close):
    stack = LowRank(np.stack([LEFT] * 3), np.stack([RIGHT] * 3), None)
    assert stack.shape == (5, 4) and stack.rank == 2
    assert_close(dense_kernel(stack), np.stack([PRODUCT] * 3), "float32")


def test_half_precision_stays_half_precision():
    weights = Dense(jnp.ones((5, 4), jnp.bfloat16), jnp.ones((4,), jnp.bfloat16))
    assert linear(weights, jnp.ones((2, 5), jnp.bfloat16)).dtype == jnp.bfloat16


def test_leading_axes_of_any_number_are_kept(assert_close):
    x = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    weights = LowRank(LEFT, RIGHT, None)
    assert_close(linear(weights, x), x @ PRODUCT, "float32")
    assert linear(weights, x[0, 0, 0]).shape == (4,)
