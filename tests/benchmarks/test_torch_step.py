import os

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.torch_step import make_step, mean_loss, measure_step, to_torch
from benchmarks.workloads import WORKLOADS
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import unstack_blocks

SMOKE = WORKLOADS["cpu"]["smoke"]
BATCH = SMOKE.batches()[0]


@pytest.fixture
def emulator():
    # Small weights would attend evenly, whatever the queries.
    rng = np.random.default_rng(0)
    shapes = SMOKE.emulator_shapes()
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype("float32"), shapes)


@pytest.fixture
def model(emulator):
    return to_torch(emulator, SMOKE.config.num_attention_heads)


def without_key_biases(blocks):
    """They shift all scores of a query alike: their gradient is rounding alone."""
    return [block.replace(k_proj=block.k_proj.replace(bias=None)) for block in blocks]


def test_loss_and_gradient_of_the_adapter_are_ours(emulator, model, assert_close):
    def mean(adapter):
        total, count = summed_loss(SMOKE.config, emulator.assemble(adapter), BATCH)
        return total / count

    expected, gradient = jax.value_and_grad(mean)(emulator.adapter)
    loss = mean_loss(model, BATCH)
    loss.backward()
    assert_close(loss.item(), expected, "float32_model")
    got = [jax.tree.map(lambda leaf: leaf.grad.numpy().T, block) for block in model.adapter]
    got, expected = (without_key_biases(part) for part in (got, unstack_blocks(gradient.stacks)))
    assert_close(got, expected, "float32_model")


def test_a_step_trains_the_adapter_and_nothing_else(model):
    tensors = jax.tree.leaves((model.shell, model.blocks))
    before = [leaf.detach().clone() for leaf in tensors]
    step = make_step(model, BATCH)
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    trained = {id(leaf) for leaf in jax.tree.leaves(model.adapter)}
    for leaf, old in zip(tensors, before, strict=True):
        assert bool((leaf != old).any()) == (id(leaf) in trained)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set on Linux")
def test_all_sides_are_timed_in_turns():
    record = measure_step(1, "smoke", rounds=1)
    assert record["steps"] == 3
    assert set(record["tokens_per_second"]) == {"step_emulator", "step_full", "torch"}
    times = record["median_seconds"]
    assert np.isclose(record["over_torch"], times["torch"] / times["step_emulator"])
    assert record["flop_ratio"] > 1
