import contextlib
import os
from concurrent.futures import Future
from pkgutil import resolve_name

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import torch_step
from benchmarks.harness import new_process
from benchmarks.phases import PHASES
from benchmarks.torch_step import make_step, mean_loss, to_torch
from benchmarks.workloads import WORKLOADS
from gradot_jax.models.params import unstack_blocks
from gradot_jax.models.run import summed_loss

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


def test_all_sides_take_turns_and_are_compared(monkeypatch):
    taken = []

    class Process(contextlib.nullcontext):
        def __init__(self, start, side, workload, threads):
            super().__init__(self)

        def submit(self, function, side, workload):
            taken.append(side)
            times = {"step_emulator": 2.0, "step_full": 3.0, "torch": 5.0}
            turn = Future()
            turn.set_result([0.5 * times[side], times[side], 9.0])
            return turn

    monkeypatch.setattr(torch_step, "new_process", Process)
    record = torch_step.measure_step(1, "smoke", rounds=2)
    assert taken == ["step_emulator", "step_full", "torch"] * 2 and record["steps"] == 6
    assert record["tokens_per_second"] == {"step_emulator": 8, "step_full": 16 / 3, "torch": 3.2}
    assert (record["over_torch"], record["speedup"]) == (2.5, 1.5)
    flops = [PHASES[side](SMOKE).cost.flops for side in ("step_full", "step_emulator")]
    assert record["flop_ratio"] == flops[0] / flops[1] > 1
    assert record["speedup_share"] == record["speedup"] / record["flop_ratio"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set on Linux")
def test_a_side_has_a_process_with_as_many_cpus_as_threads():
    start = torch_step._start, "step_emulator", "smoke", 1
    with new_process(*start) as process:
        assert len(process.submit(os.sched_getaffinity, 0).result()) == 1
        assert process.submit(resolve_name("torch:get_num_threads")).result() == 1
        seconds = process.submit(torch_step._turn, "step_emulator", "smoke").result()
    assert len(seconds) == 3 and min(seconds) > 0


def test_a_turn_of_pytorch_takes_its_time():
    seconds = torch_step._turn("torch", "smoke")
    assert len(seconds) == 3 and min(seconds) > 0
