"""`gradot`: the gradient-preserving compression score, and what was found to improve on it."""

from functools import partial

import jax
import jax.numpy as jnp

from gradot_jax.compression.channel import elimination_costs
from gradot_jax.compression.channel_set import channel_set_costs
from gradot_jax.compression.score import (
    LayerTerms,
    ScoreTerms,
    channel_gradient,
    channel_terms,
    component_scores,
    component_terms,
    quadratic_terms,
    whitened_terms,
)
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.linalg.whitened import whitened_svd
from gradot_jax.methods.allocation import layer_pools, uniform_layer_counts
from gradot_jax.methods.options import (
    AttentionBasis,
    AttentionScore,
    ChannelScore,
    CompressionOptions,
)
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.methods.scored import (
    WHITENING_DAMPING,
    Factors,
    Maps,
    Parts,
    ScoringRule,
    plain_svd,
    required,
    shrink_layers,
)
from gradot_jax.models.family import ModelConfig
from gradot_jax.nn.layout import Layout
from gradot_jax.parallel import DeviceMesh

_COMPONENT_TERMS = {"l1": component_terms, "quadratic": quadratic_terms, "whitened": whitened_terms}


def compress(problem: Problem) -> Outcome:
    """The paper's formulas by default; options name each departure."""
    rule = rule_of(problem.config, problem.options, len(problem.middle))
    return shrink_layers(problem, lambda layer: rule)


def rule_of(config: ModelConfig, options: CompressionOptions, num_layers: int) -> ScoringRule:
    """The rule that options name, for a middle of so many layers."""
    count = None
    if options.channel_score == "gcs-set":
        counts = uniform_layer_counts(layer_pools(config, options), options, num_layers)
        count = None if counts is None else counts.channels
    return gradot_rule(
        options.attention_score,
        options.attention_basis,
        options.channel_score,
        options.lambda_mlp or 0.0,
        count,
    )


def gradot_rule(
    attention_score: AttentionScore = "l1",
    attention_basis: AttentionBasis = "svd",
    channel_score: ChannelScore = "l1",
    lambda_mlp: float = 0.0,
    count: int | None = None,
) -> ScoringRule:
    """The gradient-preserving score; the defaults are the paper's formulas.

    Args:
        attention_score: of components; a whitened basis brings its own, the quadratic form, in
            which its order is a prefix.
        attention_basis: `svd` or the two-sided `whitened`.
        channel_score: of channels.
        lambda_mlp: of channels, where their score is of sets.
        count: channels to keep, where that is known to such a score.
    """
    whitened = attention_basis == "whitened"
    component_score = "whitened" if whitened else attention_score
    terms = partial(
        gradot_terms,
        component_score=component_score,
        channel_score=channel_score,
        lambda_mlp=lambda_mlp,
        count=count,
    )
    if whitened:
        return ScoringRule(_whitened, terms)
    return ScoringRule(plain_svd, terms, decomposes_alone=True)


def _whitened(
    kernels: jax.Array, factors: KroneckerFactors | None, mesh: DeviceMesh | None = None
) -> SVD:
    if factors is None:
        raise ValueError("the whitened basis needs Kronecker factors")
    moments = factors.input_covariance, factors.gradient_covariance
    return whitened_svd(kernels, *moments, damping=WHITENING_DAMPING, mesh=mesh)


@partial(jax.jit, static_argnames=("layout", "component_score", "channel_score", "count"))
def gradot_terms(
    layout: Layout,
    layer: Maps,
    parts: Parts,
    factors: Factors | None,
    component_score: str = "l1",
    channel_score: ChannelScore = "l1",
    lambda_mlp: jax.Array | float = 0.0,
    count: int | None = None,
) -> LayerTerms:
    """GCS of every component and channel (GradOT).

    Args:
        layout: of the layer.
        layer: its maps by site.
        parts: components of its low-rank sites.
        factors: of the same layer.
        component_score: `l1` is the paper's; `quadratic`; `whitened` for a whitened decomposition.
        channel_score: `l1` is the paper's; `gcs-set` searches with it for a set, and yields costs
            with lambda's term in them; `token-fisher` reads the removal Fisher of the channels.
        lambda_mlp: for `gcs-set`.
        count: channels to keep, for `gcs-set`; None where scores decide.

    Raises:
        ValueError: without the factors that a score needs.
    """
    factors = required(factors, "the gradient-preserving score")
    components = component_scores(_COMPONENT_TERMS[component_score], parts, factors)
    if channel_score == "l1":
        return LayerTerms(components, channel_terms(layout.channels, layer, factors))
    if channel_score == "gcs-set":
        costs = channel_set_costs(layout.channels, layer, factors, lambda_mlp, count)
        return LayerTerms(components, ScoreTerms(costs, jnp.zeros_like(costs)))
    fisher = factors[layout.channels.out].removal_fisher
    if fisher is None:
        raise ValueError(
            f"the token-Fisher score of channels needs the removal Fisher of {layout.channels.out}"
        )
    gradient = channel_gradient(layout.channels, layer, factors)
    return LayerTerms(components, ScoreTerms(elimination_costs(fisher), gradient))
