"""`empty`: no middle at all, the floor against which every method is measured."""

from gradot_jax.methods.problem import Outcome, Problem


def compress(problem: Problem) -> Outcome:
    """Keeps nothing, whatever the budget."""
    problem.split.check_sandwich("empty")
    return Outcome(layers=[], blocks=[])
