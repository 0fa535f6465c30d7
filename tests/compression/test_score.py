import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import (
    ScoreTerms,
    channel_terms,
    combine,
    component_terms,
    quadratic_terms,
    whitened_terms,
)
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.linear import Dense

TOKENS = 9


def factors(d_in, d_out, seed=0, dead_in=(), dead_out=(), tokens=TOKENS):
    """Factors of random tokens, float32; `dead` inputs and outputs are zero at every token."""
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(tokens, d_in)), rng.normal(size=(tokens, d_out))
    x[:, list(dead_in)] = 0
    g[:, list(dead_out)] = 0
    parts = x.T @ x / tokens, x.mean(0), g.T @ g / tokens, x.T @ g / tokens, g.mean(0)
    a, mean, g2, dw, db = (jnp.asarray(part, jnp.float32) for part in parts)
    return KroneckerFactors(a, mean, g2, Dense(dw, db))


def hessian(factors, bias=False):
    """H written out; entry (i, o) of a matrix is entry `i D_out + o` of its vector."""
    a, g = (np.asarray(f, np.float64) for f in (factors.input_covariance, factors[2]))
    if bias:
        mean = np.asarray(factors.input_mean, np.float64)
        a = np.block([[a, mean[:, None]], [mean[None], np.ones((1, 1))]])
    return np.kron(a, g)


def shift(h, delta):
    return np.abs(h @ delta.reshape(-1)).sum()


def decompose(w):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return SVD(*(jnp.asarray(part, jnp.float32) for part in (u, s, vt.T)))


def weights(d_in, d_out, rank=None, seed=1):
    rng = np.random.default_rng(seed)
    rank = min(d_in, d_out) if rank is None else rank
    return rng.normal(size=(d_in, rank)) @ rng.normal(size=(rank, d_out))


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(1, 1, 1), (4, 6, 4), (6, 3, 3), (5, 5, 2), (4, 4, 0)]
)
@pytest.mark.parametrize("tokens", [TOKENS, 2])
def test_component_terms_equal_the_written_out_hessian(d_in, d_out, rank, tokens, assert_close):
    f = factors(d_in, d_out, tokens=tokens)
    decomposition = decompose(weights(d_in, d_out, rank))
    u, s, v = (np.asarray(part, np.float64) for part in decomposition)
    h, dw = hessian(f), np.asarray(f.gradient.kernel, np.float64)
    removals = [-s[k] * np.outer(u[:, k], v[:, k]) for k in range(len(s))]
    expected = ScoreTerms(
        np.array([shift(h, delta) for delta in removals]),
        np.array([-(dw * delta).sum() for delta in removals]),
    )
    assert_close(component_terms(decomposition, f), expected, "float32")


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(1, 1, 1), (4, 6, 4), (6, 3, 3), (5, 5, 2)])
@pytest.mark.parametrize("tokens", [TOKENS, 2])
def test_quadratic_terms_equal_the_written_out_form(d_in, d_out, rank, tokens, assert_close):
    f = factors(d_in, d_out, tokens=tokens)
    decomposition = decompose(weights(d_in, d_out, rank))
    u, s, v = (np.asarray(part, np.float64) for part in decomposition)
    removals = [(-s[k] * np.outer(u[:, k], v[:, k])).reshape(-1) for k in range(len(s))]
    terms = quadratic_terms(decomposition, f)
    assert_close(terms.hessian, np.array([d @ hessian(f) @ d for d in removals]), "float32")
    assert_close(terms.gradient, component_terms(decomposition, f).gradient, "float32")


def test_quadratic_and_whitened_terms_agree_in_the_norm_of_the_factors(assert_close):
    f, w = factors(5, 4), weights(5, 4)
    roots = [np.linalg.cholesky(np.asarray(m, np.float64)) for m in (f[0], f[2])]
    u, s, vt = np.linalg.svd(roots[0].T @ w @ roots[1], full_matrices=False)
    left, right = np.linalg.solve(roots[0].T, u), np.linalg.solve(roots[1].T, vt.T)
    decomposition = SVD(*(jnp.asarray(part, jnp.float32) for part in (left, s, right)))
    expected = whitened_terms(decomposition, f)
    assert_close(quadratic_terms(decomposition, f), expected, "float32_model")


def channel_case(d, f, bias, dead=(), rank=None):
    rng = np.random.default_rng(2)
    b1 = rng.normal(size=f) if bias else None
    fc1, fc2 = Dense(weights(d, f, rank), b1), Dense(weights(f, d, rank, seed=3), None)
    as_float32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    first = factors(d, f, seed=4, dead_out=dead)
    return as_float32(fc1), as_float32(fc2), first, factors(f, d, seed=5, dead_in=dead)


