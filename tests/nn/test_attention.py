import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn import attention
from gradot_jax.nn.attention import causal_attention

B, T, D, H = 2, 7, 6, 3
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = RNG.normal(size=(3, B, T, D)).astype(np.float32)
WHOLE = np.ones((B, T), bool)
SIZES = {"one span": (128, 2**26), "spans": (3, 2**26), "spans in pieces": (4, 60)}
"""Least length of a span, and scores at once."""


@pytest.fixture(params=SIZES)
def cut(request, monkeypatch):
    span, scores = SIZES[request.param]
    monkeypatch.setattr(attention, "_MIN_SPAN", span)
    for name in ("MAX_SCORES", "_MAX_SCORES_CPU"):
        monkeypatch.setattr(attention, name, scores)


def with_holes(*holes):
    mask = WHOLE.copy()
    for hole in holes:
        mask[hole] = False
    return mask


def reference(mask, query=QUERY, key=KEY, value=VALUE):
    """One query and one head at a time, in float64."""
    width = D // H
    out = np.zeros((B, T, D))
    for b, t, h in np.ndindex(B, T, H):
        part = slice(h * width, (h + 1) * width)
        seen = [s for s in range(t + 1) if mask[b, s]]
        scores = key[b, seen, part].astype(np.float64) @ query[b, t, part] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, t, part] = weights / weights.sum() @ value[b, seen, part]
    return out


def plain(query, key, value, mask):
    """All scores at once."""
    query, key, value = (a.reshape(B, T, H, D // H) for a in (query, key, value))
    scores = jnp.einsum("BtHK,BsHK->BHts", query, key) * (D // H) ** -0.5
    visible = np.tril(np.ones((T, T), bool))[None, None] & mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHts,BsHK->BtHK", weights, value).reshape(B, T, D)


@pytest.mark.parametrize("holes", [(), ((0, 4), (0, 3)), ((1, 2),)])
@pytest.mark.usefixtures("cut")
def test_each_query_sees_the_real_tokens_up_to_itself(holes, assert_close):
    mask = with_holes(*holes)
    got = causal_attention(QUERY, KEY, VALUE, H, jnp.asarray(mask, jnp.float32) if holes else None)
    assert_close(got, reference(mask), "float32")


@pytest.mark.parametrize("holes", [(), ((0, 4), (1, 2))])
@pytest.mark.usefixtures("cut")
def test_gradients_are_those_of_attention_with_all_scores_kept(holes, assert_close):
    mask = with_holes(*holes)
    cotangent = RNG.normal(size=QUERY.shape).astype(np.float32)

    def pull(function):
        return jax.vjp(function, QUERY, KEY, VALUE)[1](cotangent)

    got = pull(lambda q, k, v: causal_attention(q, k, v, H, jnp.asarray(mask)))
    assert_close(got, pull(lambda q, k, v: plain(q, k, v, mask)), "float32")


@pytest.mark.usefixtures("cut")
def test_query_without_a_visible_key_attends_evenly_to_the_past_and_stays_finite(assert_close):
    mask = jnp.asarray(with_holes((0, slice(0, 2))))
    got, pull = jax.vjp(lambda *a: causal_attention(*a, H, mask), QUERY, KEY, VALUE)
    expected = np.stack([VALUE[0, 0], VALUE[0, :2].mean(0)])
    assert_close(np.asarray(got)[0, :2], expected, "float32")
    assert all(np.isfinite(leaf).all() for leaf in pull(jnp.ones_like(got)))


def test_huge_scores_stay_finite():
    got = causal_attention(1e4 * QUERY, 1e4 * KEY, VALUE, H, jnp.asarray(with_holes((0, 0))))
    assert np.isfinite(got).all()


def test_half_precision_softmax_is_taken_in_float32(assert_close):
    half = [jnp.asarray(a, jnp.bfloat16) for a in (QUERY, KEY, VALUE)]
    got = causal_attention(*half, H, None)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), reference(WHOLE), "bfloat16")


def test_backward_pass_keeps_queries_keys_and_values_alone():
    def function(q, k, v):
        return causal_attention(q, k, v, H, None)

    _, pull = jax.vjp(function, QUERY, KEY, VALUE)
    assert all(leaf.ndim < 4 or leaf.shape[2:] != (T, T) for leaf in jax.tree.leaves(pull))
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= 3 * QUERY.size + 2


def test_scores_of_a_long_sequence_are_never_there_at_once():
    long = jax.ShapeDtypeStruct((8, 2048, 64), jnp.float32)

    def scores_squared(q, k, v):
        return jnp.square(causal_attention(q, k, v, 8, None)).sum()

    compiled = jax.jit(jax.grad(scores_squared, argnums=(0, 1, 2))).lower(*[long] * 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 8 * 2048**2 * 4 / 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the GPU's default device is asked")
def test_flash_attention_of_gpus_is_not_asked_for_elsewhere():
    half = jnp.zeros((1, 128, 128), jnp.bfloat16)
    assert not attention._cudnn_takes(half, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_library_attention_is_called_so_that_it_means_the_same(masked, assert_close):
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    sizes = (2, 8, 2, 16)
    query, key, value = (jnp.asarray(RNG.normal(size=sizes), jnp.bfloat16) for _ in range(3))
    mask = jnp.ones((2, 8)).at[0, 5:].set(0).at[1, 3].set(0) if masked else None
    got = attention._library_attention(query, key, value, mask, implementation)
    flat = (a.astype(jnp.float32).reshape(2, 8, 32) for a in (query, key, value))
    assert_close(got.astype(jnp.float32), causal_attention(*flat, 2, mask), "bfloat16")
