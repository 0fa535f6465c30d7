import jax
import pytest

from benchmarks.phases import PHASES
from benchmarks.steps import lower_gradient, lower_step
from benchmarks.workloads import WORKLOADS

SMOKE = WORKLOADS["cpu"]["smoke"]


def arguments(lowered: jax.stages.Lowered) -> list:
    """What a program takes, and whether it may write over it."""
    return [(info.shape, info.dtype, info.donated) for info in jax.tree.leaves(lowered.args_info)]


@pytest.mark.parametrize("kind", ["step_emulator", "step_full", "step_all"])
def test_a_step_lowered_from_shapes_takes_what_the_one_that_runs_takes(kind):
    phase = PHASES[kind](SMOKE)
    shaped = arguments(lower_step(SMOKE, kind))
    assert shaped == arguments(phase.run.lower(*phase.prepare()))
    assert any(donated for *_, donated in shaped)


def test_the_gradient_lowered_from_shapes_is_the_one_that_runs():
    phase = PHASES["gradient"](SMOKE)
    assert lower_gradient(SMOKE).as_text() == phase.run.lower(*phase.prepare()).as_text()


def test_a_step_of_all_weights_changes_all_of_them():
    phase = PHASES["step_all"](SMOKE)
    arguments = phase.prepare()
    before = jax.device_get(arguments[0][0])
    (after, _), loss = phase.run(*arguments)
    assert loss > 0
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), before, after)
    assert all(jax.tree.leaves(changed))
