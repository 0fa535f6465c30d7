import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.phases import PHASES
from benchmarks.workloads import SUITES, WORKLOADS, random_array
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


def test_random_numbers_are_drawn_in_their_dtype_and_no_row_of_many_repeats():
    rows = random_array((600, 4096), "bfloat16")
    assert rows.dtype == "bfloat16" and rows.astype("float32").std() == pytest.approx(
        0.02, rel=0.01
    )
    assert len(np.unique(rows.view(np.uint16), axis=0)) == 600


@pytest.mark.parametrize("name", ["smoke", "smoke-llama"])
def test_the_emulator_runs_and_has_the_budgeted_share_of_the_middle(name):
    workload = WORKLOADS["cpu"][name]
    emulator = workload.emulator()
    logits = forward(workload.config, emulator.assemble(), workload.batches()[0].input_ids)
    assert logits.shape == (workload.batch_size, workload.length, workload.config.vocab_size)
    full, small = (
        count_params(tree) for tree in (workload.params().segments, (emulator.middle,) * 2)
    )
    assert small / full == pytest.approx(workload.budget, abs=0.06)


def test_narrow_maps_have_ranks_of_their_own():
    ranks = dict(WORKLOADS["device"]["llama-1b"].layer_shape.ranks)
    # 0.6 of 2048 x 2048 and of 2048 x 512, over the 4096 and 2560 parameters of a component.
    assert ranks == {"q_proj": 614, "k_proj": 245, "v_proj": 245, "o_proj": 614}


def test_shapes_of_the_papers_models_have_their_parameters():
    sizes = {"opt-125m": 125e6, "opt-1.3b": 1.3e9, "opt-6.7b": 6.7e9}
    for name, size in sizes.items():
        shapes = WORKLOADS["device"][name].shapes()
        assert count_params(shapes) == pytest.approx(size, rel=0.02)


def test_shapes_of_llama_models_have_their_parameters():
    sizes = {("cpu", "smollm2-135m"): 134_515_008, ("device", "llama-1b"): 1_235_814_400}
    for (suite, name), size in sizes.items():
        assert count_params(WORKLOADS[suite][name].shapes()) == size


def test_accelerators_calibrate_on_128_sequences_of_2048_tokens():
    for name in ("opt-125m", "opt-1.3b", "opt-6.7b", "llama-1b"):
        workload = WORKLOADS["device"][name]
        assert workload.num_batches * workload.tokens == 128 * 2048


def test_workloads_name_phases_that_exist():
    assert set(itertools.chain(*(workload.phases for workload in ALL))) <= PHASES.keys()
