import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import (
    ScoreTerms,
    channel_energy,
    channel_gradient,
    channel_norms,
    channel_terms,
    combine,
    component_terms,
    quadratic_terms,
    whitened_terms,
)
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.layout import Channels
from gradot_jax.nn.linear import Dense

TOKENS = 9
MLP, GATED = Channels(into=("fc1",), out="fc2"), Channels(into=("gate", "up"), out="down")


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


def channel_case(channels, widths, size, biased=(), dead=(), rank=None):
    """Maps and factors of an MLP, float32.

    Args:
        channels: which maps.
        widths: inputs of each map into the channels, and outputs of the map out of them.
        size: F.
        biased: those into the channels that have a bias.
        dead: channels that are zero, and get no gradient, at every token.
        rank: of the kernels.
    """
    rng = np.random.default_rng(2)
    *inputs, outputs = widths
    layer, moments = {}, {}
    for seed, (site, width) in enumerate(zip(channels.into, inputs, strict=True)):
        bias = rng.normal(size=size) if site in biased else None
        layer[site] = Dense(weights(width, size, rank, seed=1 + 10 * seed), bias)
        moments[site] = factors(width, size, seed=4 + 10 * seed, dead_out=dead)
    layer[channels.out] = Dense(weights(size, outputs, rank, seed=3), rng.normal(size=outputs))
    moments[channels.out] = factors(size, outputs, seed=5, dead_in=dead)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer), moments


CASES = [(1, 1, (), None), (3, 5, (1, 4), None), (5, 2, (), None), (4, 6, (0,), 1)]
MLPS = [
    *(
        (MLP, (d, d), f, biased, dead, rank)
        for biased in (("fc1",), ())
        for d, f, dead, rank in CASES
    ),
    (GATED, (1, 1, 1), 1, ("gate", "up"), (), None),
    (GATED, (3, 4, 2), 5, ("gate",), (1, 4), None),
    (GATED, (5, 3, 4), 2, ("up",), (), None),
    (GATED, (4, 4, 4), 6, (), (0,), 1),
]


@pytest.mark.parametrize("case", MLPS)
def test_channel_terms_equal_the_written_out_hessian(case, assert_close):
    channels, _, size, biased, dead, _ = case
    layer, moments = channel_case(*case)
    moved, raised = np.zeros(size), np.zeros(size)
    for site, weights in layer.items():
        kernel = np.asarray(weights.kernel, np.float64)
        slope = np.asarray(moments[site].gradient.kernel, np.float64)
        if site in biased:
            kernel = np.concatenate([kernel, np.asarray(weights.bias, np.float64)[None]])
            slope = np.concatenate([slope, np.asarray(moments[site].gradient.bias)[None]])
        h = hessian(moments[site], site in biased)
        for j in range(size):
            removal = np.zeros_like(kernel)
            channel = (j,) if site == channels.out else (slice(None), j)
            removal[channel] = -kernel[channel]
            moved[j] += shift(h, removal)
            raised[j] -= (slope * removal).sum()
    terms = channel_terms(channels, layer, moments)
    assert_close(terms, ScoreTerms(moved, raised), "float32")
    assert not np.asarray(terms.hessian)[list(dead)].any()
    assert_close(channel_gradient(channels, layer, moments), raised, "float32")


@pytest.mark.parametrize("case", MLPS)
def test_norms_are_those_of_all_weights_of_a_channel(case, assert_close):
    channels = case[0]
    layer, _ = channel_case(*case)
    rows = []
    for site, weights in layer.items():
        kernel = np.asarray(weights.kernel, np.float64)
        rows.append(kernel.T if site == channels.out else kernel)
        if site in case[3]:
            rows.append(np.asarray(weights.bias, np.float64)[None])
    expected = np.linalg.norm(np.concatenate(rows), axis=0)
    assert_close(channel_norms(channels, layer), expected, "float32")


