from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from gradot_jax.nn import attention
from gradot_jax.nn.attention import cached_attention, causal_attention
from gradot_jax.parallel import make_mesh

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


def reference(mask, query=QUERY, key=KEY, value=VALUE, *, heads=H, window=None, cotangent=None):
    """One query and one head at a time, in float64.

    Keys and values are of as many heads as queries. Given the output's cotangent, the cotangents
    of query, key and value are returned too.
    """
    query, key, value = (a.astype(np.float64) for a in (query, key, value))
    width = query.shape[-1] // heads
    out, *back = (np.zeros(query.shape) for _ in range(4))
    for b, t, h in np.ndindex(B, T, heads):
        part = slice(h * width, (h + 1) * width)
        first = 0 if window is None else max(t - window + 1, 0)
        seen = [s for s in range(first, t + 1) if mask[b, s]]
        q, k, v = query[b, t, part] / np.sqrt(width), key[b, seen, part], value[b, seen, part]
        weights = np.exp(k @ q - (k @ q).max())
        weights /= weights.sum()
        out[b, t, part] = weights @ v
        if cotangent is not None:
            g = cotangent[b, t, part].astype(np.float64)
            slope = weights * (v @ g - weights @ (v @ g))
            back[0][b, t, part] += slope @ k / np.sqrt(width)
            back[1][b, seen, part] += np.outer(slope, q)
            back[2][b, seen, part] += np.outer(weights, g)
    return out if cotangent is None else (out, *back)


def grouped(groups, shared, width=3):
    """Queries of `groups * shared` heads, keys and values of `groups`, and a cotangent."""
    rng = np.random.default_rng(groups)
    sizes = [groups * shared, groups, groups, groups * shared]
    return [rng.normal(size=(B, T, n * width)).astype(np.float32) for n in sizes]


def repeated(array, groups, shared):
    """Keys or values with each head as often as queries share it."""
    return np.repeat(array.reshape(B, T, groups, -1), shared, axis=2).reshape(B, T, -1)


def summed(array, groups, shared):
    """The cotangent of what `repeated` repeats."""
    return array.reshape(B, T, groups, shared, -1).sum(3).reshape(B, T, -1)


def reference_of_groups(operands, groups, shared, mask, window=None):
    """The output and the cotangents of query, key and value, of keys that are repeated."""
    query, key, value, cotangent = operands
    key, value = (repeated(a, groups, shared) for a in (key, value))
    options = {"heads": groups * shared, "window": window, "cotangent": cotangent}
    out, *back = reference(mask, query, key, value, **options)
    return out, (back[0], *(summed(a, groups, shared) for a in back[1:]))


def output_and_pull(operands, heads, mask, window=None):
    def run(query, key, value, cotangent):
        attend = partial(causal_attention, num_heads=heads, mask=mask, window=window)
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(cotangent)

    return jax.jit(run)(*operands)


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


@pytest.mark.parametrize("holes", [(), ((0, 4), (1, 2))])
@pytest.mark.parametrize(("groups", "shared"), [(1, 3), (2, 2)])
@pytest.mark.usefixtures("cut")
def test_grouped_queries_attend_as_if_their_keys_were_repeated(holes, groups, shared, assert_close):
    operands, mask = grouped(groups, shared), with_holes(*holes)
    got = output_and_pull(operands, groups * shared, jnp.asarray(mask) if holes else None)
    assert_close(got, reference_of_groups(operands, groups, shared, mask), "float32")


@pytest.mark.parametrize("holes", [(), ((0, 4), (1, 2))])
@pytest.mark.parametrize(("groups", "shared", "window"), [(2, 1, 3), (2, 2, 2), (2, 2, 5)])
@pytest.mark.usefixtures("cut")
def test_a_window_ends_with_the_query_and_hides_what_is_before(
    holes, groups, shared, window, assert_close
):
    operands, mask = grouped(groups, shared), with_holes(*holes)
    got = output_and_pull(operands, groups * shared, jnp.asarray(mask) if holes else None, window)
    assert_close(got, reference_of_groups(operands, groups, shared, mask, window), "float32")


@pytest.mark.usefixtures("cut")
def test_a_window_of_one_token_gives_its_value():
    operands = grouped(2, 2)
    out, pulled = output_and_pull(operands, 4, None, 1)
    np.testing.assert_array_equal(out, repeated(operands[2], 2, 2))
    for of_scores in pulled[:2]:
        np.testing.assert_array_equal(of_scores, np.zeros_like(of_scores))
    np.testing.assert_allclose(pulled[2], summed(operands[3], 2, 2), rtol=1e-6)


@pytest.mark.parametrize("window", [T, T + 1, 10**9])
@pytest.mark.usefixtures("cut")
def test_a_window_as_long_as_the_sequence_is_none(window):
    got, expected = (causal_attention(QUERY, KEY, VALUE, H, None, w) for w in (window, None))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.usefixtures("cut")