@pytest.mark.parametrize(
    ("d", "f", "dead", "rank"),
    [(1, 1, (), None), (3, 5, (1, 4), None), (5, 2, (), None), (4, 6, (0,), 1)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_channel_terms_equal_the_written_out_hessian(d, f, dead, rank, bias, assert_close):
    fc1, fc2, f1, f2 = channel_case(d, f, bias, dead, rank)
    w1, w2 = np.asarray(fc1.kernel, np.float64), np.asarray(fc2.kernel, np.float64)
    d1, d2 = np.asarray(f1.gradient.kernel), np.asarray(f2.gradient.kernel)
    if bias:
        w1 = np.concatenate([w1, np.asarray(fc1.bias, np.float64)[None]])
        d1 = np.concatenate([d1, np.asarray(f1.gradient.bias)[None]])
    h1, h2 = hessian(f1, bias), hessian(f2)
    moved, raised = np.zeros(f), np.zeros(f)
    for j in range(f):
        delta1, delta2 = np.zeros_like(w1), np.zeros_like(w2)
        delta1[:, j], delta2[j] = -w1[:, j], -w2[j]
        moved[j] = shift(h1, delta1) + shift(h2, delta2)
        raised[j] = -(d1 * delta1).sum() - (d2 * delta2).sum()
    terms = channel_terms(fc1, fc2, f1, f2)
    assert_close(terms, ScoreTerms(moved, raised), "float32")
    assert not np.asarray(terms.hessian)[list(dead)].any()


def test_score_of_removals_bounds_that_of_their_sum():
    f, decomposition = factors(5, 4), decompose(weights(5, 4))
    u, s, v = (np.asarray(part, np.float64) for part in decomposition)
    removed = [1, 3]
    delta = -(u[:, removed] * s[removed]) @ v[:, removed].T
    bound = float(np.asarray(component_terms(decomposition, f).hessian)[removed].sum())
    assert shift(hessian(f), delta) <= bound


def test_permuting_channels_permutes_their_terms(assert_close):
    fc1, fc2, f1, f2 = channel_case(3, 6, True)
    p = np.array([3, 0, 5, 1, 4, 2])
    d1, d2 = f1.gradient, f2.gradient
    f1_permuted = f1._replace(
        gradient_covariance=f1.gradient_covariance[p][:, p],
        gradient=Dense(d1.kernel[:, p], d1.bias[p]),
    )
    f2_permuted = f2._replace(
        input_covariance=f2.input_covariance[p][:, p],
        input_mean=f2.input_mean[p],
        gradient=Dense(d2.kernel[p], d2.bias),
    )
    permuted = channel_terms(
        Dense(fc1.kernel[:, p], fc1.bias[p]), Dense(fc2.kernel[p], None), f1_permuted, f2_permuted
    )
    expected = jax.tree.map(lambda term: term[p], channel_terms(fc1, fc2, f1, f2))
    assert_close(permuted, expected, "float32")


def test_signs_of_a_component_do_not_change_its_terms(assert_close):
    f, decomposition = factors(5, 4), decompose(weights(5, 4))
    flipped = decomposition._replace(left=-decomposition.left, right=-decomposition.right)
    for terms in (component_terms, quadratic_terms, whitened_terms):
        assert_close(terms(flipped, f), terms(decomposition, f), "float32")


def test_without_gradient_the_loss_term_is_zero():
    bare = factors(5, 4)._replace(gradient=None)
    assert not np.asarray(component_terms(decompose(weights(5, 4)), bare).gradient).any()
    fc1, fc2, f1, f2 = channel_case(3, 4, True)
    terms = channel_terms(fc1, fc2, f1._replace(gradient=None), f2._replace(gradient=None))
    assert not np.asarray(terms.gradient).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_scored_in_float32(dtype, assert_close):
    fc1, fc2, f1, f2 = channel_case(3, 5, True)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), (fc1, fc2))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    terms = channel_terms(*half, f1, f2)
    assert {term.dtype for term in terms} == {jnp.dtype("float32")}
    assert_close(terms, channel_terms(*rounded, f1, f2), "float32")


@pytest.mark.parametrize("weight", [0.0, 0.7, -2.0])
def test_scaling_the_loss_leaves_the_score(weight, assert_close):
    decomposition, f, scale = decompose(weights(5, 4)), factors(5, 4), 1e-3
    scaled = f._replace(
        gradient_covariance=f.gradient_covariance * scale**2,
        gradient=jax.tree.map(lambda leaf: leaf * scale, f.gradient),
    )
    expected = combine(component_terms(decomposition, f), weight)
    assert_close(combine(component_terms(decomposition, scaled), weight), expected, "float32")


def test_score_is_each_term_over_its_mean_absolute_value(assert_close):
    terms = ScoreTerms(np.array([1.0, 2.0, 3.0, 2.0]), np.array([-4.0, 0.0, 4.0, 8.0]))
    expected = terms.hessian / 2 + 0.5 * terms.gradient / 4
    assert_close(combine(terms, 0.5), expected, "float32")
    assert_close(combine(terms, 0.0), terms.hessian / 2, "float32")


def test_terms_all_zero_give_a_finite_score_and_keep_the_first():
    zero = ScoreTerms(jnp.zeros(4), jnp.zeros(4))
    score = combine(zero, 1.0)
    np.testing.assert_array_equal(score, np.zeros(4))
    np.testing.assert_array_equal(keep_order(score, 0), np.arange(4))


def test_factors_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        component_terms(decompose(weights(5, 4)), factors(4, 5))
    fc1, fc2, f1, f2 = channel_case(3, 5, True)
    with pytest.raises(AssertionError, match="shape"):
        channel_terms(fc1, Dense(fc2.kernel[:4], None), f1, f2)
