import dataclasses

import numpy as np

from gradot_jax.comparison.jobs import all_blocks, tune
from gradot_jax.data.recipe import FineTuning
from gradot_jax.models.split import split_model
from gradot_jax.training.adapter import train_step

TUNING = FineTuning(steps=5, batch_size=4, learning_rate=1e-2, warmup=2, weight_decay=0.1)


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
