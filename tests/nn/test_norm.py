import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn.norm import EPSILON, LayerNorm, layer_norm

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, (2, 3, 5)).astype(np.float32)
SCALE, BIAS = RNG.normal(size=(2, 5)).astype(np.float32)


@pytest.mark.parametrize(("scale", "bias"), [(SCALE, BIAS), (None, None)])
def test_equals_float64_numpy(scale, bias, assert_close):
    x = X.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    if scale is not None:
        expected = expected * scale + bias
    assert_close(layer_norm(LayerNorm(scale, bias), X), expected, "float32")


def test_constant_row_is_finite_and_equals_the_shift():
    got = layer_norm(LayerNorm(SCALE, BIAS), jnp.full((2, 5), 7.0))
    np.testing.assert_array_equal(got, np.stack([BIAS] * 2))


def test_half_precision_statistics_are_taken_in_float32(assert_close):
    # Squares of 1,000 overflow float16.
    x = (1000 * X).astype(np.float16)
    got = layer_norm(LayerNorm(jnp.float16(SCALE), jnp.float16(BIAS)), x)
    assert got.dtype == jnp.float16
    expected = layer_norm(LayerNorm(SCALE, BIAS), x.astype(np.float32))
    assert_close(got.astype(jnp.float32), expected, "bfloat16")
