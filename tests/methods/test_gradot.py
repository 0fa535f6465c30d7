import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.channel_set import channel_set_terms
from gradot_jax.compression.rank import factorise, keep_order
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.methods.gradot import gradot_rule, gradot_terms
from gradot_jax.methods.scored import propose
from gradot_jax.nn.layout import maps
from gradot_jax.nn.linear import Dense


@pytest.mark.parametrize("score", ["l1", "quadratic"])
def test_whitened_basis_is_kept_as_a_prefix_whatever_the_attention_score(score, random_layer):
    candidate = propose(*random_layer(), gradot_rule(score, "whitened"))
    for own in candidate.terms.components.values():
        np.testing.assert_array_equal(keep_order(own.hessian, 0), np.arange(own.hessian.size))


def test_a_whole_whitened_decomposition_is_the_kernel(random_layer, assert_close):
    block, factors = random_layer()
    for site, parts in propose(block, factors, gradot_rule("l1", "whitened")).parts.items():
        left, right = factorise(parts, np.arange(parts.values.size))
        assert_close(left @ right, getattr(block, site).kernel, "float32_model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_score": "quadratic"},
        {"attention_basis": "whitened"},
        {"attention_basis": "whitened", "channel_score": "token-fisher"},
        {"channel_score": "gcs-set"},
    ],
)
def test_nothing_is_scored_without_factors(options, random_layer):
    with pytest.raises(ValueError, match="needs Kronecker factors"):
        propose(random_layer()[0], None, gradot_rule(**options))


def test_token_fisher_without_the_removal_fisher_is_refused(random_layer):
    block, factors = random_layer()
    factors["down"] = factors["down"]._replace(removal_fisher=None)
    with pytest.raises(ValueError, match="needs the removal Fisher of down"):
        propose(block, factors, gradot_rule(channel_score="token-fisher"))


@pytest.mark.parametrize(
    "options",
    [
        {"attention_score": "quadratic", "channel_score": "token-fisher"},
        {"channel_score": "gcs-set", "lambda_mlp": 0.5, "count": 5},
    ],
)
def test_rules_of_equal_options_share_their_traces(options, random_layer):
    propose(*random_layer(), gradot_rule(**options))
    before = gradot_terms._cache_size()
    propose(*random_layer(1), gradot_rule(**options))
    assert gradot_terms._cache_size() == before


@pytest.mark.parametrize("channel_score", ["l1", "token-fisher"])
def test_scores_hold_no_second_matrix_over_pairs_of_channels(channel_score, random_layer):
    width, ffn = 4, 512
    layout = random_layer()[0].layout

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def shape_of(site):
        if site == layout.channels.out:
            return ffn, width
        return width, ffn if site in layout.channels.into else width

    def factors(d_in, d_out):
        removal = array(d_in, d_in) if d_in == ffn else None
        return KroneckerFactors(array(d_in, d_in), array(d_in), array(d_out, d_out), None, removal)

    shapes = {site.name: shape_of(site.name) for site in layout.sites}
    layer = {
        site: Dense(array(*shape), array(ffn) if shape[1] == ffn else None)
        for site, shape in shapes.items()
    }
    one = SVD(array(width, width), array(width), array(width, width))
    parts = dict.fromkeys(layout.low_rank, one)
    moments = {site: factors(*shape) for site, shape in shapes.items()}
    program = gradot_terms.lower(layout, layer, parts, moments, "l1", channel_score).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * ffn**2 / 8


@pytest.mark.parametrize(
    "asked",
    [{}, {"lambda_mlp": 0.5}, {"compensate_mlp": "refit"}, {"allocation": "global"}],
)
def test_a_search_keeps_what_its_costs_say(asked, six_layers):
    result = six_layers.compress("gradot", channel_score="gcs-set", budget=0.5, **asked)
    costs = result.scores["channels_hessian"]
    kept = [layer.channels for layer in result.plan.layers]
    assert sum(map(len, kept)) == 4 * 6
    if "allocation" not in asked:
        assert {len(own) for own in kept} == {6}
    for own, cost in zip(kept, costs, strict=True):
        assert np.isfinite(cost).all()
        np.testing.assert_array_equal(np.sort(keep_order(jnp.asarray(cost), 0)[: len(own)]), own)
    assert not result.scores["channels_gradient"].any()


def test_with_a_known_count_no_set_is_above_that_of_single_scores(random_layer):
    for seed in range(3):
        block, factors = random_layer(seed)
        channels, layer = block.layout.channels, maps(block)
        removed = []
        for score in ("l1", "gcs-set"):
            terms = propose(block, factors, gradot_rule(channel_score=score, count=3)).terms
            order = keep_order(terms.channels.hessian, 0)
            removed.append(jnp.zeros(8, bool).at[order[3:]].set(True))
        single, searched = (
            channel_set_terms(channels, layer, factors, own).hessian for own in removed
        )
        assert searched <= single * (1 + 1e-6)
