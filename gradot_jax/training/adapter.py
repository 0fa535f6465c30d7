"""Training of the adapter A1, A2 around a frozen middle: the step, its loss, and the whole run.

Gradients and optimiser state exist for the adapter only. The middle is an emulator's, on the data
owner's side, or the original's, the papers' upper bound on the model owner's.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.digest import tree_digest
from gradot_jax.models.family import ModelConfig, config_identity
from gradot_jax.models.params import Segment, merge_segments
from gradot_jax.models.partition import param_shardings, place, place_batch
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import Adapter, SplitModel
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.parallel import DeviceMesh
from gradot_jax.training.loop import StepMetrics, Trained, run_training
from gradot_jax.training.optimizer import current_learning_rate


@flax.struct.dataclass
class Frozen:
    """What is not trained, in the dtype of the arithmetic; fields as in `SplitModel`."""

    shell: Any
    middle: tuple[Segment, ...]
    inner_after: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        adapter: float32, whatever the dtype of the arithmetic: an update of 1e-6 is lost in
            bfloat16.
        optimizer: state of the optimiser over the adapter.
    """

    adapter: Adapter
    optimizer: optax.OptState


def init_training(
    emulator: SplitModel,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: DeviceMesh | None = None,
) -> tuple[Frozen, TrainState]:
    """Frozen weights stacked and cast once, and the state before the first step.

    The state shares no memory with the emulator, so that it may be donated.
    """
    frozen = frozen_part(emulator, compute_dtype)
    adapter = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), emulator.adapter)
    # Moments are made where the masters lie, so that no device has them all.
    adapter = place(adapter, mesh)
    state = TrainState(adapter, place(optimizer.init(adapter), mesh))
    return place(frozen, mesh), state


def frozen_part(model: SplitModel, compute_dtype: DTypeLike) -> Frozen:
    """What of a model is not trained, not placed yet."""
    middle, inner_after = _few_stacks(model)
    return cast(Frozen(model.shell, middle, inner_after), compute_dtype)


def _few_stacks(model: SplitModel) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """Middle and `inner_after` with neighbours of equal shape joined: less to compile."""
    middle: list[Segment] = []
    ends = []
    for start, stop in pairwise((0, *model.inner_after, len(model.middle))):
        middle += merge_segments(model.middle[start:stop])
        ends.append(len(middle))
    return tuple(middle), tuple(ends[:-1])


def descend(
    optimizer: optax.GradientTransformation,
    weights: Any,
    optimizer_state: optax.OptState,
    gradient: Any,
    mesh: DeviceMesh | None,
) -> tuple[Any, optax.OptState]:
    """Weights and optimiser state after one update, on the devices where they were."""
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
    after: Any = (optax.apply_updates(weights, updates), optimizer_state)
    if mesh is None:
        return after
    # Left to itself XLA may choose another layout, and the next step would compile again.
    return jax.lax.with_sharding_constraint(after, param_shardings(after, mesh))


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "remat", "mesh"), donate_argnames=("state",)
)
def train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    remat: bool = False,
    mesh: DeviceMesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One step on one batch; `state` is donated.

    Args:
        config: the model's variant.
        optimizer: equal ones share a compiled step; but for rated ones each equals itself alone.
        state: see `init_training`.
        frozen: see `init_training`.
        batch: counts at least one target.
        remat: recompute blocks in the backward pass.
        mesh: where `state` lies, if anywhere but on one device.
    """

    def loss_of(adapter: Adapter) -> tuple[jax.Array, jax.Array]:
        return _adapter_loss(config, adapter, frozen, batch, remat)

    # The sum is differentiated and its gradient divided: cotangents of a mean would be smaller by
    # the number of targets, and vanish in float16.
    (total, count), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.adapter)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    state = TrainState(*descend(optimizer, *state, gradient, mesh))
    learning_rate = current_learning_rate(state.optimizer)
    return state, StepMetrics(total / count, optax.tree.norm(gradient), learning_rate)


@functools.partial(jax.jit, static_argnames=("config",))
def evaluation_step(
    config: ModelConfig, adapter: Adapter, frozen: Frozen, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss of an adapter in nats, summed over the counted targets, and their number."""
    return _adapter_loss(config, adapter, frozen, batch, remat=False)


def _adapter_loss(
    config: ModelConfig, adapter: Adapter, frozen: Frozen, batch: Batch, remat: bool
) -> tuple[jax.Array, jax.Array]:
    adapter = cast(adapter, frozen.shell.embed_tokens.dtype)
    params = SplitModel(frozen.shell, adapter, frozen.middle, frozen.inner_after).assemble()
    return summed_loss(config, params, batch, remat=remat)


def train_adapter(
    config: ModelConfig,
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
) -> Trained:
    """Trains the adapter of an emulator on next-token loss; everything else is frozen.

    Validation is done before the first step, every `evaluate_every` steps and after the last one,
    so the result is never worse on it than the adapter that came in. Runs with equal shapes and
    equal optimizers share one compiled step.

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
        `Trained`, whose `kept` is the best adapter by validation loss, or the last without
        validation, in float32.

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
        validate = functools.partial(_mean_loss, config, frozen, validation, mesh)
    identity = None
    if checkpoints is not None:
        identity = {
            "config": config_identity(config),
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
    )


def finetune_adapter(
    config: ModelConfig,
    emulator: SplitModel,
    train_batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    **settings: Any,
) -> Adapter:
    """`train_adapter`, of whose result it returns the adapter alone.

    Args:
        config: the model's variant.
        emulator: the model; unchanged by the run.
        train_batches: batches of equal shape, or a function to them.
        optimizer: see `make_optimizer`.
        num_steps: batches to train on.
        settings: further arguments of `train_adapter`.

    Raises:
        InputError: as `train_adapter`.
        DivergenceError: when a loss or gradient is not finite.
    """
    return train_adapter(
        config, emulator, train_batches, optimizer, num_steps=num_steps, **settings
    ).kept


def _mean_loss(
    config: ModelConfig,
    frozen: Frozen,
    batches: Sequence[Batch],
    mesh: DeviceMesh | None,
    state: TrainState,
) -> float:
    """Nats per counted target."""
    sums = [evaluation_step(config, state.adapter, frozen, place_batch(b, mesh)) for b in batches]
    total, count = (sum(map(float, part)) for part in zip(*sums, strict=True))
    return total / count
