import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.calibration.passes import Cotangents, sweep_layer
from gradot_jax.curvature.tap import tap_input, tap_output, zero_input_tap
from gradot_jax.linalg.gram import symmetric, zero_gram
from gradot_jax.nn.linear import Dense, linear

S, B, T, D = 3, 4, 5, 4
RNG = np.random.default_rng(0)
WEIGHTS = Dense(*(RNG.normal(size=shape).astype(np.float32) for shape in ((D, D), (D,))))
HIDDEN, FISHER, LOSS = RNG.normal(size=(3, S, B, T, D)).astype(np.float32)
MASK = np.ones((S, B, T), np.float32)
TAPS = (zero_input_tap(D), zero_gram(D))


def dense_layer(weights, hidden, mask, taps):
    return tap_output(linear(weights, tap_input(hidden, taps[0], mask)), taps[1], mask)


def curved_layer(weights, hidden, mask, taps):
    return hidden + jnp.tanh(dense_layer(weights, hidden, mask, taps))


def sweep(apply, hidden, mask, cotangents, with_gradient=False, weights=WEIGHTS):
    return sweep_layer(apply, weights, TAPS, hidden, mask, cotangents, with_gradient=with_gradient)


def test_kfac_equals_fisher_for_linear_network(assert_close):
    # Square loss on y = x W V: the Fisher of W averages, over tokens and outputs o, the outer
    # product of vec(dy_o / dW). One sweep batch per output has that output's cotangent.
    outputs, tokens = 3, B * T
    v = RNG.normal(size=(D, outputs))
    x = HIDDEN[0].reshape(tokens, D).astype(np.float64)
    rows = [np.outer(token, v[:, o]).reshape(-1) for token in x for o in range(outputs)]
    fisher = sum(np.outer(row, row) for row in rows) / tokens

    hidden = np.broadcast_to(HIDDEN[0], (outputs, B, T, D))
    cotangent = np.broadcast_to(v.T[:, None, None].astype(np.float32), (outputs, B, T, D))
    sums, _ = sweep(dense_layer, hidden, MASK, Cotangents(cotangent, None))
    inputs, gradients = sums.taps
    a = np.asarray(symmetric(inputs.second), np.float64) / (outputs * tokens)
    assert_close(np.kron(a, np.asarray(symmetric(gradients)) / tokens), fisher, "float32")


def test_batches_and_one_large_batch_give_the_same_sums(assert_close):
    cotangents = Cotangents(FISHER, None)
    sums, back = sweep(curved_layer, HIDDEN, MASK, cotangents, with_gradient=True)
    whole = jax.tree.map(lambda a: a.reshape(1, S * B, *a.shape[2:]), (HIDDEN, MASK, cotangents))
    sums_whole, back_whole = sweep(curved_layer, *whole, with_gradient=True)
    assert_close(sums, sums_whole, "float32")
    assert_close(back.fisher.reshape(back_whole.fisher.shape), back_whole.fisher, "float32")


def test_gradients_and_cotangents_equal_those_of_the_plain_layer(assert_close):
    sums, back = sweep(curved_layer, HIDDEN, MASK, Cotangents(FISHER, None), with_gradient=True)

    def plain(weights, hidden):
        return jnp.vdot(hidden + jnp.tanh(linear(weights, hidden)), FISHER)

    gradient, hidden = jax.grad(plain, (0, 1))(WEIGHTS, HIDDEN)
    assert_close(sums.gradient, gradient, "float32")
    assert_close(back.fisher, hidden, "float32")
    assert back.loss is None


def test_sampled_targets_shape_the_factors_and_true_ones_the_gradient(assert_close):
    pair = Cotangents(FISHER, LOSS)
    sums, back = sweep(curved_layer, HIDDEN, MASK, pair, with_gradient=True)
    fisher, fisher_back = sweep(curved_layer, HIDDEN, MASK, Cotangents(FISHER, None))
    loss, loss_back = sweep(curved_layer, HIDDEN, MASK, Cotangents(LOSS, None), with_gradient=True)
    assert_close(sums.taps, fisher.taps, "float32")
    assert_close(sums.gradient, loss.gradient, "float32")
    assert_close(back, Cotangents(fisher_back.fisher, loss_back.fisher), "float32")
    assert fisher.gradient is None


def test_masked_tokens_are_not_counted(assert_close):
    mask = np.array(MASK)
    mask[1, :, 3:] = 0
    sums, _ = sweep(dense_layer, HIDDEN, mask, Cotangents(FISHER, None))
    rows = HIDDEN[mask > 0].astype(np.float64)
    second, first = sums.taps[0]
    assert_close((symmetric(second), first), (rows.T @ rows, rows.sum(0)), "float32")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_layers_yield_float32_sums(dtype, assert_close):
    half = jax.tree.map(lambda a: jnp.asarray(a, dtype), (WEIGHTS, HIDDEN, FISHER))
    weights, hidden, fisher = half
    cotangents = Cotangents(fisher, None)
    sums, back = sweep(curved_layer, hidden, MASK, cotangents, with_gradient=True, weights=weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    assert back.fisher.dtype == dtype
    exact, _ = sweep(curved_layer, HIDDEN, MASK, Cotangents(FISHER, None), with_gradient=True)
    assert_close(sums, exact, "bfloat16")


def test_layers_of_equal_shape_compile_once():
    traced = []

    def layer(weights, hidden, mask, taps):
        traced.append(hidden.shape)
        return curved_layer(weights, hidden, mask, taps)

    cotangents, counts = Cotangents(jnp.asarray(FISHER), jnp.asarray(LOSS)), []
    for weights in (WEIGHTS, Dense(2 * WEIGHTS.kernel, WEIGHTS.bias), WEIGHTS):
        _, cotangents = sweep(layer, jnp.asarray(HIDDEN), MASK, cotangents, True, weights)
        counts.append(len(traced))
    assert counts[0] == counts[-1]
