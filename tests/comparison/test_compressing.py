import jax
import jax.numpy as jnp
import pytest

from gradot_jax.comparison.compressing import share_shipped, share_verbatim
from gradot_jax.models.params import Shared, count_params, layers_at
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.offsite.emulator import build_emulator

SPLIT = AdapterSpec(1, 1)


@pytest.fixture
def model(toy_model):
    _, params = toy_model()
    middle = layers_at(params.segments, SPLIT.middle_layers(params.num_layers))
    return params, adapter_of(params, SPLIT), middle


def shares(params, emulator):
    total = count_params(params)
    return share_shipped(params, emulator) * total, share_verbatim(params, emulator) * total


def test_whole_layers_are_shipped_verbatim(model):
    params, adapter, blocks = model
    outside = count_params((params.shell, adapter))
    shipped, verbatim = shares(params, build_emulator(params.shell, adapter, blocks[:2]))
    assert shipped == verbatim == pytest.approx(outside + count_params(blocks[:2]))


def test_a_block_that_runs_twice_counts_once(model):
    params, adapter, blocks = model
    once = shares(params, build_emulator(params.shell, adapter, blocks[:1]))
    twice = build_emulator(params.shell, adapter, blocks[:1], (0, 0))
    assert isinstance(twice.middle[0], Shared)
    assert shares(params, twice) == once


def test_nothing_of_changed_arrays_is_verbatim(model):
    params, adapter, blocks = model
    nudged = jax.tree.map(lambda leaf: leaf * 1.001, blocks[0])
    floor = shares(params, build_emulator(params.shell, adapter, []))
    shipped, verbatim = shares(params, build_emulator(params.shell, adapter, [nudged]))
    assert verbatim == floor[1] and shipped == pytest.approx(floor[0] + count_params(nudged))


def test_kept_channels_are_verbatim_and_factors_are_not(model):
    params, adapter, blocks = model
    block, keep = blocks[1], jnp.array([0, 3, 7])
    width = params.shell.embed_positions.shape[1]
    pruned = block.replace(
        q_proj=LowRank(block.q_proj.kernel[:, :2], block.q_proj.kernel[:2], block.q_proj.bias),
        fc1=Dense(block.fc1.kernel[:, keep], block.fc1.bias[keep]),
        fc2=Dense(block.fc2.kernel[keep], block.fc2.bias),
    )
    _, floor = shares(params, build_emulator(params.shell, adapter, []))
    _, verbatim = shares(params, build_emulator(params.shell, adapter, [pruned]))
    whole = count_params(block) - count_params((block.q_proj.kernel, block.fc1, block.fc2.kernel))
    assert verbatim - floor == pytest.approx(whole + 2 * 3 * width)
