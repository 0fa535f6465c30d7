import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.plan import HarmonizerPlan, Plan
from gradot_jax.errors import InputError
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions, ScaleOTOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.methods.scaleot.scaleot import attention_ranks, num_replaced, replace_layers
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.params import get_block
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel
from gradot_jax.offsite.emulator import build_emulator

LAYERS, WIDTH = 6, 8
SPLIT = AdapterSpec(1, 1)
SCALEOT = ScaleOTOptions(steps=2, learning_rate=1e-2, harmonizer_rank=2, group_size=2)
# D 8 and F 12: a whole layer has 448 parameters in matrices, one of attention rank 2 has 320 and
# a harmonizer 32. The middle of four has 1792.
OPTIONS = CompressionOptions(method="scaleot", budget=0.4, scaleot=SCALEOT)


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def count(model):
    """The number replaced of a middle of four, at one rank of all kept attention."""

    def of(rank, budget):
        options = dataclasses.replace(OPTIONS, budget=budget)
        return num_replaced(model[0], 4, dict.fromkeys(LAYOUT.low_rank, rank), options)

    return of


@pytest.fixture(scope="module")
def batches(toy_batch):
    return [toy_batch(seed, size=4) for seed in range(4)]


@pytest.fixture(scope="module")
def build(model):
    """Builds outcome and emulator from a given importance, with harmonizers of noise."""
    rng = np.random.default_rng(0)
    parts = (WIDTH, 2), (2,), (2, WIDTH), (WIDTH,)
    arrays = [rng.normal(size=(LAYERS, *shape)).astype(np.float32) for shape in parts]
    harmonizers = Harmonizer(Dense(*arrays[:2]), Dense(*arrays[2:]))

    def make(importance, options=OPTIONS, dtype="float32"):
        config, params = model
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        problem = Problem(config=config, params=params, split=SPLIT, batches=[], options=options)
        outcome = replace_layers(problem, harmonizers, np.asarray(importance, np.float32))
        adapter = adapter_of(params, outcome.split or SPLIT)
        emulator = build_emulator(params.shell, adapter, outcome.blocks, outcome.layer_map)
        return outcome, emulator

    return make


def run(model, batches, options=OPTIONS):
    return run_compression(*model, SPLIT, batches, options)


def replaced(outcome):
    return [plan.layer for plan in outcome.layers if isinstance(plan, HarmonizerPlan)]


def matrix_params(layer) -> int:
    flat = jax.tree.leaves_with_path(layer)
    return sum(leaf.size for path, leaf in flat if path[-1].name in ("kernel", "left", "right"))


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.6, 0.72, 1.0])
def test_as_few_layers_as_the_budget_allows_are_replaced(count, budget):
    number = count(2, budget)
    stored = [n * 32 + (4 - n) * 320 for n in range(5)]
    assert stored[number] <= budget * 1792
    assert number == 0 or stored[number - 1] > budget * 1792


@pytest.mark.parametrize(
    ("removed", "rank"), [(0.0, None), (0.5, None), (0.6, 3), (0.8, 2), (0.99, 1)]
)
def test_rank_is_the_share_that_is_left_where_that_saves_parameters(model, removed, rank):
    scaleot = dataclasses.replace(SCALEOT, rank_removed=removed)
    ranks = attention_ranks(model[0], dataclasses.replace(OPTIONS, scaleot=scaleot))
    assert ranks == dict.fromkeys(LAYOUT.low_rank, rank)


def test_attention_that_stays_dense_counts_in_full(count):
    assert (count(None, 0.9), count(3, 0.9)) == (1, 0)


def test_budget_met_exactly_counts_as_met(count):
    assert count(2, 4 * 32 / 1792) == 4


def test_budget_out_of_reach_is_refused_with_the_least_possible(count, model, batches):
    with pytest.raises(InputError, match=r"0\.05 cannot be met.*at least 0\.0715.*smaller"):
        count(2, 0.05)
    assert count(2, 0.0715) == 4
    with pytest.raises(InputError, match="cannot be met"):
        run(model, batches, dataclasses.replace(OPTIONS, budget=0.05))


