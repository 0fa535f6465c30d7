import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params, get_block
from gradot_jax.models.opt.partition import partition_specs, shard_params
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.split import AdapterSpec, split_blocks
from gradot_jax.parallel import make_mesh

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
COLUMN = PartitionSpec(None, None, "model")
ROW = PartitionSpec(None, "model", None)
BIAS = PartitionSpec(None, "model")
WHOLE = PartitionSpec()


@pytest.fixture
def params(random_params) -> Params:
    return random_params(CONFIG)


def test_columns_rows_and_vocabulary_are_split_and_the_rest_is_whole(params):
    specs = partition_specs(params, 4)
    block, shell = specs.segments[0], specs.shell
    for site in ("q_proj", "k_proj", "v_proj", "fc1"):
        assert getattr(block, site) == Dense(COLUMN, BIAS)
    for site in ("out_proj", "fc2"):
        assert getattr(block, site) == Dense(ROW, WHOLE)
    assert shell.embed_tokens == PartitionSpec("model", None)
    assert shell.lm_head == PartitionSpec(None, "model")
    assert shell.embed_positions == shell.project_in.kernel == WHOLE
    assert block.final_layer_norm.scale == shell.final_layer_norm.bias == WHOLE


def test_an_axis_that_does_not_divide_is_whole(params):
    specs = partition_specs(params, 3)
    assert specs.shell.embed_tokens == PartitionSpec("model", None)
    assert specs.segments[0].fc1 == Dense(WHOLE, WHOLE)


def test_low_rank_maps_are_split_on_the_side_of_their_dense_map(params):
    block = get_block(params.segments[0], 0)
    maps = LowRank(np.zeros((8, 3)), np.zeros((3, 8)), np.zeros(8))
    specs = partition_specs(block.replace(q_proj=maps, out_proj=maps), 4)
    column, row = PartitionSpec(None, "model"), PartitionSpec("model", None)
    assert specs.q_proj == LowRank(WHOLE, column, PartitionSpec("model"))
    assert specs.out_proj == LowRank(row, WHOLE, WHOLE)


def test_any_tree_of_these_parameters_is_placed_by_the_same_rules(params):
    adapter, middle = split_blocks(params, AdapterSpec(1, 1))
    emulator = Emulator(params.shell, adapter, (middle,))
    mesh = make_mesh(2, 4)
    placed = shard_params({"emulator": emulator, "moments": (adapter, adapter)}, mesh)
    for part in (placed["emulator"].adapter, placed["moments"][1]):
        assert part.bottom.fc2.kernel.sharding.spec == ROW
    jax.tree.map(np.testing.assert_array_equal, placed["emulator"], emulator)
