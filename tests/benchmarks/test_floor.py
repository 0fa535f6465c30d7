import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floor, phases
from benchmarks.floor import Cost
from benchmarks.workloads import WORKLOADS, llama
from gradot_jax.linalg.svd import SVD
from gradot_jax.methods.gradot import gradot_terms
from gradot_jax.models.params import get_block
from gradot_jax.models.run import apply_layer
from gradot_jax.models.tensors import count_kernels, layer_shapes, model_schema
from gradot_jax.nn.layout import maps

SMOKE = WORKLOADS["cpu"]["smoke"]
"""1 + 2 + 1 blocks, D 16, F 32, V 24, T 8, B 2, S 2; so N = 16 and W = 4 * 256 + 2 * 512 = 2048.
Of a budget of 0.6 the emulator's maps have rank 4 and its MLPs 19 channels."""

LLAMA = WORKLOADS["cpu"]["smoke-llama"]
"""The same of D 12, F 20, V 24, with 4 heads of 4 on 2 keys and values, so that Q = 16, G K = 8 and
W = 192 + 96 + 96 + 192 + 3 * 240 = 1296. Of a budget of 0.6 the emulator's maps have ranks 4, 2, 2
and 4, its MLPs 12 channels."""

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

_WIDE = {"head_dim": 16, "intermediate_size": 192, "vocab_size": 24, "max_position_embeddings": 8}
WIDE_LLAMA = dataclasses.replace(WIDE, config=llama(3, 64, 8, 2, **_WIDE))


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


def test_costs_of_a_gated_block_with_grouped_queries_equal_those_counted_by_hand():
    # One block: 2 N W = 41,472, attention 4 N T Q = 8,192; of factors 4 are D wide, 2 Q, 2 G K and
    # 3 F, which are 2,416 entries and 156 more on the diagonals; the head has D V = 288.
    assert floor.block_weights(LLAMA) == 1_296
    assert floor.emulator_block_weights(LLAMA) == 112 + 40 + 40 + 112 + 3 * 144
    assert floor.factor_entries(LLAMA) == 2_416
    gradient = 4 * (124_416 + 24_576) + 27_648
    assert floor.gradient_cost(LLAMA) == Cost(flops=gradient, bytes=8 * 5_472)
    assert floor.step_all_cost(LLAMA) == Cost(flops=gradient, bytes=24 * 5_472)
    forward = 2 * (4 * 49_664 + 57_856 + 18_432)
    assert floor.forward_cost(LLAMA) == Cost(flops=forward, bytes=4 * (5_472 + 3_072))
    assert floor.sweep_cost(LLAMA) == Cost(
        flops=4 * (33_792 + 8_192 + 41_472 + 16_384),
        exact_flops=4 * 2 * 16 * 2_416,
        symmetric_flops=4 * 16 * 2_572,
        bytes=2 * (5_184 + 4_608 + 9_664),
    )
    # [16, 12] costs 16,128 and [12, 8] 5,461 1/3; their scores 9,600 and 3,328.
    assert floor.decomposition_cost(LLAMA) == floor.exact(43_178, 4 * 2 * (528 + 256))
    vectors = 2 * (336 + 160)
    scores = floor.exact(2 * (9_600 + 3_328) + 3 * 5_760, 4 * (1_296 + 2_416 + vectors + 736))
    assert floor.selection_cost(LLAMA) == scores
    assert floor.packaging_cost(LLAMA) == Cost(bytes=8 * (2 * 736 + 2 * 1_296 + 288))
    step = 98_304 + 248_832 + 184_320
    assert floor.step_cost(LLAMA, 1_296) == Cost(flops=step, bytes=73_728)


def test_a_tall_matrix_is_first_reduced_to_its_triangle():
    square, tall = 20 * 2048**3 // 3, 6 * 2048 * 512**2 + 4 * 512**3
    cost = floor.decomposition_cost(WORKLOADS["device"]["llama-1b"])
    assert cost.exact_flops == pytest.approx(2 * square + 2 * tall, abs=2)


