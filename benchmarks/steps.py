"""The measured phases of training: one gradient, the unit of all others, and one step.

A step trains the adapter within the emulator, the same adapter within the full model, or all
weights. Each is also lowered from shapes alone, for models too large to run.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks import floor
from benchmarks.harness import Phase, text_phase
from benchmarks.workloads import Workload
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import Params
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.offsite.emulator import SplitModel, split_model
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.training import (
    Frozen,
    TrainState,
    descend,
    init_training,
    train_step,
)

Step = Literal["step_emulator", "step_full", "step_all"]
Arguments = tuple[Any, ...]


def gradient(workload: Workload) -> Phase:
    """The unit: the gradient of one batch's mean loss with respect to all weights."""
    params, batch = workload.params(), workload.batches()[0]
    run = jax.jit(jax.grad(partial(_mean_loss, workload)))
    return text_phase(workload, floor.gradient_cost(workload), 1, run, lambda: (params, batch))


def step_emulator(workload: Workload) -> Phase:
    """One fine-tuning step of the adapter within the emulator."""
    cost = floor.step_cost(workload, floor.emulator_block_weights(workload))
    return _step(workload, workload.emulator(), cost)


def step_full(workload: Workload) -> Phase:
    """One fine-tuning step of the same adapter around the original middle."""
    cost = floor.step_cost(workload, floor.block_weights(workload))
    return _step(workload, split_model(workload.params(), workload.split), cost)


def step_all(workload: Workload) -> Phase:
    """One fine-tuning step of all weights, as without any split; they are float32."""
    optimizer = _optimizer()
    arguments = _all_arguments(optimizer, workload.params(), workload.batches()[0])
    run = jax.jit(partial(_all_weights_step, workload, optimizer), donate_argnums=0)
    cost = floor.step_all_cost(workload)
    return text_phase(workload, cost, 1, run, lambda: arguments, advance=_advance)


def lower_gradient(workload: Workload) -> jax.stages.Lowered:
    """The gradient's program, from shapes alone."""
    run = jax.jit(jax.grad(partial(_mean_loss, workload)))
    return run.lower(workload.shapes(), _batch_shapes(workload))


def lower_step(workload: Workload, kind: Step) -> jax.stages.Lowered:
    """A step's program, from shapes alone."""
    optimizer, batch = _optimizer(), _batch_shapes(workload)
    if kind == "step_all":
        shapes = jax.eval_shape(partial(_all_arguments, optimizer), workload.shapes(), batch)
        run = jax.jit(partial(_all_weights_step, workload, optimizer), donate_argnums=0)
        return run.lower(*shapes)
    emulator = workload.emulator_shapes()
    if kind == "step_full":
        emulator = jax.eval_shape(partial(split_model, spec=workload.split), workload.shapes())
    frozen, state = jax.eval_shape(partial(_start, workload, optimizer), emulator)
    return train_step.lower(workload.config, optimizer, state, frozen, batch, remat=workload.remat)


def _start(workload: Workload, optimizer: optax.GradientTransformation, emulator: SplitModel):
    """What `init_training` makes, before it is placed: shapes have no place."""
    frozen = Frozen(emulator.shell, emulator.middle, emulator.inner_after)
    adapter = cast(emulator.adapter, jnp.float32)
    return cast(frozen, workload.dtype), TrainState(adapter, optimizer.init(adapter))


def _step(workload: Workload, emulator: SplitModel, cost: floor.Cost) -> Phase:
    optimizer = _optimizer()
    frozen, state = init_training(emulator, optimizer, compute_dtype=workload.dtype)
    arguments = state, frozen, workload.batches()[0]

    @partial(jax.jit, donate_argnums=0)
    def run(state: TrainState, frozen, batch: Batch):
        return train_step(workload.config, optimizer, state, frozen, batch, remat=workload.remat)

    return text_phase(workload, cost, 1, run, lambda: arguments, advance=_advance)


def _advance(arguments: Arguments, result: Arguments) -> Arguments:
    return result[0], *arguments[1:]


def _all_arguments(optimizer: optax.GradientTransformation, params: Params, batch: Batch):
    weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return (weights, optimizer.init(weights)), batch


def _all_weights_step(
    workload: Workload,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, optax.OptState],
    batch: Batch,
) -> tuple[tuple[Params, optax.OptState], jax.Array]:
    weights, moments = state

    def loss_of(weights: Params) -> jax.Array:
        return _mean_loss(workload, cast(weights, workload.dtype), batch)

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    return descend(optimizer, weights, moments, gradient, None), loss


def _mean_loss(workload: Workload, params: Params, batch: Batch) -> jax.Array:
    total, count = summed_loss(workload.config, params, batch, remat=workload.remat)
    return total / count


def _optimizer() -> optax.GradientTransformation:
    return make_optimizer(learning_rate=1e-3, num_steps=1000)


def _batch_shapes(workload: Workload) -> Batch:
    shape = (workload.batch_size, workload.length)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(ids, ids, weights, weights)
