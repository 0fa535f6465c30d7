"""Models whose heads a mesh axis does not divide, all or those of keys, against a single device."""

import functools

import jax
import numpy as np
import pytest

from gradot_jax.calibration.sweep import kronecker_factors
from gradot_jax.models.families import read_config
from gradot_jax.models.params import init_params
from gradot_jax.models.partition import place, place_batch
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import make_mesh

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "9 heads on 3": {
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 2,
        "attention_bias": True,
    },
    "8 heads on 2": {
        "model_type": "qwen3",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 0,
    },
}
MESHES = [
    ("9 heads on 3", 1, 1),
    ("9 heads on 3", 1, 2),
    ("9 heads on 3", 1, 3),
    ("9 heads on 3", 8, 1),
    ("8 heads on 2", 2, 4),
]
"""A model, devices along `data` and along `model`."""


@functools.cache
def build(name):
    """Configuration and weights, every parameter random."""
    config = read_config(SIZES | MODELS[name])
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        return (float(path[-1].name == "scale") + 0.3 * rng.normal(size=leaf.shape)).astype("f4")

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return config, jax.tree.map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def batch():
    """Eight sequences, of which one ends in padding."""
    tokens = np.random.default_rng(1).integers(0, 24, (8, 7)).astype(np.int32)
    mask = np.ones((8, 6), np.int32)
    mask[2, 4:] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32), mask)


def loss_and_gradient(config, params, batch, mesh):
    function = jax.jit(jax.value_and_grad(lambda p, b: summed_loss(config, p, b)[0]))
    return function(place(params, mesh), place_batch(batch, mesh))


def factors(config, params, batch, mesh):
    return dict(kronecker_factors(config, params, AdapterSpec(1, 1), [batch], mesh=mesh))


@pytest.fixture(scope="module")
def single(batch):
    """Results of one device, computed once for each model."""
    return functools.cache(
        lambda name: (
            loss_and_gradient(*build(name), batch, None),
            factors(*build(name), batch, None),
        )
    )


@pytest.mark.parametrize(("name", "data", "model"), MESHES)
def test_loss_gradients_and_factors_are_those_on_one_device(
    name, data, model, batch, single, assert_close
):
    (config, params), mesh = build(name), make_mesh(data, model)
    expected = single(name)
    assert_close(loss_and_gradient(config, params, batch, mesh), expected[0], "float32_model")
    assert_close(factors(config, params, batch, mesh), expected[1], "float32_model")
