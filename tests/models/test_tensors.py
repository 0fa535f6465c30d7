import jax
import numpy as np
import pytest

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.models.tensors import (
    adapter_from_tensors,
    adapter_schema,
    adapter_to_tensors,
    count_kernels,
    layer_shapes,
    middle_layer_from_tensors,
    middle_prefix,
    middle_schema,
    middle_to_tensors,
    model_schema,
    params_to_tensors,
    shell_from_tensors,
)

DENSE = LayerShape(ranks=tuple((site, None) for site in LAYOUT.low_rank), num_channels=12)
CUT = LayerShape(ranks=(("q_proj", 2), ("k_proj", None), ("out_proj", 3)), num_channels=5)
SHAPES = (DENSE, CUT, HarmonizerShape(rank=3))
VARIANTS = [{}, {"enable_bias": False}, {"layer_norm_elementwise_affine": False}]


def drawn(config, shape):
    """A layer of this shape with random weights, on the host."""
    rng = np.random.default_rng(0)
    shapes = layer_shapes(config, shape)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("changes", [*VARIANTS, {"word_embed_proj_dim": 4}])
def test_a_model_is_stored_as_its_schema_says_in_that_order(changes, toy_model):
    config, params = toy_model(**changes)
    tensors = dict(params_to_tensors(config, params))
    schema = model_schema(config)
    assert [(name, array.shape) for name, array in tensors.items()] == list(schema.items())
    assert_same(shell_from_tensors(config, tensors), params.shell)


@pytest.mark.parametrize("changes", VARIANTS)
def test_compressed_layers_are_stored_as_their_schema_says_and_come_back(changes, toy_model):
    config, _ = toy_model(**changes)
    layers = [drawn(config, shape) for shape in SHAPES]
    tensors = dict(middle_to_tensors(layers, config, SHAPES))
    assert {name: array.shape for name, array in tensors.items()} == middle_schema(config, SHAPES)
    for index, (layer, shape) in enumerate(zip(layers, SHAPES, strict=True)):
        again = middle_layer_from_tensors(config, shape, tensors, middle_prefix(index))
        assert_same(again, layer)
    matrices = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 2]
    assert count_kernels(middle_schema(config, SHAPES)) == sum(leaf.size for leaf in matrices)


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        (SHAPES[:2], "more compressed layers than 2"),
        ((*SHAPES, DENSE), "fewer compressed layers than 4"),
        ((CUT, *SHAPES[1:]), "middle layer 0, q_proj: got Dense .* planned LowRank"),
        ((*SHAPES[:2], HarmonizerShape(rank=2)), r"middle layer 2, down: got Dense \[\(8, 3\)"),
        ((*SHAPES[:2], DENSE), "middle layer 2: planned .* got a Harmonizer"),
    ],
)
def test_layers_that_are_not_the_planned_ones_are_refused(planned, reason, toy_model):
    config, _ = toy_model()
    layers = [drawn(config, shape) for shape in SHAPES]
    with pytest.raises(InputError, match=reason):
        list(middle_to_tensors(layers, config, planned))


def test_an_adapter_has_the_names_of_its_layers_in_the_full_model_and_comes_back(toy_model):
    config, params = toy_model()
    split = AdapterSpec(1, 1, (2,))
    tensors = dict(adapter_to_tensors(config, adapter_of(params, split)))
    assert {name: array.shape for name, array in tensors.items()} == adapter_schema(config, split)
    assert {name.split("layers.")[1][0] for name in tensors} == {"0", "2", "4"}
    assert tensors.keys() < model_schema(config).keys()
    assert_same(adapter_from_tensors(config, split, tensors), adapter_of(params, split))
