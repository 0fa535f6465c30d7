import pytest

from gradot_jax.compression.options import CompressionOptions
from gradot_jax.offsite.method import Problem
from gradot_jax.offsite.methods.random import compress
from gradot_jax.offsite.split import AdapterSpec


@pytest.fixture(scope="module")
def layers(toy_model):
    config, params = toy_model()

    def run(seed):
        options = CompressionOptions(method="random", budget=0.5, seed=seed)
        return compress(Problem(config, params, AdapterSpec(1, 1), [], options)).layers

    return run


def test_choice_follows_the_seed_and_differs_between_layers(layers):
    first = layers(0)
    assert layers(0) == first
    assert len({plan.channels for plan in (*first, *layers(1))}) == 6


def test_floor_of_ranks_is_kept(layers):
    for plan in layers(0):
        assert all(0 in kept and len(kept) == 2 for _, kept in plan.components)
