import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.phases import PHASES
from benchmarks.workloads import SUITES, WORKLOADS
from gradot_jax.models.params import count_params
from gradot_jax.models.run import forward

SMOKE = WORKLOADS["cpu"]["smoke"]
ALL = [workload for suite in SUITES for workload in WORKLOADS[suite].values()]


def test_random_weights_and_text_have_the_shapes_of_the_workload():
    params, batches = SMOKE.params(), SMOKE.batches()
    assert params.num_layers == 4 and len(batches) == SMOKE.num_batches
    assert batches[0].input_ids.shape == (SMOKE.batch_size, SMOKE.length)
    assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, _zeros(SMOKE.shapes()))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def _zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def test_no_two_rows_of_a_random_matrix_are_equal():
    kernel = np.asarray(SMOKE.params().segments[0].fc1.kernel[0])
    assert np.linalg.matrix_rank(kernel) == min(kernel.shape)


def test_the_emulator_runs_and_has_the_budgeted_share_of_the_middle():
    emulator = SMOKE.emulator()
    logits = forward(SMOKE.config, emulator.assemble(), SMOKE.batches()[0].input_ids)
    assert logits.shape == (SMOKE.batch_size, SMOKE.length, SMOKE.config.vocab_size)
    full, small = (count_params(tree) for tree in (SMOKE.params().segments, (emulator.middle,) * 2))
    assert small / full == pytest.approx(SMOKE.budget, abs=0.06)


def test_shapes_of_the_papers_models_have_their_parameters():
    sizes = {"opt-125m": 125e6, "opt-1.3b": 1.3e9, "opt-6.7b": 6.7e9}
    for name, size in sizes.items():
        shapes = WORKLOADS["device"][name].shapes()
        assert count_params(shapes) == pytest.approx(size, rel=0.02)


def test_accelerators_calibrate_on_128_sequences_of_2048_tokens():
    for name in ("opt-125m", "opt-1.3b", "opt-6.7b"):
        workload = WORKLOADS["device"][name]
        assert workload.num_batches * workload.tokens == 128 * 2048


def test_workloads_name_phases_that_exist():
    assert set(itertools.chain(*(workload.phases for workload in ALL))) <= PHASES.keys()
