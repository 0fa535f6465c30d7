import jax
import numpy as np
import pytest

from benchmarks.phases import PHASES, lower_gradient, lower_step, lower_sweep
from benchmarks.workloads import STEPS, WORKLOADS

SMOKE = WORKLOADS["cpu"]["smoke"]
LLAMA = WORKLOADS["cpu"]["smoke-llama"]


# The unit and the step of the full model are run where a suite is.
@pytest.mark.parametrize(
    ("name", "workload"),
    [
        *((name, SMOKE) for name in sorted(PHASES.keys() - {"gradient", "step_full"})),
        *((name, LLAMA) for name in ("factor_sweep", "packaging", "selection", "step_emulator")),
    ],
)
def test_a_phase_runs_again_and_again_and_its_results_are_finite(name, workload):
    phase = PHASES[name](workload)
    arguments = phase.prepare()
    before = jax.device_get(arguments)
    for _ in range(2):
        result = phase.run(*arguments)
        arguments = phase.advance(arguments, result) if phase.advance else phase.prepare()
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    assert all(np.isfinite(array).all() for array in arrays)
    assert phase.tokens == phase.batches * SMOKE.tokens
    assert phase.cost.bytes > 0
    if name == "step_all":
        weights = zip(*(jax.tree.leaves(found[0][0]) for found in (before, result)), strict=True)
        assert all((old != new).any() for old, new in weights)
        assert result[1] > 0


def test_a_phase_that_is_the_same_for_each_layer_says_how_many_there_are():
    times = {name: PHASES[name](SMOKE).times for name in ("decomposition", "selection", "gradient")}
    assert times == {"decomposition": 2, "selection": 2, "gradient": 1}


@pytest.mark.parametrize(
    ("name", "kernels"), [("opt-6.7b", ["4096x16384"]), ("llama-1b", ["2048x512", "2048x8192"])]
)
def test_the_sweep_is_lowered_from_shapes_alone_for_a_model_that_no_cpu_holds(name, kernels):
    text = lower_sweep(WORKLOADS["device"][name]).as_text()
    assert all(kernel in text for kernel in kernels)


def _arguments(lowered: jax.stages.Lowered) -> list:
    """What a program takes, and whether it may write over it."""
    return [(info.shape, info.dtype, info.donated) for info in jax.tree.leaves(lowered.args_info)]


@pytest.mark.parametrize("workload", [SMOKE, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_lowered_from_shapes_takes_what_the_one_that_runs_takes(kind, workload):
    phase = PHASES[kind](workload)
    shaped = _arguments(lower_step(workload, kind))
    assert shaped == _arguments(phase.run.lower(*phase.prepare()))
    assert any(donated for *_, donated in shaped)


def test_the_gradient_lowered_from_shapes_is_the_one_that_runs():
    phase = PHASES["gradient"](SMOKE)
    assert lower_gradient(SMOKE).as_text() == phase.run.lower(*phase.prepare()).as_text()
