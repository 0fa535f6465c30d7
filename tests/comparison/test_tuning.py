import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradot_jax.comparison.tuning import all_blocks, rated_optimizer, tune
from gradot_jax.data.recipe import FineTuning
from gradot_jax.models.split import split_model
from gradot_jax.training.adapter import train_step
from gradot_jax.training.optimizer import make_optimizer

TUNING = FineTuning(steps=5, batch_size=4, learning_rate=1e-2, warmup=2, weight_decay=0.1)


def steps(optimizer):
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    state = optimizer.init(params)
    for i in range(4):
        gradient = jax.tree.map(lambda leaf, i=i: jnp.cos(leaf + i), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_a_factor_on_the_rate_is_that_rate(assert_close):
    expected = make_optimizer(
        learning_rate=2e-2, num_steps=5, warmup_steps=2, weight_decay=0.1, betas=(0.9, 0.98)
    )
    assert_close(steps(rated_optimizer(TUNING, 2.0)), steps(expected), "float32")


def test_optimizers_are_equal_whatever_the_rate_and_differ_by_settings():
    one, two = rated_optimizer(TUNING, 0.5), rated_optimizer(TUNING, 2.0)
    other = rated_optimizer(dataclasses.replace(TUNING, steps=6), 0.5)
    assert one == two and hash(one) == hash(two)
    assert one != other


def test_runs_of_several_rates_and_seeds_compile_one_step(toy_bed, tmp_path):
    bed = toy_bed()
    emulator = split_model(bed.params, bed.split)
    # Of other settings than the other tests', or the step would be compiled already.
    task = dataclasses.replace(bed.tasks[0], tuning=dataclasses.replace(TUNING, weight_decay=0.2))
    before = train_step._cache_size()
    losses = [
        tune(bed, emulator, task, seed=s, factor=f, curve=tmp_path / f"{f}.jsonl").loss
        for s, f in ((0, 0.5), (0, 2.0), (1, 1.0))
    ]
    assert train_step._cache_size() == before + 1
    assert len(set(losses)) > 1


def test_all_blocks_are_the_model_and_all_of_them_are_trained(toy_bed, tmp_path):
    bed = toy_bed()
    whole = all_blocks(bed.params)
    task = bed.tasks[0]
    tuned = tune(bed, whole, task, seed=0, factor=1.0, curve=tmp_path / "curve.jsonl")
    before, after = (np.asarray(a.bottom.fc1.kernel) for a in (whole.adapter, tuned.adapter))
    assert before.shape[0] == bed.config.num_hidden_layers
    assert (before != after).any(axis=(1, 2)).all()
