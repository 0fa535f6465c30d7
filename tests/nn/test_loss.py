import jax.numpy as jnp
import numpy as np

from gradot_jax.nn.loss import token_log_likelihood

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 7)).astype(np.float32)
TARGETS = RNG.integers(0, 7, (2, 3))


def test_equals_the_log_of_the_softmax(assert_close):
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(p, TARGETS[..., None], -1)[..., 0])
    assert_close(token_log_likelihood(LOGITS, TARGETS), expected, "float32")


def test_shifted_and_huge_logits_stay_finite(assert_close):
    shifted = token_log_likelihood(LOGITS + 64, TARGETS)
    assert_close(shifted, token_log_likelihood(LOGITS, TARGETS), "float32_model")
    assert np.isfinite(token_log_likelihood(LOGITS * 1e30, TARGETS)).all()


def test_half_precision_logits_give_a_float32_loss():
    assert token_log_likelihood(jnp.asarray(LOGITS, jnp.bfloat16), TARGETS).dtype == jnp.float32
