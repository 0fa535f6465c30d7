import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn.norm import EPSILON, LayerNorm, RMSNorm, layer_norm, rms_norm

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


def plain_rms(weights, x, epsilon):
    inverse = 1 / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * inverse * jnp.broadcast_to(weights.scale, x.shape)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_equals_float64_numpy(epsilon, assert_close):
    x = X.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * SCALE
    assert_close(rms_norm(RMSNorm(SCALE), X, epsilon), expected, "float32")


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 5), (2, 3, 2, 5)])
def test_rms_gradients_equal_those_of_differentiation(epsilon, shape, assert_close):
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(1.0, 2.0, (2, *shape)).astype(np.float32)

    @jax.jit
    def pull(x, cotangent):
        weights = RMSNorm(jnp.asarray(SCALE))
        return [
            jax.vjp(lambda w, x, f=f: f(w, x, epsilon), weights, x)[1](cotangent)
            for f in (rms_norm, plain_rms)
        ]

    assert_close(*pull(x, cotangent), "float32")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rms_quotient_is_rounded_before_it_is_scaled(dtype):
    rng = np.random.default_rng(2)
    x, scale = (jnp.asarray(rng.normal(size=size), dtype) for size in ((64, 32), (32,)))
    h = x.astype(jnp.float32)
    quotient = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
    rows = jnp.broadcast_to(scale, x.shape)
    got = rms_norm(RMSNorm(scale), x, 1e-6)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, quotient.astype(dtype) * rows)
    # Rounded once, and not twice, one number in four would be another.
    once = (quotient * rows.astype(jnp.float32)).astype(dtype)
    assert (got != once).mean() > 0.1


def test_rms_statistics_of_half_precision_are_taken_in_float32(assert_close):
    x, scale = (1000 * X).astype(np.float16), np.float16(SCALE)
    got, pull = jax.vjp(lambda x: rms_norm(RMSNorm(scale), x, 1e-6), x)
    assert got.dtype == pull(got)[0].dtype == jnp.float16
    exact, back = jax.vjp(lambda x: rms_norm(RMSNorm(np.float32(scale)), x, 1e-6), np.float32(x))
    assert_close(got.astype(jnp.float32), exact, "bfloat16")
    assert_close(pull(got)[0].astype(jnp.float32) * 1000, back(exact)[0] * 1000, "bfloat16")


def test_rms_norm_of_zeros_and_its_gradient_are_finite():
    zeros = jnp.zeros((2, 5))
    got, pull = jax.vjp(lambda w, x: rms_norm(w, x, 1e-6), RMSNorm(SCALE), zeros)
    np.testing.assert_array_equal(got, zeros)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pull(jnp.ones_like(got))))


def test_backward_pass_of_rms_norm_keeps_its_input_and_a_number_per_row():
    _, pull = jax.vjp(lambda x: rms_norm(RMSNorm(SCALE), x, 1e-6), X)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == X.size + 2 * 3 + 5
