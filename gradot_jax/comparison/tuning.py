"""Fine-tuning runs that differ in seed, rate and weights, and share their compiled step."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.data.examples import epoch_batches, eval_batches
from gradot_jax.models.params import Params, concatenate_blocks, slice_blocks
from gradot_jax.models.split import Adapter, SplitModel
from gradot_jax.training.adapter import train_adapter
from gradot_jax.training.optimizer import rated_optimizer


class Tuned(NamedTuple):
    """A finished fine-tuning.

    Attributes:
        adapter: the best by development loss.
        loss: that loss, nats per counted target.
        step: at which it was, 0 for the adapter as it was shipped.
        seconds: of the tuning.
    """

    adapter: Adapter
    loss: float
    step: int
    seconds: float


def tune(
    bed: Testbed, emulator: SplitModel, task: Task, *, seed: int, factor: float, curve: Path
) -> Tuned:
    """Tunes the adapter of an emulator on a task, at a factor on its rate; `curve` is the history.

    Raises:
        DivergenceError: when a loss or gradient is not finite.
    """
    tuning, began = task.tuning, time.perf_counter()
    trained = train_adapter(
        bed.config,
        emulator,
        lambda step: epoch_batches(task.train, tuning.batch_size, seed=seed, start_step=step),
        rated_optimizer(
            factor,
            learning_rate=tuning.learning_rate,
            num_steps=tuning.steps,
            warmup_steps=tuning.warmup,
            weight_decay=tuning.weight_decay,
            betas=(tuning.b1, tuning.b2),
            clip_norm=tuning.clip_norm,
        ),
        num_steps=tuning.steps,
        validation_batches=list(eval_batches(task.development, task.evaluation_batch)),
        evaluate_every=-(-tuning.steps // tuning.evaluations),
        compute_dtype=bed.compute_dtype,
        mesh=bed.mesh,
        metrics_path=curve,
    )
    seconds = time.perf_counter() - began
    assert trained.loss is not None  # it was validated
    return Tuned(trained.kept, trained.loss, trained.step, seconds)


def all_blocks(params: Params) -> SplitModel:
    """The full model with every block in the adapter, to train all of them."""
    blocks = concatenate_blocks(params.segments)
    count = params.num_layers
    adapter = Adapter(bottom=blocks, top=slice_blocks(blocks, count, count))
    return SplitModel(params.shell, jax.tree.map(jnp.asarray, adapter), ())