def test_emulator_of_a_sandwich_meets_its_budget_and_runs(model, batches):
    config, params = model
    result = run(model, batches)
    layers = list(result.emulator.stored_layers())
    assert sum(map(matrix_params, layers)) <= 0.4 * 1792
    kinds = [isinstance(plan, HarmonizerPlan) for plan in result.plan.layers]
    assert kinds == [isinstance(layer, Harmonizer) for layer in layers]
    assert sum(kinds) == 2
    assert [plan.layer for plan in result.plan.layers] == [1, 2, 3, 4]
    replaced = [plan.layer for plan in result.plan.layers if isinstance(plan, HarmonizerPlan)]
    assert result.calibration["replaced_layers"] == replaced
    assert result.calibration["adapter_layers"] == [0, 5]
    assert result.scores["importance"].shape == (LAYERS,)
    assert np.isfinite(result.calibration["replaced_loss"])
    logits = forward(config, result.emulator.assemble(), batches[0].input_ids)
    assert np.isfinite(logits).all()
    assert result.emulator.assemble().num_layers == params.num_layers


def test_least_important_of_each_group_of_the_middle_are_replaced(build):
    assert replaced(build([-9.0, 0.4, 0.1, 0.2, 0.3, -9.0])[0]) == [2, 3]


def test_kept_layers_lose_rank_in_attention_alone(build, model, assert_close):
    outcome, _ = build([0.0, 0.1, 0.4, 0.3, 0.2, 0.0])
    kept = [2, 3]
    assert replaced(outcome) == [1, 4]
    for plan, layer in zip(outcome.layers, outcome.blocks, strict=True):
        if plan.layer not in kept:
            continue
        original = get_block(model[1].segments[0], plan.layer)
        assert dict(plan.components) == dict.fromkeys(LAYOUT.low_rank, (0, 1))
        for site in LAYOUT.low_rank:
            u, s, vt = np.linalg.svd(np.asarray(getattr(original, site).kernel, np.float64))
            expected = (u[:, :2] * s[:2]) @ vt[:2]
            reduced = getattr(layer, site)
            assert isinstance(reduced, LowRank) and reduced.rank == 2
            assert_close(dense_kernel(reduced), expected, "float32")
            np.testing.assert_array_equal(reduced.bias, getattr(original, site).bias)
        for name in ("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"):
            pairs = zip(
                *(jax.tree.leaves(getattr(b, name)) for b in (layer, original)), strict=True
            )
            for got, wanted in pairs:
                np.testing.assert_array_equal(got, wanted)


def test_full_budget_and_rank_is_the_original(build, model, batches):
    whole = dataclasses.replace(SCALEOT, rank_removed=0.0)
    options = dataclasses.replace(OPTIONS, budget=1.0, scaleot=whole)
    _, emulator = build(np.zeros(LAYERS), options)
    logits, expected = (
        forward(model[0], params, batches[0].input_ids)
        for params in (emulator.assemble(), model[1])
    )
    np.testing.assert_array_equal(logits, expected)


def test_own_adapter_is_the_most_important_layers(build, model, batches):
    options = dataclasses.replace(OPTIONS, adapter="own")
    outcome, emulator = build([5.0, 0.2, 0.1, 4.0, 0.3, 0.4], options)
    assert outcome.split == AdapterSpec(1, 0, (3,))
    assert [plan.layer for plan in outcome.layers] == [1, 2, 4, 5]
    # In groups of two of the middle: of 1 and 2 the second, of 4 and 5 the first.
    assert replaced(outcome) == [2, 4]
    assert emulator.layer_map == outcome.layer_map == (0, 1, None, 2, 3)
    original = model[1].segments[0]
    np.testing.assert_array_equal(emulator.adapter.inner.fc1.kernel[0], original.fc1.kernel[3])
    assembled = emulator.assemble()
    assert assembled.num_layers == LAYERS
    assert np.isfinite(forward(model[0], assembled, batches[0].input_ids)).all()


def test_own_adapter_may_lie_at_neither_end(build):
    options = dataclasses.replace(OPTIONS, adapter="own")
    outcome, _ = build([0.0, 0.1, 3.0, 4.0, 0.2, 0.3], options)
    assert outcome.split == AdapterSpec(0, 0, (2, 3))


def test_own_adapter_is_learnt(model, batches):
    result = run(model, batches, dataclasses.replace(OPTIONS, adapter="own"))
    best = np.argsort(-result.scores["importance"], kind="stable")[:2]
    assert result.calibration["adapter_layers"] == sorted(best.tolist())
    plan = result.plan
    assert AdapterSpec(plan.num_bottom, plan.num_top, plan.inner).layers(LAYERS) == tuple(
        sorted(best.tolist())
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_harmonizers_have_the_dtype_of_the_model(build):
    outcome, _ = build(np.zeros(LAYERS), dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(outcome.blocks)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_few_batches_validate_as_well(model, batches):
    few = run(model, batches[:2]).calibration
    assert (few["training_batches"], few["held_out_batches"]) == (2, 0)
    more = run(model, batches).calibration
    assert (more["training_batches"], more["held_out_batches"]) == (3, 1)
