import jax
import numpy as np
import pytest

from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS


# The other two, a gradient and a step, are measured from end to end in the test of a run.
@pytest.mark.parametrize("name", [n for n in PHASES if n not in ("gradient", "step_full")])
def test_a_phase_runs_again_and_again_and_its_results_are_finite(name):
    workload = WORKLOADS["smoke"]
    phase = PHASES[name](workload)
    for _ in range(2):
        result = phase.run(*phase.prepare())
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    assert all(np.isfinite(array).all() for array in arrays)
    assert phase.tokens == phase.batches * workload.tokens
    assert phase.flops > 0 and phase.bytes > 0
