import jax
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


@pytest.mark.parametrize(("scale", "bias"), [(SCALE, BIAS), (SCALE, None), (None, None)])
def test_gradients_equal_those_of_differentiation(scale, bias, assert_close):
    cotangent = RNG.normal(size=X.shape).astype(np.float32)

    def plain(weights, x):
        h = x - x.mean(-1, keepdims=True)
        h = h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + EPSILON)
        h = h if weights.scale is None else h * weights.scale[None, None]
        return h if weights.bias is None else h + weights.bias[None, None]

    weights = LayerNorm(scale, bias)
    got, expected = (jax.vjp(f, weights, X)[1](cotangent) for f in (layer_norm, plain))
    assert_close(got, expected, "float32")


def test_backward_pass_keeps_its_input_and_two_numbers_per_row():
    _, pull = jax.vjp(lambda x: layer_norm(LayerNorm(SCALE, BIAS), x), X)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == X.size + 2 * 2 * 3 + 2 * 5
