from typing import ClassVar

import flax.struct
import jax
import numpy as np
import pytest

from gradot_jax.nn.layout import Channels, Layout, Site, is_block, maps
from gradot_jax.nn.linear import Dense, Linear, LowRank

GATED = Layout(
    sites=(
        Site("query", "attention", "attn.q", "column"),
        Site("value", "attention", "attn.v", "column"),
        Site("gate", "mlp", "mlp.gate", "column"),
        Site("up", "mlp", "mlp.up", "column"),
        Site("down", "hidden", "mlp.down", "row"),
    ),
    channels=Channels(into=("gate", "up"), out="down"),
    norms=(("norm", "norm"),),
)


@flax.struct.dataclass
class GatedBlock:
    """Its fields are in another order than its layout's sites."""

    layout: ClassVar[Layout] = GATED

    norm: jax.Array
    down: Linear
    gate: Linear
    up: Linear
    value: Linear
    query: Linear


@pytest.fixture
def block():
    def dense(d_in, d_out):
        return Dense(np.zeros((d_in, d_out), np.float32), None)

    low = LowRank(np.zeros((4, 1), np.float32), np.zeros((1, 2), np.float32), None)
    return GatedBlock(np.ones(4), dense(6, 4), dense(4, 6), dense(4, 6), low, dense(4, 4))


def test_low_rank_sites_are_those_outside_the_channels_as_they_are_stored():
    assert GATED.low_rank == ("query", "value")
    sites = tuple(reversed(GATED.sites))
    assert Layout(sites, Channels(("gate",), "down"), ()).low_rank == ("up", "value", "query")


def test_maps_are_the_sites_of_a_block_in_the_order_of_its_layout(block):
    got = maps(block)
    assert list(got) == [site.name for site in GATED.sites]
    assert all(weights is getattr(block, name) for name, weights in got.items())


def test_a_block_is_known_by_its_layout_whatever_its_leaves(block):
    assert is_block(block) and is_block(jax.tree.map(lambda leaf: leaf.shape, block))
    for other in (block.gate, GATED, None, {"layout": GATED}, GatedBlock):
        assert not is_block(other)


def test_a_layout_is_no_leaf_and_survives_a_map(block):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, block)
    assert doubled.layout is GATED and len(jax.tree.leaves(block)) == 7
