"""A small model, an emulator of it cut by hand, and the plan that says how."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.plan import EmulatorSpec, LayerPlan, Plan
from gradot_jax.models.opt.block import LAYOUT, Block
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import (
    Params,
    get_block,
    init_params,
    segment_blocks,
    slice_blocks,
    unstack_blocks,
)
from gradot_jax.models.split import Adapter, AdapterSpec
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.offsite.bundle import ship
from gradot_jax.offsite.emulator import Emulator

CONFIG = OPTConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=5,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=12,
    word_embed_proj_dim=16,
)
LAYER = {"q_proj": 3, "k_proj": 4, "v_proj": 5, "out_proj": 3}
CUTS = ((LAYER, 12), (LAYER, 12), (LAYER | {"q_proj": None}, 20))
"""Ranks and channels of the three middle layers; the first two share a segment."""


@dataclasses.dataclass(frozen=True)
class Case:
    config: OPTConfig
    split: AdapterSpec
    params: Params
    emulator: Emulator
    plan: Plan

    def spec(self, **changes) -> EmulatorSpec:
        """What ships of the plan, with some fields changed."""
        return dataclasses.replace(self.plan.emulator, **changes)

    def write(self, path, emulator=None, spec=None, **options) -> str:
        """Writes the bundle, or one of what is given in its place; returns its digest."""
        emulator = self.emulator if emulator is None else emulator
        return ship(path, self.config, spec or self.spec(), emulator, **options)


def _truncate(weights: Dense, rank: int | None) -> Dense | LowRank:
    if rank is None:
        return weights
    u, s, vt = np.linalg.svd(np.asarray(weights.kernel, np.float32))
    dtype = weights.kernel.dtype
    return LowRank((u[:, :rank] * s[:rank]).astype(dtype), vt[:rank].astype(dtype), weights.bias)


def _cut(block: Block, ranks: dict, channels: int) -> Block:
    sites = {site: _truncate(getattr(block, site), ranks[site]) for site in LAYOUT.low_rank}
    bias = None if block.fc1.bias is None else block.fc1.bias[1 : channels + 1]
    return block.replace(
        **sites,
        fc1=Dense(block.fc1.kernel[:, 1 : channels + 1], bias),
        fc2=Dense(block.fc2.kernel[1 : channels + 1], block.fc2.bias),
    )


def _plan() -> Plan:
    layers = tuple(
        LayerPlan(
            layer=index + 1,
            components=tuple((s, None if r is None else tuple(range(r))) for s, r in ranks.items()),
            channels=tuple(range(1, channels + 1)),
        )
        for index, (ranks, channels) in enumerate(CUTS)
    )
    return Plan(
        method="gradot",
        attention_budget=0.5,
        mlp_budget=0.4,
        num_bottom=1,
        num_top=1,
        inner=(),
        layers=layers,
        layer_map=tuple(range(len(layers))),
    )


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Builds a case; options are fields of the configuration, `dtype` and `seed`."""

    @cache
    def make(dtype="float32", seed=0, **changes) -> Case:
        config = dataclasses.replace(CONFIG, **changes)
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        # Fresh biases and gains are constant and would hide a swap. Drawn and cut on the host,
        # where no shape has to be compiled.
        params = jax.tree.map(
            lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(jnp.dtype(dtype)), shapes
        )
        split = AdapterSpec(1, 1)
        adapter = Adapter(*(slice_blocks(params.segments[0], i, i + 1) for i in (0, 4)))
        layers = [get_block(params.segments[0], j + 1) for j in range(3)]
        blocks = [_cut(block, *cut) for block, cut in zip(layers, CUTS, strict=True)]
        emulator = Emulator(params.shell, adapter, segment_blocks(blocks))
        params, emulator = jax.tree.map(jnp.asarray, (params, emulator))
        return Case(config, split, params, emulator, _plan())

    return make


@pytest.fixture(scope="session")
def case(make_case) -> Case:
    return make_case()


@pytest.fixture(scope="session")
def on_host() -> Callable[[Params], Params]:
    """Puts a model into the form of a memory-mapped one: numpy, each block a segment."""

    def convert(params: Params) -> Params:
        shell, blocks = jax.tree.map(np.asarray, (params.shell, unstack_blocks(params.segments)))
        singles = tuple(jax.tree.map(lambda leaf: leaf[None], block) for block in blocks)
        return Params(shell, singles)

    return convert
