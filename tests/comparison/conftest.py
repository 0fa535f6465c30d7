"""A testbed of the smallest model with a task that any model can be measured on."""

import functools

import jax
import numpy as np
import pytest

from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.data.recipe import FineTuning, Validity
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch


@pytest.fixture
def toy_task(toy_batch):
    """Builds a task whose measurement may be watched: `watch` is called before each."""

    def build(watch=lambda: None) -> Task:
        def examples(seed, size) -> Batch:
            return jax.tree.map(np.asarray, toy_batch(seed, size))

        test = examples(3, 4)

        def measure(config, params):
            watch()
            return {"perplexity": perplexity(config, params, [test]).perplexity}

        return Task(
            name="toy",
            label="random tokens, perplexity",
            metric="perplexity",
            higher_is_better=False,
            tuning=FineTuning(steps=2, batch_size=4, learning_rate=1e-2, warmup=1),
            train=examples(1, 8),
            development=examples(2, 4),
            measure=measure,
            test_digest="random tokens of seed 3",
            validity=Validity(gain=0.25, loss=0.8),
            evaluation_batch=4,
        )

    return build


@pytest.fixture
def toy_bed(toy_model, toy_batch, toy_task):
    """Builds a testbed of five blocks, 1 + 3 + 1."""

    @functools.cache
    def calibration(draw):
        return [toy_batch(10 + draw, 4)]

    def build(task=None) -> Testbed:
        config, params = toy_model()
        return Testbed(
            name="toy",
            config=config,
            params=params,
            split=AdapterSpec(1, 1),
            tasks=(task or toy_task(),),
            calibration=calibration,
            held_out=[toy_batch(5, 4)],
        )

    return build
