import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.layer import LayerFactors, LayerWeights, propose
from gradot_jax.compression.rank import factorise, keep_order
from gradot_jax.compression.rule import (
    ACTIVATION_SVD,
    MAGNITUDE,
    WHITENING_DAMPING,
    activation_terms,
    gradot_rule,
    gradot_terms,
    magnitude_terms,
    random_rule,
)
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD, svd
from gradot_jax.nn.linear import Dense

SITES, D, F, TOKENS = 2, 6, 8, 20
VARIANTS = [
    gradot_rule(),
    gradot_rule(attention_score="quadratic"),
    gradot_rule(attention_basis="whitened", channel_score="token-fisher"),
    ACTIVATION_SVD,
    MAGNITUDE,
    random_rule(0, 1),
]


def weights(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def dense(*shape):
        kernel, bias = rng.normal(size=shape), rng.normal(size=shape[:-2] + shape[-1:])
        return Dense(jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype))

    return LayerWeights(dense(SITES, D, D), dense(D, F), dense(F, D))


def factors(seed=0):
    rng = np.random.default_rng(seed)

    def site(d_in, d_out):
        x, g = rng.normal(size=(TOKENS, d_in)), rng.normal(size=(TOKENS, d_out))
        removals = x * (g @ rng.normal(size=(d_out, d_in)))
        parts = x.T @ x / TOKENS, x.mean(0), g.T @ g / TOKENS, x.T @ g / TOKENS, g.mean(0)
        a, mean, g2, dw, db = (jnp.asarray(part, jnp.float32) for part in parts)
        fisher = jnp.asarray(removals.T @ removals / TOKENS, jnp.float32)
        return KroneckerFactors(a, mean, g2, Dense(dw, db), fisher)

    attention = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(site(D, D) for _ in range(SITES)))
    return LayerFactors(attention, site(D, F), site(F, D))


def permuted_channels(w, f, p):
    """The same layer with its hidden channels in another order."""
    d1, d2, square = f.fc1.gradient, f.fc2.gradient, np.ix_(p, p)
    fc1 = f.fc1._replace(
        gradient_covariance=f.fc1.gradient_covariance[square],
        gradient=Dense(d1.kernel[:, p], d1.bias[p]),
    )
    fc2 = f.fc2._replace(
        input_covariance=f.fc2.input_covariance[square],
        input_mean=f.fc2.input_mean[p],
        gradient=Dense(d2.kernel[p], d2.bias),
        removal_fisher=f.fc2.removal_fisher[square],
    )
    maps = Dense(w.fc1.kernel[:, p], w.fc1.bias[p]), Dense(w.fc2.kernel[p], w.fc2.bias)
    return LayerWeights(w.attention, *maps), LayerFactors(f.attention, fc1, fc2)


def test_magnitude_is_singular_values_and_norms_of_channels(assert_close):
    w = weights()
    terms = propose(w, None, MAGNITUDE).terms
    kernels = np.asarray(w.attention.kernel, np.float64)
    assert_close(terms.components.hessian, np.linalg.svd(kernels, compute_uv=False), "float32")
    columns = np.concatenate([w.fc1.kernel, w.fc1.bias[None], w.fc2.kernel.T])
    assert_close(terms.channels.hessian, np.linalg.norm(columns, axis=0), "float32")
    assert not any(np.asarray(t.gradient).any() for t in terms)


def test_magnitude_of_half_precision_does_not_overflow(assert_close):
    big = jax.tree.map(lambda leaf: (1000 * leaf).astype(jnp.float16), weights())
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), big)
    decomposition = propose(big, None, MAGNITUDE).decomposition
    got, expected = (magnitude_terms(w, decomposition, None) for w in (big, exact))
    assert_close(got, expected, "float32")


def test_activation_svd_keeps_what_moves_the_outputs_least(assert_close):
    w, f = weights(), factors()
    candidate = propose(w, f, ACTIVATION_SVD)
    for site in range(SITES):
        kernel = np.asarray(w.attention.kernel[site], np.float64)
        a = np.asarray(f.attention.input_covariance[site], np.float64)
        a = a + WHITENING_DAMPING * np.trace(a) / D * np.eye(D)
        scores = np.asarray(candidate.terms.components.hessian[site], np.float64)
        kept = np.sort(keep_order(jnp.asarray(scores), 0)[:3])
        np.testing.assert_array_equal(kept, np.arange(3))
        left, right = factorise(SVD(*(part[site] for part in candidate.decomposition)), kept)
        lost = kernel - np.asarray(left, np.float64) @ np.asarray(right, np.float64)
        assert_close(np.trace(lost.T @ a @ lost), np.square(scores[3:]).sum(), "float32_model")


