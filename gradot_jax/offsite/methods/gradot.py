"""`gradot`: the gradient-preserving compression score, and what was found to improve on it."""

from gradot_jax.compression.rule import gradot_rule
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.shrink import shrink_layers


def compress(problem: Problem) -> Outcome:
    """The paper's formulas by default; options name each departure."""
    options = problem.options
    rule = gradot_rule(options.attention_score, options.attention_basis, options.channel_score)
    return shrink_layers(problem, lambda layer: rule)
