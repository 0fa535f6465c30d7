"""Frozen layers of equal shape are trained around in one stack, however many they came in."""

import jax
import numpy as np
import optax
import pytest

from gradot_jax.methods.compress import compress
from gradot_jax.models.params import Params, depth, unstack_blocks
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.training.adapter import init_training, train_step

OPTIMIZER = optax.sgd(0.1)


@pytest.fixture(scope="module")
def separate(toy_model):
    """A configuration, and a model whose every layer is a stack; the one between is trained."""
    config, params = toy_model()
    shell, blocks = jax.tree.map(np.asarray, (params.shell, unstack_blocks(params.segments)))
    singles = tuple(jax.tree.map(lambda leaf: leaf[None], block) for block in blocks)
    model = split_model(Params(shell, singles), AdapterSpec(0, 0, (2,)))
    return config, model


def test_neighbours_of_equal_shape_are_joined_on_their_side_of_an_inner_block(separate):
    _, model = separate
    assert [depth(stack) for stack in model.middle] == [1, 1, 1, 1]
    frozen, _ = init_training(model, OPTIMIZER)
    assert [depth(stack) for stack in frozen.middle] == [2, 2]
    assert (model.inner_after, frozen.inner_after) == ((2,), (1,))
    layers = zip(unstack_blocks(frozen.middle), unstack_blocks(model.middle), strict=True)
    for got, expected in layers:
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_layers_of_different_shapes_stay_as_they_are(toy_model):
    config, params = toy_model()
    options = {"method": "magnitude", "budget": 0.5, "allocation": "global"}
    _, emulator = compress(config, params, AdapterSpec(1, 1), (), **options)
    assert [depth(stack) for stack in emulator.middle] == [1, 1, 1]
    frozen, _ = init_training(emulator, OPTIMIZER)
    jax.tree.map(np.testing.assert_array_equal, frozen.middle, emulator.middle)


def test_a_step_around_joined_stacks_is_that_around_separate_ones(
    separate, toy_batch, assert_close
):
    config, model = separate
    joined, _ = init_training(model, OPTIMIZER)
    apart = joined.replace(middle=model.middle, inner_after=model.inner_after)

    def step(frozen):
        state = init_training(model, OPTIMIZER)[1]
        state, metrics = train_step(config, OPTIMIZER, state, frozen, toy_batch(size=2))
        moved = jax.tree.map(np.subtract, state.adapter.inner, model.adapter.inner)
        # Softmax does not see the bias of the keys: its gradient is rounding.
        moved = moved.replace(k_proj=moved.k_proj.replace(bias=None))
        return moved, metrics.loss, metrics.gradient_norm

    assert_close(step(joined), step(apart), "float32_model")