def test_activation_energy_of_a_channel_is_that_of_what_it_adds(assert_close):
    w, f = weights(), factors()
    energy = np.diag(np.asarray(f.fc2.input_covariance, np.float64))
    kernel = np.asarray(w.fc2.kernel, np.float64)
    # E || a_j w2_j ||^2, with the expectation taken first.
    expected = np.sqrt([np.trace(energy[j] * np.outer(kernel[j], kernel[j])) for j in range(F)])
    terms = propose(w, f, ACTIVATION_SVD).terms
    assert_close(terms.channels.hessian, expected, "float32")
    assert not any(np.asarray(t.gradient).any() for t in terms)


def test_whitened_basis_is_kept_as_a_prefix_whatever_the_attention_score():
    for score in ("l1", "quadratic"):
        scores = propose(weights(), factors(), gradot_rule(score, "whitened")).terms.components
        order = jax.vmap(lambda row: keep_order(row, 0))(scores.hessian)
        np.testing.assert_array_equal(order, [np.arange(D)] * SITES)


def test_a_whole_whitened_decomposition_is_the_kernel(assert_close):
    w = weights()
    for rule in (gradot_rule(attention_basis="whitened"), ACTIVATION_SVD):
        parts = rule.decompose(w.attention.kernel, factors())
        products = [factorise(SVD(*part), np.arange(D)) for part in zip(*parts, strict=True)]
        whole = np.stack([left @ right for left, right in products])
        assert_close(whole, w.attention.kernel, "float32_model")


@pytest.mark.parametrize("rule", VARIANTS[:5], ids=range(5))
def test_permuting_channels_permutes_their_scores(rule, assert_close):
    w, f, p = weights(), factors(), np.array([3, 0, 5, 1, 4, 2, 7, 6])
    parts = rule.decompose(w.attention.kernel, f)
    expected = jax.tree.map(lambda term: term[p], rule.terms(w, parts, f).channels)
    permuted_weights, permuted_factors = permuted_channels(w, f, p)
    got = rule.terms(permuted_weights, parts, permuted_factors).channels
    assert_close(got, expected, "float32")


def test_random_scores_follow_seed_and_layer():
    def scores(*draw):
        return jax.tree.leaves(propose(weights(), None, random_rule(*draw)).terms)

    first = scores(0, 1)
    jax.tree.map(np.testing.assert_array_equal, first, scores(0, 1))
    assert [leaf.shape for leaf in first] == [(SITES, D)] * 2 + [(F,)] * 2
    for other in (scores(1, 1), scores(0, 2)):
        assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[2], other[2])


@pytest.mark.parametrize(
    "rule", [*VARIANTS[:4], gradot_rule(attention_basis="whitened")], ids=range(5)
)
def test_rules_that_read_factors_refuse_to_do_without(rule):
    with pytest.raises(ValueError, match="needs Kronecker factors"):
        propose(weights(), None, rule)


def test_token_fisher_without_the_removal_fisher_is_refused():
    f = factors()
    bare = f._replace(fc2=f.fc2._replace(removal_fisher=None))
    with pytest.raises(ValueError, match="needs the removal Fisher"):
        propose(weights(), bare, gradot_rule(channel_score="token-fisher"))


def test_layers_of_equal_shape_are_scored_by_one_trace():
    chex.clear_trace_counter()
    for terms in (gradot_terms, magnitude_terms, activation_terms):
        scored = jax.jit(chex.assert_max_traces(terms.__wrapped__, n=1))
        for seed in range(3):
            f = factors(seed)
            scored(weights(seed), svd(weights(seed).attention.kernel), f)


def test_rules_of_equal_options_share_their_traces():
    options = {"attention_score": "quadratic", "channel_score": "token-fisher"}
    propose(weights(), factors(), gradot_rule(**options))
    before = gradot_terms._cache_size()
    propose(weights(1), factors(1), gradot_rule(**options))
    assert gradot_terms._cache_size() == before


@pytest.mark.parametrize("rule", VARIANTS, ids=range(len(VARIANTS)))
def test_half_precision_layers_are_scored_in_float32(rule, assert_close):
    half = weights(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    got, expected = (propose(w, factors(), rule).terms for w in (half, exact))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_close(got, expected, "float32")


@pytest.mark.parametrize("channel_score", ["l1", "token-fisher"])
def test_scores_hold_no_second_matrix_over_pairs_of_channels(channel_score):
    width, ffn = 4, 512

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def of(d_in, d_out, *lead, removal=None):
        means = array(*lead, d_in, d_in), array(*lead, d_in), array(*lead, d_out, d_out)
        return KroneckerFactors(*means, None, removal)

    given = LayerWeights(
        Dense(array(4, width, width), None),
        Dense(array(width, ffn), array(ffn)),
        Dense(array(ffn, width), None),
    )
    parts = SVD(array(4, width, width), array(4, width), array(4, width, width))
    moments = LayerFactors(
        of(width, width, 4), of(width, ffn), of(ffn, width, removal=array(ffn, ffn))
    )
    program = gradot_terms.lower(given, parts, moments, "l1", channel_score).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * ffn**2 / 8
