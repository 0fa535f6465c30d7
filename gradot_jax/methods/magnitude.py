"""`magnitude`: components by singular value, channels by the norm of their weights."""

from functools import partial

import jax

from gradot_jax.compression.score import LayerTerms, channel_norms, without_gradient
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.methods.scored import Factors, Maps, Parts, ScoringRule, plain_svd, shrink_layers
from gradot_jax.nn.layout import Layout


def compress(problem: Problem) -> Outcome:
    """Reads no calibration text unless a compensation does."""
    return shrink_layers(problem, lambda layer: MAGNITUDE)


@partial(jax.jit, static_argnames=("layout",))
def magnitude_terms(
    layout: Layout, layer: Maps, parts: Parts, factors: Factors | None
) -> LayerTerms:
    """Singular values, and the Euclidean norm of each channel's weights in all its maps."""
    del factors
    values = {site: svd.values for site, svd in parts.items()}
    return without_gradient(values, channel_norms(layout.channels, layer))


MAGNITUDE = ScoringRule(plain_svd, magnitude_terms, decomposes_alone=True)
