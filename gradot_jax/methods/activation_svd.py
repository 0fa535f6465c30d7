"""`activation-svd`: singular values in the norm of the inputs (SVD-LLM, Wang et al. 2024).

Channels, which SVD-LLM leaves alone, go by the energy that they add to the output.
"""

from functools import partial

import jax

from gradot_jax.compression.score import LayerTerms, channel_energy, without_gradient
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.linalg.whitened import whitened_svd
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.methods.scored import (
    WHITENING_DAMPING,
    Factors,
    Maps,
    Parts,
    ScoringRule,
    required,
    shrink_layers,
)
from gradot_jax.nn.layout import Layout
from gradot_jax.parallel import DeviceMesh


def compress(problem: Problem) -> Outcome:
    """Looks at what enters each map, never at gradients."""
    return shrink_layers(problem, lambda layer: ACTIVATION_SVD)


def _whitened(
    kernels: jax.Array, factors: KroneckerFactors | None, mesh: DeviceMesh | None = None
) -> SVD:
    if factors is None:
        raise ValueError("the whitened basis needs Kronecker factors")
    return whitened_svd(kernels, factors.input_covariance, damping=WHITENING_DAMPING, mesh=mesh)


@partial(jax.jit, static_argnames=("layout",))
def activation_terms(
    layout: Layout, layer: Maps, parts: Parts, factors: Factors | None
) -> LayerTerms:
    """Whitened singular values; the root mean square of what each channel adds to the output."""
    out = layout.channels.out
    factors = required(factors, "the activation-aware score")
    values = {site: svd.values for site, svd in parts.items()}
    return without_gradient(values, channel_energy(layer[out], factors[out]))


ACTIVATION_SVD = ScoringRule(_whitened, activation_terms)