def test_query_whose_window_is_padding_attends_evenly_to_its_window(assert_close):
    mask = jnp.asarray(with_holes((0, slice(0, 4))))
    got, pulled = output_and_pull((QUERY, KEY, VALUE, QUERY), H, mask, 2)
    expected = np.stack([VALUE[0, 0], *(VALUE[0, t - 1 : t + 1].mean(0) for t in (1, 2, 3))])
    assert_close(np.asarray(got)[0, :4], expected, "float32")
    np.testing.assert_array_equal(got[0, 4], VALUE[0, 4])
    assert all(np.isfinite(leaf).all() for leaf in pulled)


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


def lowered(platform, dtype=jnp.bfloat16, mesh=None):
    """The program of attention and its gradient for a platform, from this process."""
    sharding = None if mesh is None else mesh.batched
    long = jax.ShapeDtypeStruct((8, 2048, 512), dtype, sharding=sharding)

    def scores_squared(q, k, v):
        return jnp.square(causal_attention(q, k, v, 8, None).astype(jnp.float32)).sum()

    traced = jax.jit(jax.grad(scores_squared, argnums=(0, 1, 2))).trace(*[long] * 3)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def with_cudnn(monkeypatch):
    """A process that has cuDNN and GPUs that it runs on, as far as it is asked while tracing."""
    monkeypatch.setattr(attention, "cudnn_is_there", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


def test_each_platform_has_the_attention_that_is_for_it(with_cudnn):
    programs = {platform: lowered(platform) for platform in ("cpu", "cuda", "tpu")}
    assert [name for name, text in programs.items() if "__cudnn$fmha" in text] == ["cuda"]
    # 2^25 scores of the largest span: there at once on a TPU, and in four pieces on a CPU.
    assert [name for name, text in programs.items() if "stablehlo.while" in text] == ["cpu"]
    assert "__cudnn$fmha" not in lowered("cuda", jnp.float32)


def test_where_the_mesh_says_it_only_its_own_attention_is_traced(with_cudnn, monkeypatch):
    mesh = make_mesh(data=8)
    monkeypatch.setattr(attention, "_library_attention", None)
    assert "stablehlo.while" in lowered("cpu", mesh=mesh)


def test_without_gpus_there_is_no_cudnn():
    assert attention.cudnn_is_there() == (jax.default_backend() == "gpu")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("groups", "window"), [(4, None), (1, None), (2, 1), (4, 3), (2, 7)])
def test_library_attention_is_called_so_that_it_means_the_same(
    masked, groups, window, assert_close
):
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    operands = [RNG.normal(size=(2, 8, heads, 16)) for heads in (4, groups, groups)]
    half = [jnp.asarray(a, jnp.bfloat16) for a in operands]
    mask = np.ones((2, 8), np.float32)
    if masked:
        mask[0, 5:] = mask[1, 3] = 0

    @jax.jit
    def both(*half):
        given = jnp.asarray(mask) if masked else None
        flat = (a.astype(jnp.float32).reshape(2, 8, -1) for a in half)
        theirs = attention._library_attention(*half, given, window, implementation)
        return theirs.astype(jnp.float32), causal_attention(*flat, 4, given, window)

    got, expected = map(np.array, both(*half))
    # What a query makes of padding alone is its implementation's.
    before = np.arange(8)[:, None] - np.arange(8)[None]
    near = (before >= 0) & (before < (window or 8))
    blind = ~(near[None] & (mask[:, None] > 0)).any(-1)
    got[blind] = expected[blind] = 0
    assert_close(got, expected, "bfloat16")


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("groups", "shared"), [(1, 3), (2, 2)])
def test_a_new_token_attends_as_the_last_of_its_sequence_whatever_lies_behind(
    window, groups, shared, assert_close
):
    query, key, value, _ = grouped(groups, shared)
    positions, rows, heads = np.array([3, 6]), np.arange(B), groups * shared
    late = np.arange(T)[None] > positions[:, None]
    keys, values = (np.where(late[..., None], np.float32(1e4), a) for a in (key, value))

    @jax.jit
    def both(query, new, keys, values, positions):
        got = cached_attention(new, keys, values, heads, positions, window)
        return got, causal_attention(query, key, value, heads, None, window)

    got, every = both(query, query[rows, positions][:, None], keys, values, positions)
    assert_close(got, np.asarray(every)[rows, positions][:, None], "float32")


def test_a_new_token_in_half_precision_has_its_softmax_in_float32(assert_close):
    operands = [jnp.asarray(a, jnp.bfloat16) for a in grouped(2, 2)[:3]]
    attend = jax.jit(cached_attention, static_argnums=3)
    got = attend(operands[0][:, -1:], *operands[1:], 4, jnp.full((B,), T - 1))
    assert got.dtype == jnp.bfloat16
    query, key, value = (np.asarray(a, np.float32) for a in operands)
    expected = reference(WHOLE, query, repeated(key, 2, 2), repeated(value, 2, 2), heads=4)
    assert_close(got.astype(jnp.float32), expected[:, -1:], "bfloat16")