@pytest.mark.parametrize("workload", [SMOKE, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("kept", [1, 0.6])
def test_products_of_a_block_are_those_that_it_is_traced_to(workload, kept):
    config = workload.config
    block, weights = config.family.block_shapes(config), floor.block_weights(workload)
    if kept < 1:
        block = layer_shapes(config, workload.layer_shape)
        weights = floor.emulator_block_weights(workload)
    hidden = jnp.ones((workload.batch_size, workload.length, config.hidden_size))
    traced = jax.make_jaxpr(lambda block: apply_layer(config, block, hidden))(block)
    # The cost of all blocks of the middle, forward, and of nothing else.
    more = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    one = [dataclasses.replace(workload, config=c, num_batches=1) for c in (config, more)]
    forward = floor.forward_cost(one[1]).flops - floor.forward_cost(one[0]).flops
    dense = 2 * workload.tokens * floor.block_weights(workload)
    assert _products(traced.jaxpr) == forward - dense + 2 * workload.tokens * weights


def _products(jaxpr) -> int:
    """FLOPs of the matrix products in a jaxpr and all within it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        for inner in jax.tree.leaves(list(equation.params.values())):
            total += _products(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total


@pytest.mark.parametrize("name", ["llama-1b", "smollm2-135m"])
def test_bytes_of_a_gradient_are_those_of_all_matrices_read_and_written(name):
    workload = dict(WORKLOADS["device"] | WORKLOADS["cpu"])[name]
    numbers = count_kernels(model_schema(workload.config))
    assert floor.gradient_cost(workload).bytes == 2 * numbers * jnp.dtype(workload.dtype).itemsize


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


def _one_block(workload):
    config = dataclasses.replace(workload.config, num_hidden_layers=1)
    return dataclasses.replace(workload, config=config)


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("gradient", _one_block(WIDE)),
        ("step_full", WIDE),
        ("step_all", WIDE),
        ("gradient", _one_block(WIDE_LLAMA)),
        ("step_full", WIDE_LLAMA),
    ],
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


@pytest.mark.parametrize("workload", [WIDE, WIDE_LLAMA], ids=["opt", "llama"])
def test_the_sweeps_operations_lie_between_each_pair_once_and_all_of_them(workload):
    cost = floor.sweep_cost(workload)
    counted = phases.lower_sweep(workload).compile().cost_analysis()["flops"]
    least, most = cost.flops + cost.symmetric_flops, cost.flops + cost.exact_flops
    assert least < counted < 1.15 * most


@pytest.mark.parametrize("workload", [WIDE, WIDE_LLAMA], ids=["opt", "llama"])
def test_scores_cost_the_products_that_xla_counts(workload):
    block = get_block(workload.params().segments[0], 0)
    parts = {}
    for site in block.layout.low_rank:
        d_in, d_out = maps(block)[site].shape
        rank = min(d_in, d_out)
        parts[site] = SVD(jnp.ones((d_in, rank)), jnp.ones(rank), jnp.ones((d_out, rank)))
    program = gradot_terms.lower(
        block.layout, maps(block), parts, phases.unit_factors(workload)
    ).compile()
    products = floor.selection_cost(workload).exact_flops
    assert program.cost_analysis()["flops"] == pytest.approx(products, rel=0.15)


@pytest.mark.parametrize("workload", [WIDE, WIDE_LLAMA], ids=["opt", "llama"])
def test_the_bundle_and_the_emulator_are_counted_as_they_are(workload):
    emulator = jax.tree.leaves(workload.emulator_shapes())
    matrices = sum(leaf.size for leaf in emulator if leaf.shape[-2:] != leaf.shape[-1:])
    weights = sum(leaf.size for leaf in emulator)
    assert weights >= floor.packaging_cost(workload).bytes / 8 > 0.95 * weights
    assert matrices >= floor.packaging_cost(workload).bytes / 8
