"""Fine-tuning of the adapter A1, A2 within an emulator: the data owner's part.

The same function trains the papers' upper bound on the owner's side: there the emulator's middle
is the original one, a `SplitModel`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.checkpoint import tree_digest
from gradot_jax.offsite.emulator import SplitModel
from gradot_jax.offsite.loop import DivergenceError as DivergenceError
from gradot_jax.offsite.loop import StepMetrics, run_training
from gradot_jax.offsite.split import Adapter
from gradot_jax.offsite.training import (
    Frozen,
    TrainState,
    evaluation_step,
    init_training,
    place_batch,
    train_step,
)
from gradot_jax.parallel import DeviceMesh


def finetune_adapter(
    config: OPTConfig,
    emulator: SplitModel,
    train_batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    validation_batches: Iterable[Batch] | None = None,
    evaluate_every: int = 100,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
    mesh: DeviceMesh | None = None,
    checkpoints: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    metrics_path: Path | str | None = None,
    progress: bool = False,
) -> Adapter:
    """Trains the adapter of an emulator on next-token loss; everything else is frozen.

    Validation is done before the first step, every `evaluate_every` steps and after the last one,
    so the result is never worse on it than the adapter that came in. Runs with equal shapes and
    the same optimizer object share one compiled step.

    Args:
        config: the model's variant.
        emulator: the model; unchanged by the run.
        train_batches: batches of equal shape, at least `num_steps` of them; or a function from
            the number of steps already taken to the batches that follow. Only a function spares a
            resumed run from drawing the batches of the steps already taken.
        optimizer: see `make_optimizer`.
        num_steps: batches to train on. An optimizer that accumulates over k of them makes
            `num_steps / k` updates.
        validation_batches: they choose the best adapter; None returns the last one.
        evaluate_every: steps between two validations, and between two checkpoints.
        compute_dtype: of all arithmetic but the update; None is float32.
        remat: recompute blocks in the backward pass.
        mesh: spreads batches and weights; None runs on the default device.
        checkpoints: folder for the state of the run; with one, SIGTERM and SIGINT save before
            they stop it.
        settings: JSON values that must be equal for a run to be resumed, besides model, emulator
            and validation: what the optimizer and the batches were made of.
        resume: go on from the newest checkpoint, if there is one.
        metrics_path: JSON lines of `step`, `loss`, `learning_rate` and `tokens_per_second`, and
            of `step` and `validation_loss`, in nats per counted target.
        progress: show progress on standard error.

    Returns:
        The best adapter by validation loss, or the last without validation, in float32.

    Raises:
        InputError: for batches that run out or count no target, or when the checkpoints belong
            to another run, or exist and `resume` is false.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the run; its state is saved.
        OSError: when a checkpoint cannot be written.
    """
    validation = None if validation_batches is None else tuple(validation_batches)
    if validation is not None and not any(np.any(batch.loss_mask) for batch in validation):
        raise InputError("the validation batches count no target: each loss_mask is zero")
    dtype = jnp.float32 if compute_dtype is None else compute_dtype
    frozen, state = init_training(emulator, optimizer, compute_dtype=dtype, mesh=mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        placed = place_batch(batch, mesh)
        return train_step(config, optimizer, state, frozen, placed, remat=remat, mesh=mesh)

    validate = None
    if validation is not None:
        validate = partial(_mean_loss, config, frozen, validation, mesh)
    identity = None
    if checkpoints is not None:
        identity = {
            "config": dataclasses.asdict(config),
            "emulator": tree_digest(emulator),
            "validation": validation and tree_digest(validation),
            "settings": dict(settings or {}),
        }
    return run_training(
        step,
        state,
        train_batches,
        num_steps=num_steps,
        keep=lambda state: state.adapter,
        validate=validate,
        evaluate_every=evaluate_every,
        checkpoints=checkpoints,
        identity=identity,
        resume=resume,
        metrics_path=metrics_path,
        progress=progress,
        description="fine-tuning",
    ).kept


def _mean_loss(
    config: OPTConfig,
    frozen: Frozen,
    batches: Sequence[Batch],
    mesh: DeviceMesh | None,
    state: TrainState,
) -> float:
    """Nats per counted target."""
    sums = [evaluation_step(config, state.adapter, frozen, place_batch(b, mesh)) for b in batches]
    total, count = (sum(map(float, part)) for part in zip(*sums, strict=True))
    return total / count