def test_energy_is_the_root_mean_square_of_what_a_channel_adds(assert_close):
    tokens = np.random.default_rng(0).normal(size=(TOKENS, 5)).astype(np.float32)
    out = Dense(jnp.asarray(weights(5, 3), jnp.float32), jnp.ones(3))
    moments = KroneckerFactors(jnp.asarray(tokens.T @ tokens / TOKENS), None, None, None)
    kernel = np.asarray(out.kernel, np.float64)
    added = [np.outer(tokens[:, j].astype(np.float64), kernel[j]) for j in range(5)]
    expected = np.sqrt([np.square(part).sum(1).mean() for part in added])
    assert_close(channel_energy(out, moments), expected, "float32")


def test_score_of_removals_bounds_that_of_their_sum():
    f, decomposition = factors(5, 4), decompose(weights(5, 4))
    u, s, v = (np.asarray(part, np.float64) for part in decomposition)
    removed = [1, 3]
    delta = -(u[:, removed] * s[removed]) @ v[:, removed].T
    bound = float(np.asarray(component_terms(decomposition, f).hessian)[removed].sum())
    assert shift(hessian(f), delta) <= bound


def permuted(channels, layer, moments, p):
    """The same MLP with its channels in another order."""
    maps, factors = dict(layer), dict(moments)
    for site in channels.into:
        weights, own, slope = layer[site], moments[site], moments[site].gradient
        bias = None if weights.bias is None else weights.bias[p]
        maps[site] = Dense(weights.kernel[:, p], bias)
        factors[site] = own._replace(
            gradient_covariance=own.gradient_covariance[p][:, p],
            gradient=Dense(slope.kernel[:, p], slope.bias[p]),
        )
    out, own = layer[channels.out], moments[channels.out]
    maps[channels.out] = out.replace(kernel=out.kernel[p])
    factors[channels.out] = own._replace(
        input_covariance=own.input_covariance[p][:, p],
        input_mean=own.input_mean[p],
        gradient=own.gradient.replace(kernel=own.gradient.kernel[p]),
    )
    return channels, maps, factors


@pytest.mark.parametrize(
    ("channels", "widths"), [(MLP, (3, 3)), (GATED, (3, 2, 4))], ids=["plain", "gated"]
)
def test_permuting_channels_permutes_their_terms(channels, widths, assert_close):
    layer, moments = channel_case(channels, widths, 6, channels.into)
    p = np.array([3, 0, 5, 1, 4, 2])
    terms = channel_terms(*permuted(channels, layer, moments, p))
    expected = jax.tree.map(lambda term: term[p], channel_terms(channels, layer, moments))
    assert_close(terms, expected, "float32")


def test_signs_of_a_component_do_not_change_its_terms(assert_close):
    f, decomposition = factors(5, 4), decompose(weights(5, 4))
    flipped = decomposition._replace(left=-decomposition.left, right=-decomposition.right)
    for terms in (component_terms, quadratic_terms, whitened_terms):
        assert_close(terms(flipped, f), terms(decomposition, f), "float32")


def test_without_gradient_the_loss_term_is_zero(assert_close):
    bare = factors(5, 4)._replace(gradient=None)
    assert not np.asarray(component_terms(decompose(weights(5, 4)), bare).gradient).any()
    for channels, widths in ((MLP, (3, 3)), (GATED, (3, 2, 4))):
        layer, moments = channel_case(channels, widths, 4, channels.into)
        bare = {site: own._replace(gradient=None) for site, own in moments.items()}
        terms = channel_terms(channels, layer, bare)
        assert not np.asarray(terms.gradient).any()
        assert_close(terms.hessian, channel_terms(channels, layer, moments).hessian, "float32")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_scored_in_float32(dtype, assert_close):
    layer, moments = channel_case(GATED, (3, 2, 4), 5, ("gate", "up"))
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), layer)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    terms = channel_terms(GATED, half, moments)
    assert {term.dtype for term in terms} == {jnp.dtype("float32")}
    assert_close(terms, channel_terms(GATED, rounded, moments), "float32")
    norms = channel_norms(GATED, half), channel_norms(GATED, rounded)
    assert norms[0].dtype == jnp.float32
    assert_close(*norms, "float32")


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
    for channels, widths in ((MLP, (3, 3)), (GATED, (3, 2, 4))):
        layer, moments = channel_case(channels, widths, 5)
        short = {**layer, channels.out: Dense(layer[channels.out].kernel[:4], None)}
        with pytest.raises(AssertionError, match="shape"):
            channel_terms(channels, short, moments)
