"""One training step of the adapter A1, A2 around a frozen middle, and its loss.

Gradients and optimiser state exist for the adapter only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import Block, Shell
from gradot_jax.models.opt.partition import param_shardings, shard_params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.optimizer import current_learning_rate
from gradot_jax.offsite.split import Adapter
from gradot_jax.parallel import DeviceMesh


class Frozen(NamedTuple):
    """What is not trained, in the dtype of the arithmetic.

    Attributes:
        shell: embeddings, final norm and head.
        middle: stacks of blocks between the adapter's two.
    """

    shell: Shell
    middle: tuple[Block, ...]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        adapter: float32, whatever the dtype of the arithmetic: an update of 1e-6 is lost in
            bfloat16.
        optimizer: state of the optimiser over the adapter.
    """

    adapter: Adapter
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """Scalars of one step, float32.

    Attributes:
        loss: nats per counted target, before the update.
        gradient_norm: before clipping.
        learning_rate: of the latest update; None when the optimiser does not record it.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array | None


def init_training(
    emulator: Emulator,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: DeviceMesh | None = None,
) -> tuple[Frozen, TrainState]:
    """Frozen weights cast once, and the state before the first step.

    The state shares no memory with the emulator, so that it may be donated.
    """
    frozen = _cast(Frozen(emulator.shell, emulator.middle), compute_dtype)
    adapter = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), emulator.adapter)
    state = TrainState(adapter, optimizer.init(adapter))
    if mesh is None:
        # Committed to the default device as what a checkpoint restores is, or the first step of
        # a resumed run would be compiled anew.
        return jax.device_put((frozen, state), jnp.zeros(()).sharding)
    return shard_params(frozen, mesh), shard_params(state, mesh)


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
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
    state = TrainState(optax.apply_updates(state.adapter, updates), optimizer_state)
    if mesh is not None:
        # Left to itself XLA may choose another layout, and the next step would compile again.
        state = jax.lax.with_sharding_constraint(state, param_shardings(state, mesh))
    learning_rate = current_learning_rate(optimizer_state)
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
    return jax.device_put(Batch(*rows), mesh.batched)


def _adapter_loss(
    config: OPTConfig, adapter: Adapter, frozen: Frozen, batch: Batch, remat: bool
) -> tuple[jax.Array, jax.Array]:
    adapter = _cast(adapter, frozen.shell.embed_tokens.dtype)
    params = Emulator(frozen.shell, adapter, frozen.middle).assemble()
    return summed_loss(config, params, batch, remat=remat)


def _cast(tree, dtype: DTypeLike):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
