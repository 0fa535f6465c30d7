import jax
import numpy as np
import pytest

from benchmarks.phases import PHASES, lower_sweep
from benchmarks.workloads import WORKLOADS

SMOKE = WORKLOADS["cpu"]["smoke"]


# The others are run in the tests of a run and of steps.
@pytest.mark.parametrize("name", sorted(PHASES.keys() - {"gradient", "step_full", "step_all"}))
def test_a_phase_runs_again_and_again_and_its_results_are_finite(name):
    phase = PHASES[name](SMOKE)
    arguments = phase.prepare()
    for _ in range(2):
        result = phase.run(*arguments)
        arguments = phase.advance(arguments, result) if phase.advance else phase.prepare()
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    assert all(np.isfinite(array).all() for array in arrays)
    assert phase.tokens == phase.batches * SMOKE.tokens
    assert phase.cost.bytes > 0


def test_a_phase_that_is_the_same_for_each_layer_says_how_many_there_are():
    times = {name: PHASES[name](SMOKE).times for name in ("decomposition", "selection", "gradient")}
    assert times == {"decomposition": 2, "selection": 2, "gradient": 1}


def test_the_sweep_is_lowered_from_shapes_alone_for_a_model_that_no_cpu_holds():
    text = lower_sweep(WORKLOADS["device"]["opt-6.7b"]).as_text()
    assert "4096x16384" in text
