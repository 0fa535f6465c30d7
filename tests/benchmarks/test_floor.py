import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floor, phases
from benchmarks.floor import Cost
from benchmarks.workloads import WORKLOADS
from gradot_jax.compression.rule import gradot_terms
from gradot_jax.linalg.svd import SVD
from gradot_jax.models.opt.params import get_block
from gradot_jax.offsite.calibrate import attention_and_mlp

SMOKE = WORKLOADS["smoke"]
"""1 + 2 + 1 blocks, D 16, F 32, V 24, T 8, B 2, S 2; so N = 16 and W = 4 * 256 + 2 * 512 = 2048."""

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
    # entries; the head has D V = 384 weights.
    assert floor.block_weights(SMOKE) == 2_048
    assert floor.gradient_cost(SMOKE) == Cost(4 * (196_608 + 24_576) + 36_864, 68_608)
    assert floor.forward_cost(SMOKE) == Cost(2 * (4 * 73_728 + 81_920 + 24_576), 74_752)
    assert floor.sweep_cost(SMOKE) == Cost(4 * (114_688 + 24_576 + 131_072), 61_440)
    assert floor.scoring_cost(SMOKE) == Cost(2 * (109_226 + 65_536 + 32_768), 65_536)
    assert floor.step_cost(SMOKE, 4_096) == Cost(98_304 + 393_216 + 286_720, 116_224)


def test_compression_costs_its_parts():
    parts = (floor.forward_cost, floor.sweep_cost, floor.scoring_cost)
    flops, moved = zip(*((c.flops, c.bytes) for c in (part(SMOKE) for part in parts)), strict=True)
    assert floor.compression_cost(SMOKE) == Cost(sum(flops), sum(moved))


def test_the_slower_of_arithmetic_and_memory_is_the_floor():
    assert Cost(100, 8).seconds(gemm_rate=50, copy_rate=8) == 2
    assert Cost(100, 80).seconds(gemm_rate=50, copy_rate=8) == 10


def _one_block():
    return dataclasses.replace(WIDE, config=dataclasses.replace(WIDE.config, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("gradient", _one_block()),
        ("calibration_forward", WIDE),
        ("factor_sweep", WIDE),
        ("step_full", WIDE),
    ],
)
def test_floating_point_operations_are_those_that_xla_counts(name, workload):
    phase = phases.PHASES[name](workload)
    program = phase.program() if phase.program else phase.run.lower(*phase.prepare())
    # XLA counts elementwise arithmetic too, and leaves out what the lowest block need not return.
    assert program.compile().cost_analysis()["flops"] == pytest.approx(phase.flops, rel=0.15)


def test_scores_cost_the_products_that_xla_counts():
    width, ffn = WIDE.config.hidden_size, WIDE.config.ffn_dim
    weights = attention_and_mlp(get_block(WIDE.params().segments[0], 0))
    matrices = jnp.ones((4, width, width))
    decomposition = SVD(matrices, jnp.ones((4, width)), matrices)
    program = gradot_terms.lower(weights, decomposition, phases.unit_factors(WIDE)).compile()
    products = 16 * width**3 + 4 * width**2 * ffn
    assert program.cost_analysis()["flops"] == pytest.approx(products, rel=0.15)


def test_the_emulator_has_the_budgeted_share_of_the_middles_weights():
    full, emulator = (phases.PHASES[name](WIDE) for name in ("step_full", "step_emulator"))
    dropped = (1 - WIDE.budget) * floor.block_weights(WIDE)
    saved = (full.flops - emulator.flops) / (4 * WIDE.tokens)
    assert saved == pytest.approx(dropped, rel=0.1)


def test_rates_are_positive_and_named_by_shape():
    rates = floor.product_rates([(8, 4, 2), (16, 16, 16)])
    assert rates.keys() == {"8 x 4 x 2", "16 x 16 x 16"}
    assert min(rates.values()) > 0 and floor.copy_rate(1024) > 0


def test_the_workloads_own_products_are_among_those_measured():
    assert (SMOKE.tokens, 16, 32) in floor.product_shapes(SMOKE)
    assert (2048, 2048, 2048) in floor.product_shapes(SMOKE)


def test_random_weights_have_the_shapes_of_the_model():
    params, batches = SMOKE.params(), SMOKE.batches()
    assert params.num_layers == 4 and len(batches) == SMOKE.num_batches
    assert batches[0].input_ids.shape == (SMOKE.batch_size, SMOKE.length)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
