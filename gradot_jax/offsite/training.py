"""One training step of the adapter A1, A2 around a frozen middle, and its loss.

Gradients and optimiser state exist for the adapter only.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import Segment, Shell
from gradot_jax.models.opt.partition import param_shardings, shard_params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.emulator import SplitModel
from gradot_jax.offsite.loop import StepMetrics
from gradot_jax.offsite.optimizer import current_learning_rate
from gradot_jax.offsite.split import Adapter
from gradot_jax.offsite.stacking import few_stacks
from gradot_jax.parallel import DeviceMesh, put


@flax.struct.dataclass
class Frozen:
    """What is not trained, in the dtype of the arithmetic; fields as in `SplitModel`."""

    shell: Shell
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
    stacked = few_stacks(emulator)
    frozen = _cast(Frozen(stacked.shell, stacked.middle, stacked.inner_after), compute_dtype)
    adapter = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), emulator.adapter)
    # Moments are made where the masters lie, so that no device has them all.
    adapter = place(adapter, mesh)
    state = TrainState(adapter, place(optimizer.init(adapter), mesh))
    return place(frozen, mesh), state


def place(tree, mesh: DeviceMesh | None):
    """Puts a tree of OPT parameters, or a state over such, on its devices."""
    if mesh is None:
        # Committed to the default device as what a checkpoint restores is, or the first step of
        # a resumed run would be compiled anew.
        return jax.device_put(tree, jnp.zeros(()).sharding)
    return shard_params(tree, mesh)


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
    config: OPTConfig,
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
        optimizer: compared by identity when jit looks for a compiled step.
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
    config: OPTConfig, adapter: Adapter, frozen: Frozen, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss of an adapter in nats, summed over the counted targets, and their number."""
    return _adapter_loss(config, adapter, frozen, batch, remat=False)


def place_batch(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """Puts a batch on its devices, its rows over `data`.

    Rows that count nothing are added until `data` divides their number; the loss is the same.
    """
    if mesh is None:
        return Batch(*map(jnp.asarray, batch))
    missing = -len(batch.input_ids) % mesh.mesh.shape["data"]
    rows = (np.pad(np.asarray(leaf), ((0, missing), (0, 0))) for leaf in batch)
    return put(Batch(*rows), mesh.batched)


def _adapter_loss(
    config: OPTConfig, adapter: Adapter, frozen: Frozen, batch: Batch, remat: bool
) -> tuple[jax.Array, jax.Array]:
    adapter = _cast(adapter, frozen.shell.embed_tokens.dtype)
    params = SplitModel(frozen.shell, adapter, frozen.middle, frozen.inner_after).assemble()
    return summed_loss(config, params, batch, remat=remat)


def _cast(tree, dtype: DTypeLike):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
