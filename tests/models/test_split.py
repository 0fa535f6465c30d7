import jax
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.params import (
    concatenate_blocks,
    depth,
    get_block,
    layers_at,
    take_blocks,
)
from gradot_jax.models.split import AdapterSpec, adapter_of, split_model


@pytest.mark.parametrize(("bottom", "top"), [(1, 1), (2, 2), (0, 3), (4, 0)])
def test_parts_join_to_the_whole(bottom, top, toy_model):
    _, params = toy_model()
    model = split_model(params, AdapterSpec(bottom, top))
    (middle,) = model.middle
    assert model.adapter.split == AdapterSpec(bottom, top) and depth(middle) == 5 - bottom - top
    whole = concatenate_blocks((model.adapter.bottom, middle, model.adapter.top))
    jax.tree.map(np.testing.assert_array_equal, whole, params.segments[0])


@pytest.mark.parametrize(("bottom", "top"), [(0, 0), (-1, 2), (2, -1)])
def test_split_with_nothing_to_train_is_refused(bottom, top):
    with pytest.raises(InputError, match="at least one block"):
        AdapterSpec(bottom, top).check(5)


@pytest.mark.parametrize(("bottom", "top"), [(3, 2), (5, 0), (0, 5), (4, 4)])
def test_split_without_a_middle_is_refused(bottom, top, toy_model):
    with pytest.raises(InputError, match="no middle in a model of 5 blocks"):
        split_model(toy_model()[1], AdapterSpec(bottom, top))


@pytest.mark.parametrize(
    ("layers", "split"),
    [
        ((0, 1, 3, 4), AdapterSpec(2, 2)),
        ((4, 2, 0), AdapterSpec(1, 1, (2,))),
        ((1, 3), AdapterSpec(0, 0, (1, 3))),
        ((0, 1, 2), AdapterSpec(3, 0)),
    ],
)
def test_split_of_layers_trains_exactly_those(layers, split):
    assert AdapterSpec.of_layers(layers, 5) == split
    assert set(split.layers(5)) == set(layers)
    assert set(split.middle_layers(5)) == set(range(5)) - set(layers)


@pytest.mark.parametrize("inner", [(0,), (4,), (3, 2), (2, 2)])
def test_inner_blocks_lie_between_the_ends_in_order(inner):
    with pytest.raises(InputError, match="inner must be ascending layers in"):
        AdapterSpec(1, 1, inner).check(5)


SPLITS = [AdapterSpec(1, 1), AdapterSpec(2, 0), AdapterSpec(0, 2), AdapterSpec(1, 1, (2,))]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["stacked", "on host"])
def test_adapter_and_single_middle_blocks_are_those_of_the_split(split, form, toy_model, on_host):
    _, params = toy_model()
    given = params if form == "stacked" else on_host(params)
    adapter, layers = adapter_of(given, split), split.layers(5)
    assert adapter.split == split
    trained = concatenate_blocks(adapter.stacks)
    jax.tree.map(np.testing.assert_array_equal, trained, take_blocks(params.segments[0], layers))
    expected = [get_block(params.segments[0], index) for index in split.middle_layers(5)]
    for blocks in (
        layers_at(given.segments, split.middle_layers(5)),
        split_model(given, split).stored_layers(),
    ):
        for block, wanted in zip(blocks, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, block, wanted)


def test_a_model_on_the_host_stays_there_and_its_middle_is_not_copied(toy_model, on_host):
    params = on_host(toy_model()[1])
    split = AdapterSpec(1, 2)
    adapter, model = adapter_of(params, split), split_model(params, split)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(adapter))
    blocks = [*layers_at(params.segments, split.middle_layers(5)), *model.stored_layers()]
    pairs = zip(blocks, 2 * params.segments[1:3], strict=True)
    for block, segment in [*pairs, (adapter.bottom, params.segments[0])]:
        for leaf, stored in zip(*map(jax.tree.leaves, (block, segment)), strict=True):
            assert np.shares_memory(leaf, stored)


def test_parts_of_a_split_without_a_middle_are_refused_too(toy_model):
    for part in (adapter_of, split_model):
        with pytest.raises(InputError, match="no middle in a model of 5 blocks"):
            part(toy_model()[1], AdapterSpec(3, 2))
