import numpy as np
import pytest

from gradot_jax.compression.options import CompressionOptions
from gradot_jax.offsite.method import Problem
from gradot_jax.offsite.methods.activation_svd import compress
from gradot_jax.offsite.split import AdapterSpec, split_blocks


@pytest.fixture(scope="module")
def outcome(toy_model, toy_batch):
    config, params = toy_model()
    options = CompressionOptions(method="activation-svd", budget=0.5)
    return compress(Problem(config, params, AdapterSpec(1, 1), [toy_batch()], options))


def test_kept_are_the_first_components_and_the_channels_of_most_energy(outcome):
    for layer, plan in enumerate(outcome.layers):
        assert [kept for _, kept in plan.components] == [(0, 1)] * 4
        energy = outcome.scores["channels_hessian"][layer]
        assert set(plan.channels) == set(np.argsort(-energy)[: len(plan.channels)])
    assert not outcome.scores["components_gradient"].any()


def test_maps_are_low_rank_and_biases_untouched(outcome, toy_model):
    _, params = toy_model()
    _, middle = split_blocks(params, AdapterSpec(1, 1))
    for layer, block in enumerate(outcome.blocks):
        assert block.q_proj.rank == 2
        np.testing.assert_array_equal(block.q_proj.bias, middle.q_proj.bias[layer])
        np.testing.assert_array_equal(block.fc2.bias, middle.fc2.bias[layer])
