"""What is said of a compression before it starts is what it yields."""

import dataclasses

import jax
import pytest

from gradot_jax.compression.plan import HarmonizerShape
from gradot_jax.memory.forecast import forecast, kernel_parameters
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import count_params, get_block
from gradot_jax.models.split import AdapterSpec

SPLIT = AdapterSpec(1, 1)
OPTIONS = {
    "gradot": {"budget": 0.5},
    "magnitude": {"budget": 0.8, "attention_budget": 1.0, "mlp_budget": 0.3},
    "random": {"budget": 0.7, "rank_multiple": 2, "channel_multiple": 4},
    "layer-drop": {"budget": 0.7},
    "empty": {},
}


def num_in_kernels(stacks) -> int:
    """Entries of all that is a matrix in each layer."""
    flat = jax.tree.leaves_with_path(stacks)
    return sum(leaf.size for path, leaf in flat if path[-1].name in ("kernel", "left", "right"))


@pytest.mark.parametrize("method", OPTIONS)
def test_shapes_and_parameters_are_those_of_the_emulator(method, toy_model, toy_batch):
    config, params = toy_model()
    options = CompressionOptions(method=method, **OPTIONS[method])
    result = run_compression(config, params, SPLIT, [toy_batch(size=2)], options)
    outlook = forecast(config, SPLIT, options)
    assert outlook.shapes == result.plan.emulator.shapes
    assert outlook.shipped == count_params(result.emulator)
    assert outlook.kept == count_params(result.emulator.middle)
    assert outlook.original == count_params(params)
    assert outlook.middle == 3 * count_params(config.family.block_shapes(config))
    kept, layer = num_in_kernels(result.emulator.middle), get_block(params.segments[0], 0)
    kernels = outlook.kept_kernels, outlook.middle_kernels
    assert kernels == (kept, 3 * num_in_kernels(layer))
    assert kernels == kernel_parameters(config, result.plan)


def test_what_shares_adapter_blocks_stores_no_more_layers_than_forecast(toy_model, toy_batch):
    config, params = toy_model(num_hidden_layers=8)
    options = CompressionOptions(method="crash", budget=0.7)
    result = run_compression(config, params, SPLIT, [toy_batch(size=2)], options)
    outlook = forecast(config, SPLIT, options)
    assert len(result.plan.layers) <= len(outlook.shapes) == 4
    assert set(result.plan.emulator.shapes) == set(outlook.shapes)


def test_harmonizers_are_as_many_as_the_method_will_train(toy_model):
    config, _ = toy_model()
    options = CompressionOptions(method="scaleot", budget=0.5)
    options = dataclasses.replace(
        options, scaleot=dataclasses.replace(options.scaleot, harmonizer_rank=2)
    )
    shapes = forecast(config, SPLIT, options).shapes
    kinds = [isinstance(shape, HarmonizerShape) for shape in shapes]
    assert len(shapes) == 3 and 0 < sum(kinds) < 3


def test_a_budget_shared_between_layers_keeps_no_more_than_forecast(toy_model, toy_batch):
    config, params = toy_model()
    options = CompressionOptions(method="magnitude", budget=0.5, allocation="global")
    result = run_compression(config, params, SPLIT, [toy_batch(size=2)], options)
    kept = count_params(result.emulator.middle)
    assert kept == pytest.approx(forecast(config, SPLIT, options).kept, rel=0.1)


def test_sizes_need_no_arrays():
    before = len(jax.live_arrays())
    large = OPTConfig(
        hidden_size=12288,
        word_embed_proj_dim=12288,
        ffn_dim=49152,
        num_hidden_layers=96,
        num_attention_heads=96,
    )
    outlook = forecast(large, AdapterSpec(2, 2), CompressionOptions(budget=0.6))
    assert 1.7e11 < outlook.original < 1.8e11
    assert len(jax.live_arrays()) == before
