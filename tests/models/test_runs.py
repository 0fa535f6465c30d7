"""Layers in a row that attend alike run together, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.families import read_config
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Shared, depth, slice_blocks, unstack_blocks
from gradot_jax.models.run import apply_layer, run_blocks, runs

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIG = read_config(
    {
        "model_type": "qwen3",
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "use_sliding_window": True,
        "sliding_window": 2,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, FULL],
        "bos_token_id": None,
        "eos_token_id": None,
    }
)
WINDOWS = [2, 2, None, 2, None, None]


@pytest.fixture
def blocks(random_params):
    return random_params(CONFIG).segments[0]


def places(parts):
    """The window and the first gain of each layer, in the order in which they run."""
    return [
        (window, float(layer.input_layernorm.scale[0]))
        for run, window in parts
        for layer in unstack_blocks([run])
    ]


def test_a_stack_is_cut_where_the_window_changes_and_nowhere_else(blocks):
    gains = blocks.input_layernorm.scale[:, 0].tolist()
    whole = runs(CONFIG, (blocks,))
    assert [(depth(run), window) for run, window in whole] == [(2, 2), (1, None), (1, 2), (2, None)]
    assert places(whole) == list(zip(WINDOWS, gains, strict=True))
    apart = runs(CONFIG, tuple(slice_blocks(blocks, i, i + 3) for i in (0, 3)))
    assert places(apart) == places(whole)
    assert [depth(run) for run, _ in apart] == [2, 1, 1, 2]


def test_blocks_that_run_twice_are_cut_by_the_places_at_which_they_run(blocks):
    gains = blocks.input_layernorm.scale[:, 0].tolist()
    order = (0, 0, 1, 1, 0, 1)
    parts = runs(CONFIG, (Shared(slice_blocks(blocks, 0, 2), order),))
    expected = [(window, gains[i]) for window, i in zip(WINDOWS, order, strict=True)]
    assert places(parts) == expected


def test_a_part_of_a_model_attends_as_its_place_says(blocks):
    part = slice_blocks(blocks, 1, 4)
    got = places(runs(CONFIG, (part,), first=1, num_layers=6))
    assert [window for window, _ in got] == WINDOWS[1:4]
    rest = runs(CONFIG, (slice_blocks(blocks, 3, 6),), first=3)
    assert [window for window, _ in places(rest)] == WINDOWS[3:]


def test_a_model_of_another_depth_does_not_say_which_layers_slide(blocks):
    with pytest.raises(InputError, match="a model of 5 layers does not say which"):
        runs(CONFIG, (slice_blocks(blocks, 0, 5),))


def test_where_all_attend_alike_a_segment_is_taken_as_it_is(toy_model):
    config, params = toy_model()
    assert isinstance(config, OPTConfig)
    ((run, window),) = runs(config, params.segments)
    assert run is params.segments[0] and window is None


def test_output_and_gradient_are_those_of_the_layers_one_after_another(blocks, assert_close):
    blocks = jax.tree.map(lambda leaf: 0.3 * leaf, blocks)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)

    def one_by_one(blocks):
        x = hidden
        for layer, window in zip(unstack_blocks([blocks]), WINDOWS, strict=True):
            x = apply_layer(CONFIG, layer, x, None, None, window)
        return x

    def output_and_gradient(function):
        output, pull = jax.vjp(function, blocks)
        return output, pull(output)[0]

    got = jax.jit(lambda: output_and_gradient(lambda b: run_blocks(CONFIG, (b,), hidden)))()
    assert_close(got, jax.jit(lambda: output_and_gradient(one_by_one))(), "float32_model")
