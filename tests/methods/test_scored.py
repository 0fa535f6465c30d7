"""One layer on its own: how rules score it, and how it is cut."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.channel import cut_channels
from gradot_jax.compression.rank import cut_rank, keep_order
from gradot_jax.methods.activation_svd import ACTIVATION_SVD, activation_terms
from gradot_jax.methods.gradot import gradot_rule, gradot_terms
from gradot_jax.methods.magnitude import MAGNITUDE, magnitude_terms
from gradot_jax.methods.random import random_rule
from gradot_jax.methods.scored import decompose_layers, propose
from gradot_jax.nn.layout import maps
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel
from gradot_jax.parallel import make_mesh, put

D, F = 6, 8
RULES = {
    "gradot": gradot_rule(),
    "quadratic": gradot_rule(attention_score="quadratic"),
    "whitened": gradot_rule(attention_basis="whitened", channel_score="token-fisher"),
    "search": gradot_rule(channel_score="gcs-set", count=5),
    "activation": ACTIVATION_SVD,
    "magnitude": MAGNITUDE,
    "random": random_rule(0, 1),
}
DETERMINED = [name for name in RULES if name != "random"]
SITES = ("query", "key", "out")
CAPS = {"query": 3, "key": 3, "out": 3}
"""Ranks from which on two factors have no fewer parameters than the matrix."""


@pytest.fixture(scope="module")
def layer(random_layer):
    return random_layer()


@pytest.fixture(scope="module")
def candidate(layer):
    return propose(*layer, gradot_rule())


@pytest.fixture(scope="module")
def cut(layer, candidate):
    """Cuts a site of the candidate, or its channels."""
    block, _ = layer

    def run(order, count, compensation="none", damping=1e-4, site=None):
        options = {"compensation": compensation, "damping": damping}
        if site is None:
            channels, factors = block.layout.channels, candidate.factors["down"]
            return cut_channels(channels, maps(block), order, count, factors=factors, **options)
        factors, parts = candidate.factors[site], candidate.parts[site]
        return cut_rank(getattr(block, site), parts, order, count, factors=factors, **options)

    return run


def test_a_candidate_covers_every_site_and_every_channel(candidate):
    sizes = {site: own.hessian.size for site, own in candidate.terms.components.items()}
    assert (
        sizes
        == {"query": D, "key": 4, "out": D}
        == {site: parts.values.size for site, parts in candidate.parts.items()}
    )
    assert candidate.terms.channels.hessian.shape == (F,)


@pytest.mark.parametrize("rule", DETERMINED)
def test_sites_are_scored_as_each_would_be_alone(rule, layer, random_layer, assert_close):
    block, factors = layer
    other, others = random_layer(1)
    whole = propose(block, factors, RULES[rule])
    for site in SITES:
        # All others are of another layer, which shares a batch with this one where shapes agree.
        mixed = other.replace(**{site: getattr(block, site)})
        alone = propose(mixed, others | {site: factors[site]}, RULES[rule])
        got = whole.parts[site], whole.terms.components[site]
        assert_close(got, (alone.parts[site], alone.terms.components[site]), "float32")


@pytest.mark.parametrize("rule", ["gradot", "whitened"])
def test_layers_decomposed_together_are_as_each_alone(rule, random_layer, assert_close):
    blocks, factors = zip(*map(random_layer, range(3)), strict=True)
    together = decompose_layers(blocks, factors, RULES[rule])
    for parts, block, own in zip(together, blocks, factors, strict=True):
        assert_close(parts, propose(block, own, RULES[rule]).parts, "float32")


@pytest.mark.parametrize("rule", DETERMINED)
def test_permuting_channels_permutes_their_scores(rule, layer, assert_close):
    block, factors = layer
    p = np.array([3, 0, 5, 1, 4, 2, 7, 6])
    columns = {
        site: Dense(weights.kernel[:, p], weights.bias[p])
        for site, weights in maps(block).items()
        if site in block.layout.channels.into
    }
    permuted = block.replace(**columns, down=Dense(block.down.kernel[p], block.down.bias))
    moved = {}
    for site in columns:
        own = factors[site]
        moved[site] = own._replace(
            gradient_covariance=own.gradient_covariance[np.ix_(p, p)],
            gradient=Dense(own.gradient.kernel[:, p], own.gradient.bias[p]),
        )
    down = factors["down"]
    moved["down"] = down._replace(
        input_covariance=down.input_covariance[np.ix_(p, p)],
        input_mean=down.input_mean[p],
        gradient=Dense(down.gradient.kernel[p], down.gradient.bias),
        removal_fisher=down.removal_fisher[np.ix_(p, p)],
    )
    expected = propose(block, factors, RULES[rule])
    got = propose(permuted, factors | moved, RULES[rule], parts=expected.parts)
    channels = jax.tree.map(lambda term: term[p], expected.terms.channels)
    assert_close(got.terms.channels, channels, "float32")


def test_layers_of_equal_shape_are_scored_by_one_trace(random_layer):
    chex.clear_trace_counter()
    for terms in (gradot_terms, magnitude_terms, activation_terms):
        counted = chex.assert_max_traces(terms.__wrapped__, n=1)
        scored = jax.jit(counted, static_argnames=("layout",))
        for seed in range(3):
            block, factors = random_layer(seed)
            (parts,) = decompose_layers([block], [None], MAGNITUDE)
            scored(block.layout, maps(block), parts, factors)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_layers_are_scored_in_float32(rule, layer, random_layer, assert_close):
    half, _ = random_layer(dtype="bfloat16")
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    got, expected = (propose(block, layer[1], RULES[rule]).terms for block in (half, exact))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_close(got, expected, "float32")


@pytest.mark.parametrize("rule", ["gradot", "whitened"])
def test_weights_in_host_memory_in_half_precision_are_scored_in_float32(
    rule, layer, random_layer, assert_close
):
    stored, _ = random_layer(dtype="float16")
    mapped = jax.tree.map(np.asarray, stored)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    got, expected = (propose(block, layer[1], RULES[rule])[:2] for block in (mapped, exact))
    assert_close(got, expected, "float32")


@pytest.mark.parametrize("rule", ["gradot", "whitened"])
def test_decomposing_over_devices_proposes_the_same(rule, layer, assert_close):
    mesh = make_mesh(2, 2)
    got = propose(*put(layer, mesh.replicated), RULES[rule], mesh)
    assert_close(got.terms, propose(*layer, RULES[rule]).terms, "float32")


@pytest.mark.parametrize("site", SITES)
def test_order_keeps_the_floor_of_every_site(candidate, site):
    scores = candidate.terms.components[site].hessian
    order = np.asarray(keep_order(scores, 2))
    np.testing.assert_array_equal(order[:2], [0, 1])
    np.testing.assert_array_equal(np.sort(order), np.arange(scores.size))


@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("site", SITES)
def test_rank_from_break_even_on_keeps_the_original(cut, layer, site, more):
    original = getattr(layer[0], site)
    order = np.arange(min(original.shape))
    kept, indices = cut(order, min(CAPS[site] + more, order.size), "refit", site=site)
    assert indices is None
    np.testing.assert_array_equal(kept.kernel, original.kernel)
    np.testing.assert_array_equal(kept.bias, original.bias)


@pytest.mark.parametrize(("site", "order"), [("out", [4, 0, 2, 1, 3, 5]), ("key", [3, 0, 2, 1])])
def test_components_below_break_even_are_kept_ascending(cut, layer, site, order, assert_close):
    reduced, indices = cut(np.array(order), 2, site=site)
    kept = [0, order[0]]
    assert isinstance(reduced, LowRank) and reduced.rank == 2 and indices == tuple(kept)
    u, s, vt = np.linalg.svd(np.asarray(getattr(layer[0], site).kernel, np.float64))
    assert_close(dense_kernel(reduced), (u[:, kept] * s[kept]) @ vt[kept], "float32")


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_compensated_map_is_nearer_to_the_original_on_its_inputs(cut, layer, compensation):
    block, factors = layer
    a = np.asarray(factors["query"].input_covariance, np.float64)
    mean = np.asarray(factors["query"].input_mean, np.float64)
    original = jax.tree.map(np.asarray, block.query)

    def error(name):
        reduced, _ = cut(np.arange(D), 1, name, 1e-6, site="query")
        lost = np.asarray(dense_kernel(reduced), np.float64) - original.kernel
        shift = np.asarray(reduced.bias, np.float64) - original.bias
        return np.trace(lost.T @ a @ lost) + 2 * mean @ lost @ shift + shift @ shift

    assert error(compensation) < error("none")


def test_all_channels_keep_the_original(cut, layer):
    fields, kept = cut(np.arange(F)[::-1], F, "refit")
    assert all(fields[site] is getattr(layer[0], site) for site in ("gate", "up", "down"))
    assert len(fields) == 3 and kept == tuple(range(F))


def test_refitted_mlp_is_nearer_to_the_original_on_its_activations(cut, layer):
    block, factors = layer
    a = np.asarray(factors["down"].input_covariance, np.float64)
    kernel = np.asarray(block.down.kernel, np.float64)

    def error(name):
        fields, kept = cut(np.array([5, 1, 6, 0, 2, 3, 4, 7]), 3, name, 1e-6)
        assert kept == (1, 5, 6)
        lost = kernel.copy()
        lost[list(kept)] -= np.asarray(fields["down"].kernel)
        return np.trace(lost.T @ a @ lost)

    assert error("refit") < error("none")


@pytest.mark.parametrize("compensation", ["none", "refit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_half_precision(dtype, compensation, random_layer):
    block, factors = random_layer(dtype=dtype)
    candidate = propose(block, factors, gradot_rule())
    assert {leaf.dtype for leaf in jax.tree.leaves(candidate.terms)} == {jnp.dtype("float32")}
    options = {"compensation": compensation, "damping": 1e-4}
    parts, query, down = candidate.parts["query"], factors["query"], factors["down"]
    cuts = [
        cut_rank(block.query, parts, np.arange(D), rank, factors=query, **options)[0]
        for rank in (2, D)
    ]
    channels = block.layout.channels
    mlp, _ = cut_channels(channels, maps(block), np.arange(F), 3, factors=down, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves((cuts, mlp))} == {jnp.dtype(dtype)}


def test_a_cut_is_made_on_the_host(cut):
    """Else every new rank and number of channels would be a program to compile."""
    reduced, _ = cut(np.arange(D), 2, site="query")
    fields, _ = cut(np.arange(F), 3, "refit")
    arrays = [reduced.left, reduced.right, *(fields[site].kernel for site in fields)]
    arrays += [fields["gate"].bias, fields["up"].bias]
    assert all(isinstance(array, np.ndarray) for array in arrays)
