"""Scoring rules: how each method takes a layer apart and scores the parts.

A rule is two functions, see `ScoringRule`. A new one is a few lines here.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gradot_jax.compression.channel import elimination_costs
from gradot_jax.compression.layer import LayerFactors, LayerTerms, LayerWeights, ScoringRule
from gradot_jax.compression.options import AttentionBasis, AttentionScore, ChannelScore
from gradot_jax.compression.score import (
    ScoreTerms,
    channel_energy,
    channel_gradient,
    channel_norms,
    channel_terms,
    component_terms,
    quadratic_terms,
    whitened_terms,
)
from gradot_jax.linalg.svd import SVD, svd
from gradot_jax.linalg.whitened import whitened_svd
from gradot_jax.parallel import DeviceMesh

WHITENING_DAMPING = 1e-4
"""Ridge on the factors that whiten a kernel, relative to their mean diagonal."""

_COMPONENT_TERMS = {
    "l1": component_terms,
    "quadratic": quadratic_terms,
    "whitened": whitened_terms,
}


def _needed(factors: LayerFactors | None, why: str) -> LayerFactors:
    if factors is None:
        raise ValueError(f"{why} needs Kronecker factors")
    return factors


def _plain(kernels: jax.Array, factors: LayerFactors | None, mesh: DeviceMesh | None = None) -> SVD:
    del factors
    return svd(kernels, mesh=mesh)


def _whitened(
    kernels: jax.Array, factors: LayerFactors | None, mesh: DeviceMesh | None = None
) -> SVD:
    attention = _needed(factors, "the whitened basis").attention
    moments = attention.input_covariance, attention.gradient_covariance
    return whitened_svd(kernels, *moments, damping=WHITENING_DAMPING, mesh=mesh)


def _input_whitened(
    kernels: jax.Array, factors: LayerFactors | None, mesh: DeviceMesh | None = None
) -> SVD:
    moments = _needed(factors, "the whitened basis").attention.input_covariance
    return whitened_svd(kernels, moments, damping=WHITENING_DAMPING, mesh=mesh)


@partial(jax.jit, static_argnames=("component_score", "channel_score"))
def gradot_terms(
    weights: LayerWeights,
    decomposition: SVD,
    factors: LayerFactors | None,
    component_score: str = "l1",
    channel_score: ChannelScore = "l1",
) -> LayerTerms:
    """GCS of every component and channel (GradOT).

    Args:
        weights: the layer.
        decomposition: of its attention kernels.
        factors: of the same layer.
        component_score: `l1` is the paper's; `quadratic`; `whitened` for a whitened decomposition.
        channel_score: `l1` is the paper's; `token-fisher` reads the removal Fisher of fc2.
    """
    factors = _needed(factors, "the gradient-preserving score")
    components = jax.vmap(_COMPONENT_TERMS[component_score])(decomposition, factors.attention)
    maps = weights.fc1, weights.fc2, factors.fc1, factors.fc2
    if channel_score == "l1":
        return LayerTerms(components, channel_terms(*maps))
    if factors.fc2.removal_fisher is None:
        raise ValueError("the token-Fisher score of channels needs the removal Fisher of fc2")
    costs = elimination_costs(factors.fc2.removal_fisher)
    return LayerTerms(components, ScoreTerms(costs, channel_gradient(*maps)))


def gradot_rule(
    attention_score: AttentionScore = "l1",
    attention_basis: AttentionBasis = "svd",
    channel_score: ChannelScore = "l1",
) -> ScoringRule:
    """The gradient-preserving score; the defaults are the paper's formulas.

    Args:
        attention_score: of components; a whitened basis brings its own, the quadratic form, in
            which its order is a prefix.
        attention_basis: `svd` or the two-sided `whitened`.
        channel_score: of channels.
    """
    whitened = attention_basis == "whitened"
    component_score = "whitened" if whitened else attention_score
    terms = partial(gradot_terms, component_score=component_score, channel_score=channel_score)
    return (
        ScoringRule(_whitened, terms)
        if whitened
        else ScoringRule(_plain, terms, decomposes_alone=True)
    )


@jax.jit
def magnitude_terms(
    weights: LayerWeights, decomposition: SVD, factors: LayerFactors | None
) -> LayerTerms:
    """Singular values, and the Euclidean norm of each channel's weights in fc1 and fc2."""
    del factors
    return _without_gradient(decomposition.values, channel_norms(weights.fc1, weights.fc2))


MAGNITUDE = ScoringRule(_plain, magnitude_terms, decomposes_alone=True)


@jax.jit
def activation_terms(
    weights: LayerWeights, decomposition: SVD, factors: LayerFactors | None
) -> LayerTerms:
    """Whitened singular values, and the root mean square of what each channel adds through fc2."""
    fc2 = _needed(factors, "the activation-aware score").fc2
    return _without_gradient(decomposition.values, channel_energy(weights.fc2, fc2))


ACTIVATION_SVD = ScoringRule(_input_whitened, activation_terms)


def random_rule(seed: int, layer: int) -> ScoringRule:
    """Uniform scores: the floor for every rule that looks at something.

    Args:
        seed: of the draw.
        layer: index of the layer; each has a draw of its own.
    """

    def terms(weights: LayerWeights, decomposition: SVD, factors: LayerFactors | None):
        del factors
        of_components, of_channels = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), layer)
        )
        return _without_gradient(
            jax.random.uniform(of_components, decomposition.values.shape),
            jax.random.uniform(of_channels, (weights.fc1.shape[1],)),
        )

    return ScoringRule(_plain, terms, decomposes_alone=True)


def _without_gradient(components: jax.Array, channels: jax.Array) -> LayerTerms:
    return LayerTerms(*(ScoreTerms(s, jnp.zeros_like(s)) for s in (components, channels)))
