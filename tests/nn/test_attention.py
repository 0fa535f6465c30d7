import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn.attention import causal_attention

B, T, D, H = 2, 5, 6, 3
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = RNG.normal(size=(3, B, T, D)).astype(np.float32)


def reference(mask):
    """One query and one head at a time, in float64."""
    width = D // H
    out = np.zeros((B, T, D))
    for b, t, h in np.ndindex(B, T, H):
        part = slice(h * width, (h + 1) * width)
        seen = [s for s in range(t + 1) if mask[b, s]]
        scores = KEY[b, seen, part].astype(np.float64) @ QUERY[b, t, part] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, t, part] = weights / weights.sum() @ VALUE[b, seen, part]
    return out


@pytest.mark.parametrize("holes", [(), ((0, 4), (0, 3)), ((1, 2),)])
def test_each_query_sees_the_real_tokens_up_to_itself(holes, assert_close):
    mask = np.ones((B, T), bool)
    for hole in holes:
        mask[hole] = False
    got = causal_attention(QUERY, KEY, VALUE, H, jnp.asarray(mask, jnp.float32) if holes else None)
    assert_close(got, reference(mask), "float32")


def test_query_without_a_visible_key_attends_evenly_and_stays_finite(assert_close):
    mask = np.ones((B, T))
    mask[0, :2] = 0
    got = np.asarray(causal_attention(QUERY, KEY, VALUE, H, jnp.asarray(mask)))
    assert_close(got[0, :2], np.stack([VALUE[0].mean(0)] * 2), "float32")


def test_half_precision_softmax_is_taken_in_float32(assert_close):
    half = [jnp.asarray(a, jnp.bfloat16) for a in (QUERY, KEY, VALUE)]
    got = causal_attention(*half, H, None)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), reference(np.ones((B, T), bool)), "bfloat16")
