"""The programs of fine-tuning: the step and the validation, in an emulator or the full model."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from gradot_jax.models.family import ModelConfig
from gradot_jax.models.split import SplitModel
from gradot_jax.nn.dtypes import cast
from gradot_jax.programs.program import Place, Program
from gradot_jax.training.adapter import (
    Frozen,
    TrainState,
    evaluation_step,
    frozen_part,
    train_step,
)


def training_shapes(
    model: SplitModel, optimizer: optax.GradientTransformation, dtype: DTypeLike, place: Place
) -> tuple[TrainState, Frozen]:
    """What `init_training` makes of a model, as shapes."""

    def start(model: SplitModel) -> tuple[TrainState, Frozen]:
        adapter = cast(model.adapter, jnp.float32)
        return TrainState(adapter, optimizer.init(adapter)), frozen_part(model, dtype)

    return place.params(jax.eval_shape(start, model))


def finetuning_programs(
    config: ModelConfig,
    model: SplitModel,
    optimizer: optax.GradientTransformation,
    place: Place,
    *,
    batch_size: int,
    length: int,
    dtype: DTypeLike,
    remat: bool = False,
    num_steps: int = 1,
    validations: int = 0,
    validation_length: int | None = None,
    received: Any = (),
) -> list[Program]:
    """Those of `training.adapter.train_adapter`.

    Args:
        config: of the model.
        model: shapes of an emulator, or of the full model split.
        optimizer: as in `train_step`.
        place: where all of it lies.
        batch_size: rows of a batch.
        length: tokens of a row.
        dtype: of the arithmetic.
        remat: as in `train_step`.
        num_steps: of the run.
        validations: batches that are validated on in the whole run; without any there is no such
            program.
        validation_length: tokens of a row of those; as in training by default.
        received: shapes of what came of the bundle, which stays whole on the first device.
    """
    received = Place(place.devices[:1]).replicated(received)
    state, frozen = training_shapes(model, optimizer, dtype, place)
    batch = place.batch(batch_size, length)
    step = Program(
        name="training step",
        function=train_step,
        args=(config, optimizer, state, frozen, batch),
        kwargs={"remat": remat, "mesh": place.mesh},
        times=num_steps,
        # The best adapter so far.
        beside=(received, *((state.adapter,) if validations else ())),
    )
    if not validations:
        return [step]
    validation = Program(
        name="validation step",
        function=evaluation_step,
        args=(
            config,
            state.adapter,
            frozen,
            place.batch(batch_size, validation_length or length),
        ),
        times=validations,
        beside=(received, state.optimizer, state.adapter),
    )
    return [step, validation]
