"""`magnitude`: components by singular value, channels by the norm of their weights."""

from gradot_jax.compression.rule import MAGNITUDE
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.shrink import shrink_layers


def compress(problem: Problem) -> Outcome:
    """Reads no calibration text unless a compensation does."""
    return shrink_layers(problem, lambda layer: MAGNITUDE)
