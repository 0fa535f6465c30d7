"""`activation-svd`: singular values in the norm of the inputs (SVD-LLM, Wang et al. 2024).

Channels, which SVD-LLM leaves alone, go by the energy that they add to the output.
"""

from gradot_jax.compression.rule import ACTIVATION_SVD
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.shrink import shrink_layers


def compress(problem: Problem) -> Outcome:
    """Looks at what enters each map, never at gradients."""
    return shrink_layers(problem, lambda layer: ACTIVATION_SVD)
