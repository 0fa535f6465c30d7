import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.params import slice_blocks
from gradot_jax.models.split import AdapterSpec, adapter_of, split_model
from gradot_jax.nn.linear import LowRank
from gradot_jax.offsite.plug_in import plug_in

SPLITS = [
    AdapterSpec(1, 2),
    AdapterSpec(0, 2),
    AdapterSpec(3, 0),
    AdapterSpec(1, 1, (2,)),
    AdapterSpec(0, 0, (0, 3)),
]


@pytest.mark.parametrize("split", SPLITS)
def test_untuned_adapter_gives_the_original_back(split, toy_model):
    _, params = toy_model()
    again = plug_in(params, adapter_of(params, split))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("split", SPLITS)
def test_tuned_blocks_come_in_and_nothing_else_changes(split, toy_model):
    _, params = toy_model()
    original = split_model(params, split)
    tuned = jax.tree.map(lambda leaf: leaf + 1, original.adapter)
    plugged = plug_in(params, tuned)
    got = split_model(plugged, split)
    jax.tree.map(np.testing.assert_array_equal, got.adapter, tuned)
    jax.tree.map(np.testing.assert_array_equal, got.middle, original.middle)
    assert plugged.shell is params.shell


def test_adapter_that_overflows_in_the_dtype_of_the_model_is_refused(toy_model):
    _, params = toy_model(dtype="float16")
    adapter = adapter_of(params, SPLITS[0])
    vast = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e6, jnp.float32), adapter)
    with pytest.raises(InputError, match="not finite in float16"):
        plug_in(params, vast)


def test_adapter_takes_the_dtype_of_what_it_replaces(toy_model):
    _, params = toy_model(dtype="bfloat16")
    adapter = adapter_of(params, SPLITS[0])
    tuned = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapter)
    jax.tree.map(np.testing.assert_array_equal, plug_in(params, tuned), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(plug_in(params, tuned))} == {
        jnp.dtype("bfloat16")
    }


def test_adapter_of_another_width_is_refused_by_name(toy_model):
    adapter = adapter_of(toy_model(ffn_dim=16)[1], SPLITS[0])
    with pytest.raises(InputError, match=r"bottom\.fc1\.bias: got \(1, 16\), expected \(1, 12\)"):
        plug_in(toy_model()[1], adapter)


def test_adapter_deeper_than_the_model_is_refused(toy_model):
    adapter = adapter_of(toy_model(num_hidden_layers=7)[1], AdapterSpec(3, 3))
    with pytest.raises(InputError, match="no middle"):
        plug_in(toy_model()[1], adapter)


def test_adapter_of_another_kind_is_refused(toy_model):
    _, params = toy_model()
    adapter = adapter_of(params, SPLITS[0])
    q = adapter.bottom.q_proj
    factored = adapter.bottom.replace(q_proj=LowRank(q.kernel, q.kernel, q.bias))
    with pytest.raises(InputError, match=r"q_proj\.kernel: got nothing"):
        plug_in(params, adapter.replace(bottom=factored))
    unbiased = adapter.bottom.replace(q_proj=q.replace(bias=None))
    with pytest.raises(InputError, match=r"q_proj\.bias: got nothing"):
        plug_in(params, adapter.replace(bottom=unbiased))


def test_leaves_of_unequal_depth_are_refused(toy_model):
    _, params = toy_model()
    adapter = adapter_of(params, AdapterSpec(1, 2))
    short = adapter.top.replace(fc2=slice_blocks(adapter.top, 0, 1).fc2)
    with pytest.raises(InputError, match=r"top\.fc2\.kernel: got \(1, 12, 8\)"):
        plug_in(params, adapter.replace(top=short))
