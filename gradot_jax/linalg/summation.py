"""Compensated summation of trees: float32 sums that do not drift with the number of terms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class RunningSum(NamedTuple):
    """A sum and the rounding error it owes (Kahan).

    Attributes:
        total: tree of arrays.
        owed: tree of the same shapes, to be subtracted from the next term.
    """

    total: Any
    owed: Any


def zero_sum(like: Any) -> RunningSum:
    """The empty sum of trees shaped like `like`."""
    zeros = jax.tree.map(jnp.zeros_like, like)
    return RunningSum(zeros, zeros)


def add(running: RunningSum, term: Any) -> RunningSum:
    """Adds one tree, carrying the rounding error along."""
    due = jax.tree.map(jnp.subtract, term, running.owed)
    total = jax.tree.map(jnp.add, running.total, due)
    owed = jax.tree.map(lambda new, old, d: (new - old) - d, total, running.total, due)
    return RunningSum(total, owed)
