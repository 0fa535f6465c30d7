import jax
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.opt.params import concatenate_blocks, depth, get_block
from gradot_jax.offsite.split import AdapterSpec, adapter_of, middle_blocks, split_blocks


@pytest.mark.parametrize(("bottom", "top"), [(1, 1), (2, 2), (0, 3), (4, 0)])
def test_parts_join_to_the_whole(bottom, top, toy_model):
    _, params = toy_model()
    adapter, middle = split_blocks(params, AdapterSpec(bottom, top))
    assert adapter.spec == AdapterSpec(bottom, top) and depth(middle) == 5 - bottom - top
    whole = concatenate_blocks((adapter.bottom, middle, adapter.top))
    jax.tree.map(np.testing.assert_array_equal, whole, params.segments[0])


@pytest.mark.parametrize(("bottom", "top"), [(0, 0), (-1, 2), (2, -1)])
def test_split_with_nothing_to_train_is_refused(bottom, top):
    with pytest.raises(InputError, match="at least one block"):
        AdapterSpec(bottom, top).check(5)


@pytest.mark.parametrize(("bottom", "top"), [(3, 2), (5, 0), (0, 5), (4, 4)])
def test_split_without_a_middle_is_refused(bottom, top, toy_model):
    with pytest.raises(InputError, match="no middle in a model of 5 blocks"):
        split_blocks(toy_model()[1], AdapterSpec(bottom, top))


@pytest.mark.parametrize(
    ("layers", "spec"),
    [
        ((0, 1, 3, 4), AdapterSpec(2, 2)),
        ((4, 2, 0), AdapterSpec(1, 1, (2,))),
        ((1, 3), AdapterSpec(0, 0, (1, 3))),
        ((0, 1, 2), AdapterSpec(3, 0)),
    ],
)
def test_split_of_layers_trains_exactly_those(layers, spec):
    assert AdapterSpec.of_layers(layers, 5) == spec
    assert set(spec.layers(5)) == set(layers)
    assert set(spec.middle_layers(5)) == set(range(5)) - set(layers)


@pytest.mark.parametrize("inner", [(0,), (4,), (3, 2), (2, 2)])
def test_inner_blocks_lie_between_the_ends_in_order(inner):
    with pytest.raises(InputError, match="inner must be ascending layers in"):
        AdapterSpec(1, 1, inner).check(5)


SPLITS = [AdapterSpec(1, 1), AdapterSpec(2, 0), AdapterSpec(0, 2), AdapterSpec(1, 1, (2,))]


@pytest.mark.parametrize("spec", SPLITS)
@pytest.mark.parametrize("form", ["stacked", "on host"])
def test_adapter_and_single_middle_blocks_are_those_of_the_split(spec, form, toy_model, on_host):
    _, params = toy_model()
    adapter, middle = split_blocks(params, spec)
    given = params if form == "stacked" else on_host(params)
    jax.tree.map(np.testing.assert_array_equal, adapter_of(given, spec), adapter)
    assert adapter_of(given, spec).spec == spec
    blocks = middle_blocks(given, spec)
    assert len(blocks) == depth(middle)
    for index, block in enumerate(blocks):
        jax.tree.map(np.testing.assert_array_equal, block, get_block(middle, index))


def test_a_model_on_the_host_stays_there_and_its_middle_is_not_copied(toy_model, on_host):
    params = on_host(toy_model()[1])
    adapter = adapter_of(params, AdapterSpec(1, 2))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(adapter))
    pairs = zip(middle_blocks(params, AdapterSpec(1, 2)), params.segments[1:3], strict=True)
    for block, segment in [*pairs, (adapter.bottom, params.segments[0])]:
        for leaf, stored in zip(*map(jax.tree.leaves, (block, segment)), strict=True):
            assert np.shares_memory(leaf, stored)


def test_parts_of_a_split_without_a_middle_are_refused_too(toy_model):
    for part in (adapter_of, middle_blocks):
        with pytest.raises(InputError, match="no middle in a model of 5 blocks"):
            part(toy_model()[1], AdapterSpec(3, 2))
