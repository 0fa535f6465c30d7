import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.curvature.factors import normalise, with_bias
from gradot_jax.curvature.tap import (
    InputMoments,
    tap_input,
    tap_output,
    zero_input_tap,
)
from gradot_jax.linalg.gram import gram, zero_gram
from gradot_jax.nn.linear import Dense

N, D_IN, D_OUT = 7, 4, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D_IN)).astype(np.float32)
G = RNG.normal(size=(N, D_OUT)).astype(np.float32)
W = RNG.normal(size=(D_IN, D_OUT)).astype(np.float32)
B = RNG.normal(size=(D_OUT,)).astype(np.float32)


def tapped_factors(x, g):
    def layer(dense, tap_in, tap_out):
        y = jnp.dot(tap_input(x, tap_in, None), dense.kernel)
        return tap_output(y + jnp.broadcast_to(dense.bias, y.shape), tap_out, None)

    taps = zero_input_tap(x.shape[-1]), zero_gram(g.shape[-1])
    gradient, inputs, outputs = jax.vjp(layer, Dense(W, B), *taps)[1](g)
    return normalise(inputs, outputs, gradient, len(x))


def test_factors_are_means_over_tokens(assert_close):
    factors = tapped_factors(X, G)
    x, g = X.astype(np.float64), G.astype(np.float64)
    assert_close(factors.input_covariance, x.T @ x / N, "float32")
    assert_close(factors.input_mean, x.mean(0), "float32")
    assert_close(factors.gradient_covariance, g.T @ g / N, "float32")
    assert_close(factors.gradient, Dense(x.T @ g / N, g.mean(0)), "float32")


def test_bias_is_a_constant_input_of_one(assert_close):
    ones = np.concatenate([X.astype(np.float64), np.ones((N, 1))], axis=1)
    assert_close(with_bias(tapped_factors(X, G)), ones.T @ ones / N, "float32")


def test_half_precision_gradient_is_normalised_in_float32():
    inputs = InputMoments(gram(jnp.ones((1, 2))), jnp.ones((2,)))
    outputs = gram(jnp.ones((1, 3)))
    gradient = Dense(jnp.full((2, 3), 60_000, jnp.float16), None)
    factors = normalise(inputs, outputs, gradient, 2)
    assert factors.gradient.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(factors.gradient.kernel, np.full((2, 3), 30_000))
    assert normalise(inputs, outputs, None, 2).gradient is None


def test_one_token_makes_the_kronecker_product_exact(assert_close):
    factors = tapped_factors(X[:1], G[:1])
    # Rows of Delta one after another: entry (i, o) of a matrix is entry i D_out + o of its vector.
    a, g = (np.asarray(f, np.float64) for f in (with_bias(factors), factors.gradient_covariance))
    per_sample = np.outer(np.append(X[0], 1.0), G[0]).reshape(-1)
    assert_close(np.kron(a, g), np.outer(per_sample, per_sample), "float32")
    delta = RNG.normal(size=(D_IN + 1, D_OUT))
    assert_close(np.kron(a, g) @ delta.reshape(-1), (a @ delta @ g).reshape(-1), "float64")


def test_factors_and_product_agree_with_kfac_jax(assert_close):
    with warnings.catch_warnings():
        # The library reads names that newer releases of JAX have moved.
        warnings.filterwarnings("ignore", "jax.core", DeprecationWarning)
        kfac_jax = pytest.importorskip("kfac_jax")
        from kfac_jax._src.layers_and_loss_tags import LayerData
        from kfac_jax._src.tracer import LayerVjpData

        y = X @ W + B
        tag = jax.make_jaxpr(kfac_jax.register_dense)(y, X, W, B).eqns[-1]
        block = kfac_jax.DenseTwoKroneckerFactored(tag)
        state = block.init(jax.random.key(0), None, None, False)
        data = LayerVjpData(
            primals=LayerData(inputs=(X,), outputs=(y,), params=(W, B)),
            tangents=LayerData(inputs=(X,), outputs=(G,), params=(W, B)),
        )
        state = block.update_curvature_matrix_estimate(state, data, 0.0, 1.0, 0.0, N)
        delta = [RNG.normal(size=shape).astype(np.float32) for shape in (W.shape, B.shape)]
        product = block.multiply(state, delta, 0.0, True, False)
    factors = tapped_factors(X, G)
    a, g = with_bias(factors), factors.gradient_covariance
    assert_close(a, state.factors[0].value, "float32")
    assert_close(g, state.factors[1].value, "float32")
    whole = np.concatenate([delta[0], delta[1][None]])
    theirs = np.concatenate([product[0], product[1][None]])
    assert_close(np.asarray(a) @ whole @ np.asarray(g), theirs, "float32")
