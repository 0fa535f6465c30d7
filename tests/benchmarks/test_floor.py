import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floor, phases
from benchmarks.floor import Cost
from benchmarks.workloads import WORKLOADS
from gradot_jax.linalg.svd import SVD
from gradot_jax.methods.gradot import gradot_terms
from gradot_jax.models.params import get_block
from gradot_jax.nn.layout import maps

SMOKE = WORKLOADS["cpu"]["smoke"]
"""1 + 2 + 1 blocks, D 16, F 32, V 24, T 8, B 2, S 2; so N = 16 and W = 4 * 256 + 2 * 512 = 2048.
Of a budget of 0.6 the emulator's maps have rank 4 and its MLPs 19 channels."""

HALF = WORKLOADS["device"]["smoke"]
"""The same in bfloat16."""

WIDE = dataclasses.replace(
    SMOKE,
    config=dataclasses.replace(
        SMOKE.config, num_hidden_layers=3, hidden_size=64, ffn_dim=256, word_embed_proj_dim=64
    ),
    batch_size=16,
    num_batches=1,
)
"""1 + 1 + 1 blocks and one batch: XLA counts a loop's body once, and here every loop turns once.
Products of this width over this many tokens outweigh the elementwise arithmetic."""


def test_costs_equal_those_counted_by_hand():
    # One block: 2 N W = 65,536, attention 4 N T D = 8,192, A and G have 8 D^2 + 2 F^2 = 4,096
    # entries, 4,288 if each pair and its mirror are told from the diagonal; the head has D V = 384.
    assert floor.block_weights(SMOKE) == 2_048
    assert floor.emulator_block_weights(SMOKE) == 4 * 128 + 608
    gradient = 4 * (196_608 + 24_576) + 36_864
    assert floor.gradient_cost(SMOKE) == Cost(flops=gradient, bytes=68_608)
    assert floor.step_all_cost(SMOKE) == Cost(flops=gradient, bytes=205_824)
    forward = 2 * (4 * 73_728 + 81_920 + 24_576)
    assert floor.forward_cost(SMOKE) == Cost(flops=forward, bytes=50_688)
    assert floor.sweep_cost(SMOKE) == Cost(
        flops=4 * (114_688 + 24_576),
        exact_flops=4 * 2 * 16 * 4_096,
        symmetric_flops=4 * 16 * 4_288,
        bytes=61_440,
    )
    assert floor.decomposition_cost(SMOKE) == floor.exact(109_226, 12_288)
    assert floor.selection_cost(SMOKE) == floor.exact(65_536 + 32_768, 37_248)
    assert floor.packaging_cost(SMOKE) == Cost(bytes=55_040)
    step = 98_304 + 393_216 + 286_720
    assert floor.step_cost(SMOKE, 2_048) == Cost(flops=step, bytes=116_224)


def test_a_smaller_dtype_moves_fewer_bytes_but_factors_and_trained_weights_are_float32():
    for cost in (floor.gradient_cost, floor.forward_cost, floor.packaging_cost):
        assert cost(HALF) == dataclasses.replace(cost(SMOKE), bytes=cost(SMOKE).bytes // 2)
    for cost in (floor.decomposition_cost, floor.selection_cost, floor.step_all_cost):
        assert cost(HALF) == cost(SMOKE)
    assert floor.sweep_cost(SMOKE).bytes - floor.sweep_cost(HALF).bytes == 61_440 - 47_104
    assert floor.step_cost(HALF, 2_048).bytes == 107_264


def test_a_sweep_of_some_layers_costs_their_share():
    assert floor.sweep_cost(SMOKE, 1) * SMOKE.num_middle == floor.sweep_cost(SMOKE)


def test_compression_costs_its_parts():
    layer = floor.decomposition_cost(SMOKE) + floor.selection_cost(SMOKE)
    parts = floor.forward_cost(SMOKE) + floor.sweep_cost(SMOKE) + layer + layer
    assert floor.compression_cost(SMOKE) == parts


def test_arithmetic_of_both_kinds_adds_up_and_the_slower_of_it_and_memory_is_the_floor():
    rates = {"flops_per_second": 50, "exact_flops_per_second": 10, "bytes_per_second": 8}
    cost = Cost(flops=100, exact_flops=30, symmetric_flops=20, bytes=8)
    assert floor.floor_seconds(cost, rates) == 5
    assert floor.floor_seconds(cost, rates, symmetric=True) == 4
    assert floor.floor_seconds(dataclasses.replace(cost, bytes=80), rates) == 10


def _one_block():
    return dataclasses.replace(WIDE, config=dataclasses.replace(WIDE.config, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("name", "workload"), [("gradient", _one_block()), ("step_full", WIDE), ("step_all", WIDE)]
)
def test_floating_point_operations_are_those_that_xla_counts(name, workload):
    phase = phases.PHASES[name](workload)
    counted = phase.run.lower(*phase.prepare()).compile().cost_analysis()["flops"]
    # XLA counts elementwise arithmetic too, and leaves out what the lowest block need not return;
    # of a scan over several blocks it counts one.
    blocks = workload.config.num_hidden_layers
    scanned = name == "step_all"
    mixing = 3 * 4 * workload.tokens * workload.length * workload.config.hidden_size
    block = 6 * workload.tokens * floor.block_weights(workload) + mixing
    expected = phase.cost.flops - (blocks - 1) * block * scanned
    assert counted == pytest.approx(expected, rel=0.15)


def test_the_sweeps_operations_lie_between_each_pair_once_and_all_of_them():
    cost = floor.sweep_cost(WIDE)
    counted = phases.lower_sweep(WIDE).compile().cost_analysis()["flops"]
    least, most = cost.flops + cost.symmetric_flops, cost.flops + cost.exact_flops
    assert least < counted < 1.15 * most


def test_scores_cost_the_products_that_xla_counts():
    width, ffn = WIDE.config.hidden_size, WIDE.config.ffn_dim
    block = get_block(WIDE.params().segments[0], 0)
    square = jnp.ones((width, width))
    parts = {site: SVD(square, jnp.ones(width), square) for site in block.layout.low_rank}
    program = gradot_terms.lower(
        block.layout, maps(block), parts, phases.unit_factors(WIDE)
    ).compile()
    products = 16 * width**3 + 4 * width**2 * ffn
    assert program.cost_analysis()["flops"] == pytest.approx(products, rel=0.15)


def test_the_bundle_and_the_emulator_are_counted_as_they_are():
    emulator = jax.tree.leaves(WIDE.emulator_shapes())
    matrices = sum(leaf.size for leaf in emulator if leaf.shape[-2:] != leaf.shape[-1:])
    weights = sum(leaf.size for leaf in emulator)
    assert weights >= floor.packaging_cost(WIDE).bytes / 8 > 0.95 * weights
    assert matrices >= floor.packaging_cost(WIDE).bytes / 8
