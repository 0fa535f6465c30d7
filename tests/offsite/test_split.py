import jax
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.opt.params import concatenate_blocks, depth
from gradot_jax.offsite.split import AdapterSpec, split_blocks


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
