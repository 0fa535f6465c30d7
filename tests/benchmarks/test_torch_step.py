import contextlib
import json
import os
from concurrent.futures import Future
from pkgutil import resolve_name
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import torch_step
from benchmarks.harness import new_process
from benchmarks.phases import PHASES
from benchmarks.torch_step import Turn, make_step, mean_loss, to_torch
from benchmarks.workloads import WORKLOADS
from gradot_jax.models.params import unstack_blocks
from gradot_jax.models.run import summed_loss

SMOKE = WORKLOADS["cpu"]["smoke"]


@pytest.fixture(params=["smoke", "smoke-llama"])
def workload(request):
    return WORKLOADS["cpu"][request.param]


@pytest.fixture
def emulator(workload):
    # Small weights would attend evenly, whatever the queries.
    rng = np.random.default_rng(0)
    shapes = workload.emulator_shapes()
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype("float32"), shapes)


@pytest.fixture
def model(workload, emulator):
    return to_torch(workload.config, emulator)


def without_key_biases(blocks):
    """They shift all scores of a query alike: their gradient is rounding alone."""
    return [block.replace(k_proj=block.k_proj.replace(bias=None)) for block in blocks]


def test_loss_and_gradient_of_the_adapter_are_ours(workload, emulator, model, assert_close):
    batch = workload.batches()[0]

    def mean(adapter):
        total, count = summed_loss(workload.config, emulator.assemble(adapter), batch)
        return total / count

    expected, gradient = jax.value_and_grad(mean)(emulator.adapter)
    loss = mean_loss(model, batch)
    loss.backward()
    assert_close(loss.item(), expected, "float32_model")
    got = [jax.tree.map(lambda leaf: leaf.grad.numpy().T, block) for block in model.adapter]
    got, expected = (without_key_biases(part) for part in (got, unstack_blocks(gradient.stacks)))
    assert_close(got, expected, "float32_model")


def test_a_step_trains_the_adapter_and_nothing_else(workload, model):
    tensors = jax.tree.leaves((model.shell, model.blocks))
    before = [leaf.detach().clone() for leaf in tensors]
    step = make_step(model, workload.batches()[0])
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    trained = {id(leaf) for leaf in jax.tree.leaves(model.adapter)}
    for leaf, old in zip(tensors, before, strict=True):
        assert bool((leaf != old).any()) == (id(leaf) in trained)


RATES = {"flops_per_second": 1e6, "exact_flops_per_second": 1.0, "bytes_per_second": 1e9}


@pytest.fixture
def taken(monkeypatch):
    """The sides in the order of their turns, of processes that do nothing; PyTorch's last loss."""
    found = SimpleNamespace(sides=[], loss=3.0)

    class Process(contextlib.nullcontext):
        def __init__(self, start, side, workload, threads):
            super().__init__(self)
            self.side = side

        def submit(self, function, *arguments):
            times = {"step_emulator": 2.0, "step_full": 3.0, "torch": 5.0}[self.side]
            result = RATES
            if function is torch_step._turn:
                found.sides.append(self.side)
                loss = found.loss if self.side == "torch" else 3.0
                result = Turn((0.5 * times, times, 9.0), (4.0, 3.5, loss))
            turn = Future()
            turn.set_result(result)
            return turn

    monkeypatch.setattr(torch_step, "new_process", Process)
    return found


def test_all_sides_take_turns_and_are_compared(taken):
    record = torch_step.measure_step(1, "smoke", rounds=2)
    assert taken.sides == ["step_emulator", "step_full", "torch"] * 2 and record["steps"] == 6
    assert record["tokens_per_second"] == {"step_emulator": 8, "step_full": 16 / 3, "torch": 3.2}
    assert (record["over_torch"], record["speedup"]) == (2.5, 1.5)
    flops = [PHASES[side](SMOKE).cost.flops for side in ("step_full", "step_emulator")]
    assert record["flop_ratio"] == flops[0] / flops[1] > 1
    assert record["speedup_share"] == record["speedup"] / record["flop_ratio"]
    floors = {"step_emulator": flops[1], "step_full": flops[0], "torch": flops[1]}
    seconds = record["median_seconds"]
    assert record["fraction_of_floor"] == {
        side: pytest.approx(floors[side] / 1e6 / seconds[side]) for side in floors
    }
    json.dumps(record)


def test_sides_that_do_not_compute_the_same_are_not_compared(taken):
    taken.loss = 3.001
    with pytest.raises(ValueError, match="losses of both sides differ"):
        torch_step.measure_step(1, "smoke", rounds=2)


@pytest.mark.parametrize("name", ["smoke", "smoke-llama"])
def test_turns_of_both_sides_come_to_the_same_losses(name):
    ours, theirs = (torch_step._turn(side, name) for side in ("step_emulator", "torch"))
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-6)
    assert ours.losses[-1] < ours.losses[0]
    assert all(len(turn.seconds) == 3 and min(turn.seconds) > 0 for turn in (ours, theirs))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set on Linux")
def test_a_side_has_a_process_with_as_many_cpus_as_threads():
    start = torch_step._start, "step_emulator", "smoke", 1
    with new_process(*start) as process:
        assert len(process.submit(os.sched_getaffinity, 0).result()) == 1
        assert process.submit(resolve_name("torch:get_num_threads")).result() == 1
        turn = process.submit(torch_step._turn, "step_emulator", "smoke").result()
    assert len(turn.seconds) == 3 and min(turn.seconds) > 0
