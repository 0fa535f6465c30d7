import logging
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gradot_jax.models import partition
from gradot_jax.models.families import read_config
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Params, get_block
from gradot_jax.models.partition import (
    factor_sharding,
    gather_over_data,
    partition_specs,
    shard_params,
)
from gradot_jax.models.run import run_blocks
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.parallel import make_mesh, put

CONFIG = OPTConfig(
    vocab_size=24,
    hidden_size=8,
    word_embed_proj_dim=4,
    num_hidden_layers=3,
    ffn_dim=16,
    num_attention_heads=2,
    max_position_embeddings=8,
    tie_word_embeddings=False,
)
WHOLE = PartitionSpec()


def of_heads(queries, keys, size=4):
    """A configuration with so many heads of queries, and of keys and values."""
    sizes = {"vocab_size": 24, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": size}
    return read_config({"model_type": "qwen2", **sizes, **heads, "max_position_embeddings": 8})


@pytest.fixture
def said(caplog):
    """Says what was logged of sites whose heads are whole."""
    partition._say_whole.cache_clear()
    caplog.set_level(logging.INFO, partition.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def params(random_params) -> Params:
    return random_params(CONFIG)


def test_columns_rows_and_vocabulary_lie_along_model_and_vectors_but_theirs_are_whole(params):
    specs = partition_specs(params, data=1, model=4)
    block, shell = specs.segments[0], specs.shell
    column, row = PartitionSpec(None, None, "model"), PartitionSpec(None, "model", None)
    for site in ("q_proj", "k_proj", "v_proj", "fc1"):
        assert getattr(block, site) == Dense(column, PartitionSpec(None, "model"))
    for site in ("out_proj", "fc2"):
        assert getattr(block, site) == Dense(row, WHOLE)
    assert shell.embed_tokens == PartitionSpec("model", None)
    assert shell.lm_head == PartitionSpec(None, "model")
    assert shell.embed_positions == shell.project_in.kernel == WHOLE
    assert block.final_layer_norm.scale == shell.final_layer_norm.bias == WHOLE


def test_every_matrix_lies_along_data_too_on_its_other_axis(params):
    specs = partition_specs(params, data=2, model=4)
    block, shell = specs.segments[0], specs.shell
    assert block.fc1 == Dense(PartitionSpec(None, "data", "model"), PartitionSpec(None, "model"))
    assert block.fc2 == Dense(PartitionSpec(None, "model", "data"), WHOLE)
    assert shell.embed_tokens == PartitionSpec("model", "data")
    assert shell.lm_head == PartitionSpec("data", "model")
    assert shell.embed_positions == shell.project_in.kernel == PartitionSpec("data", None)
    assert block.final_layer_norm.scale == WHOLE


def test_an_axis_that_does_not_divide_is_left_out(params):
    specs = partition_specs(params, data=1, model=3)
    assert specs.shell.embed_tokens == PartitionSpec("model", None)
    assert specs.segments[0].fc1 == Dense(WHOLE, WHOLE)
    # 8 is no multiple of 3 and 24 none of 3 x 16: the one axis takes both, the other neither.
    assert partition_specs(params, data=4, model=3).shell.embed_tokens[0] == "model"
    kernel = Dense(np.zeros((9, 16)), np.zeros(16))
    specs = partition_specs(get_block(params.segments[0], 0).replace(fc1=kernel), data=4, model=2)
    assert specs.fc1.kernel == PartitionSpec(None, ("model", "data"))


def test_low_rank_maps_are_split_on_the_side_of_their_dense_map(params):
    block = get_block(params.segments[0], 0)
    maps = LowRank(np.zeros((8, 3)), np.zeros((3, 8)), np.zeros(8))
    block = block.replace(q_proj=maps, out_proj=maps)
    column, row = PartitionSpec(None, "model"), PartitionSpec("model", None)
    specs = partition_specs(block, data=1, model=4)
    assert specs.q_proj == LowRank(WHOLE, column, PartitionSpec("model"))
    assert specs.out_proj == LowRank(row, WHOLE, WHOLE)
    # A rank that nothing divides leaves the long axis to both.
    specs = partition_specs(block, data=2, model=4)
    assert specs.q_proj.left == PartitionSpec("data", None)
    assert specs.q_proj.right == PartitionSpec(None, ("model", "data"))


@pytest.mark.parametrize(
    ("queries", "keys", "model", "whole"),
    [
        (8, 2, 2, ""),
        (8, 2, 4, "kv"),
        (9, 3, 3, ""),
        # 36 features and 12 are multiples of 2 and 4, and 9 heads and 3 are not.
        (9, 3, 2, "qkvo"),
        (9, 3, 4, "qkvo"),
        (4, 1, 4, "kv"),
    ],
)
def test_no_head_is_cut_and_a_site_whose_heads_do_not_divide_is_whole_and_named(
    queries, keys, model, whole, random_params, said
):
    params = random_params(of_heads(queries, keys))
    block = partition_specs(params, data=1, model=model).segments[0]
    column, row = PartitionSpec(None, None, "model"), PartitionSpec(None, "model", None)
    bias = PartitionSpec(None, "model")
    for letter in "qkv":
        split = Dense(WHOLE, WHOLE) if letter in whole else Dense(column, bias)
        assert getattr(block, f"{letter}_proj") == split
    assert block.o_proj == Dense(WHOLE if "o" in whole else row, None)
    assert block.gate_proj == block.up_proj == Dense(column, None)
    assert block.down_proj == Dense(row, None)
    partition_specs(params, data=1, model=model)
    heads = {"q": queries, "k": keys, "v": keys, "o": queries}
    assert sorted(said()) == sorted(
        f"{letter}_proj: its {heads[letter]} heads are whole on each of {model} model devices"
        for letter in whole
    )


def test_each_device_has_whole_heads_of_queries_and_all_keys_that_do_not_divide(random_params):
    params = random_params(of_heads(8, 2))
    block = shard_params(params, make_mesh(2, 4)).segments[0]

    def parts(array):
        return {shard.data.shape for shard in array.addressable_shards}

    # Two heads of four features, and half of the rows along data.
    assert parts(block.q_proj.kernel) == {(2, 24 // 2, 2 * 4)}
    assert parts(block.q_proj.bias) == {(2, 2 * 4)}
    assert parts(block.o_proj.kernel) == {(2, 2 * 4, 24 // 2)}
    assert parts(block.k_proj.kernel) == parts(block.v_proj.kernel) == {(2, 24 // 2, 8)}
    assert parts(block.k_proj.bias) == {(2, 8)}
    jax.tree.map(np.testing.assert_array_equal, block, params.segments[0])


def test_low_rank_maps_of_heads_are_split_by_whole_heads_too(random_params):
    block = get_block(random_params(of_heads(8, 2)).segments[0], 0)
    wide, narrow = (LowRank(np.zeros((24, 3)), np.zeros((3, n)), np.zeros(n)) for n in (32, 8))
    out = LowRank(np.zeros((32, 3)), np.zeros((3, 24)), None)
    block = block.replace(q_proj=wide, k_proj=narrow, o_proj=out)
    specs = partition_specs(block, data=1, model=4)
    column = PartitionSpec(None, "model")
    assert specs.q_proj == LowRank(WHOLE, column, PartitionSpec("model"))
    assert specs.k_proj == LowRank(WHOLE, WHOLE, WHOLE)
    assert specs.o_proj == LowRank(PartitionSpec("model", None), WHOLE, None)


def test_rows_of_a_factor_lie_over_as_many_devices_as_divide_them():
    mesh = make_mesh(4, 2)
    assert factor_sharding((16, 16), mesh).spec == PartitionSpec(("data", "model"))
    assert factor_sharding((3, 16, 16), mesh).spec == PartitionSpec(None, ("data", "model"))
    assert factor_sharding((12, 12), mesh).spec == PartitionSpec(("data",))
    assert factor_sharding((6, 6), mesh).spec == PartitionSpec(("model",))
    assert factor_sharding((5, 5), mesh).spec == WHOLE


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_weights_are_gathered_over_data_and_stay_split_over_model(params, data, model):
    block = get_block(params.segments[0], 0)
    mesh = make_mesh(data, model)
    gathered = jax.jit(gather_over_data)(shard_params(block, mesh))
    column = PartitionSpec(None, "model") if model > 1 else WHOLE
    assert gathered.fc1.kernel.sharding.is_equivalent_to(NamedSharding(mesh.mesh, column), 2)
    jax.tree.map(np.testing.assert_array_equal, gathered, block)


def test_weights_on_one_device_are_not_gathered(params):
    jaxpr = jax.make_jaxpr(gather_over_data)(params)
    assert not jaxpr.eqns


@pytest.mark.parametrize("remat", [False, True])
def test_neither_weights_nor_gradients_are_ever_whole_for_all_layers(params, remat):
    mesh = make_mesh(4, 2)
    placed = shard_params(params, mesh)

    def loss(segments, hidden):
        return run_blocks(CONFIG, segments, hidden, remat=remat).sum()

    hidden = put(np.zeros((4, 6, CONFIG.hidden_size), np.float32), mesh.batched)
    program = jax.jit(jax.grad(loss)).lower(placed.segments, hidden).compile().as_text()
    assert re.search(r"= f32\[8,8\]\S* all-gather\(", program)
    # A quarter of half of fc1 for each layer, as kept by each device, and never half of all.
    stacked = set(re.findall(r"f32\[3,\d+,\d+\]", program.partition("entry_computation")[2]))
    assert "f32[3,2,8]" in stacked
    assert "f32[3,8,8]" not in stacked


def test_any_tree_of_these_parameters_is_placed_by_the_same_rules(params):
    model = split_model(params, AdapterSpec(1, 1))
    mesh = make_mesh(2, 4)
    placed = shard_params({"model": model, "moments": (model.adapter, model.adapter)}, mesh)
    for part in (placed["model"].adapter, placed["moments"][1]):
        kernel = part.bottom.fc2.kernel
        assert kernel.sharding.spec == PartitionSpec(None, "model", "data")
        assert kernel.addressable_shards[0].data.shape == (1, 16 // 4, 8 // 2)
    jax.tree.map(np.testing.assert_array_equal, placed["model"], model)
