import math

import jax
import numpy as np
import pytest

from gradot_jax.models.opt.forward import forward
from gradot_jax.models.opt.params import depth
from gradot_jax.offsite.compress import compress
from gradot_jax.offsite.emulator import split_model
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.split import AdapterSpec
from gradot_jax.offsite.stacking import few_stacks
from gradot_jax.offsite.training import init_training, train_step

IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def ragged(toy_model):
    """A configuration and an emulator whose layers all differ."""
    config, params = toy_model()
    options = {"method": "magnitude", "budget": 0.5, "allocation": "global"}
    return config, compress(config, params, AdapterSpec(1, 1), (), **options)[1]


@pytest.mark.parametrize("waste", [0.0, 0.2, math.inf])
def test_fewer_stacks_are_the_same_function(ragged, waste, assert_close):
    config, emulator = ragged
    stacked = few_stacks(emulator, waste=waste)
    assert len(stacked.middle) <= len(emulator.middle)
    logits = [forward(config, e.assemble(), IDS) for e in (stacked, emulator)]
    assert_close(*logits, "float32_model")


def test_inner_blocks_stay_where_they_run(toy_model, assert_close):
    config, params = toy_model()
    singles = few_stacks(split_model(params, AdapterSpec(1, 1, (2,))), waste=math.inf)
    assert [depth(stack) for stack in singles.middle] == [1, 1]
    logits = [forward(config, p, IDS) for p in (singles.assemble(), params)]
    assert_close(*logits, "float32_model")


def test_a_model_on_the_host_is_trained_in_few_stacks(toy_model, on_host):
    _, params = toy_model()
    model = split_model(on_host(params), AdapterSpec(1, 1))
    assert [depth(stack) for stack in model.middle] == [1, 1, 1]
    frozen, _ = init_training(model, make_optimizer(learning_rate=0.1, num_steps=2))
    assert [depth(stack) for stack in frozen.middle] == [3]


def test_a_step_in_padded_layers_moves_the_adapter_alike(ragged, toy_batch, assert_close):
    config, emulator = ragged
    optimizer = make_optimizer(learning_rate=0.1, num_steps=2)
    batch = toy_batch(size=2)

    def tuned(model):
        frozen, state = init_training(model, optimizer)
        return train_step(config, optimizer, state, frozen, batch)

    (state, metrics), (expected, wanted) = map(tuned, (few_stacks(emulator, waste=9.0), emulator))
    assert_close(metrics.loss, wanted.loss, "float32_model")
    assert_close(metrics.gradient_norm, wanted.gradient_norm, "float32_model")
    assert jax.tree.structure(state.adapter) == jax.tree.structure(expected.adapter)
