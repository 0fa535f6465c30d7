import jax
import numpy as np
import pytest

from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_runs_again_and_again_and_its_results_are_finite(name):
    workload = WORKLOADS["smoke"]
    phase = PHASES[name](workload)
    for _ in range(2):
        result = phase.run(*phase.prepare())
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    assert all(np.isfinite(array).all() for array in arrays)
    assert phase.tokens == phase.batches * workload.tokens
    assert phase.flops > 0 and phase.bytes > 0
