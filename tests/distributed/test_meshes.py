"""Whole stages of the work on meshes of eight devices, against a single device."""

import jax
import numpy as np
import optax
import pytest

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.calibration.passes import forward_layer, sweep_layer
from gradot_jax.calibration.sweep import kronecker_factors
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import make_mesh
from gradot_jax.training.adapter import evaluation_step, finetune_adapter, train_step

CONFIG = OPTConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=5,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=8,
    word_embed_proj_dim=16,
)
SPEC = AdapterSpec(1, 1)
OPTIONS = CompressionOptions(budget=0.6)
MESHES = [(1, 1), (2, 1), (1, 2), (8, 1), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        return (float(path[-1].name == "scale") + 0.2 * rng.normal(size=leaf.shape)).astype("f4")

    shapes = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    return jax.tree.map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def batches():
    """Three batches of eight sequences, of which one ends in padding."""
    tokens = np.random.default_rng(1).integers(3, 24, (3, 8, 9)).astype(np.int32)
    mask = np.ones((3, 8, 8), np.int32)
    mask[1, 2, 5:] = 0
    return [
        Batch(ids[:, :-1], ids[:, 1:], real.astype(np.float32), real)
        for ids, real in zip(tokens, mask, strict=True)
    ]


def compress(params, batches, mesh):
    return run_compression(CONFIG, params, SPEC, batches, OPTIONS, mesh=mesh)


@pytest.fixture(scope="module")
def single(params, batches):
    return compress(params, batches, None)


@pytest.fixture(scope="module")
def single_factors(params, batches):
    return dict(kronecker_factors(CONFIG, params, SPEC, batches))


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_compression_on_a_mesh_is_that_on_one_device_and_compiles_a_layer_once(
    params, batches, single, data, model, assert_close, with_signs_of
):
    compiled = forward_layer._cache_size(), sweep_layer._cache_size()
    result = compress(params, batches, make_mesh(data, model))
    assert forward_layer._cache_size() <= compiled[0] + 1
    # Once for the adapter, whose factors nobody reads, and once for all of the middle.
    assert sweep_layer._cache_size() <= compiled[1] + 2
    assert result.plan == single.plan
    assert_close(result.scores, single.scores, "float32_model")
    got = with_signs_of(single.emulator, result.emulator)
    assert_close(got, single.emulator, "float32_model")


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_factors_and_gradients_on_a_mesh_are_those_on_one_device(
    params, batches, single_factors, data, model, assert_close
):
    mesh = make_mesh(data, model)
    factors = dict(kronecker_factors(CONFIG, params, SPEC, batches, mesh=mesh))
    # Rows of factors are spread over all devices.
    assert factors[0]["fc2"].input_covariance.addressable_shards[0].data.shape == (32 // 8, 32)
    for of_layer in (*factors.values(), *single_factors.values()):
        # Softmax does not see the bias of the keys: its gradient is rounding.
        of_layer["k_proj"] = of_layer["k_proj"]._replace(gradient=None)
    assert_close(factors, single_factors, "float32_model")


def test_fidelity_on_a_mesh_is_that_on_one_device(params, batches, single):
    on_mesh, alone = (
        gradient_fidelity(CONFIG, params, single.emulator, batches, mesh=mesh)
        for mesh in (make_mesh(4, 2), None)
    )
    flat = [jax.tree.leaves(fidelity) for fidelity in (on_mesh, alone)]
    np.testing.assert_allclose(*flat, rtol=2e-5)


def test_tuning_with_validation_on_a_mesh_compiles_each_step_once(single, batches):
    compiled = train_step._cache_size(), evaluation_step._cache_size()
    finetune_adapter(
        CONFIG,
        single.emulator,
        batches,
        optax.sgd(1e-2),
        num_steps=3,
        validation_batches=batches,
        evaluate_every=1,
        mesh=make_mesh(4, 2),
    )
    assert train_step._cache_size() == compiled[0] + 1
    assert evaluation_step._cache_size() == compiled[1] + 1
