"""`random`: components and channels drawn at random, the floor for every scoring rule."""

from gradot_jax.compression.rule import random_rule
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.shrink import shrink_layers


def compress(problem: Problem) -> Outcome:
    """Draws by the seed of the options; the floor of ranks is kept as in every method."""
    return shrink_layers(problem, lambda layer: random_rule(problem.options.seed, layer))
