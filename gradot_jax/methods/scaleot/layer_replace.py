"""Dynamic LayerReplace: harmonizers and layer importance, learned by turns (ScaleOT).

Every layer of the model has a harmonizer that starts as the identity, and an importance. A step

1. samples a network, in which some layers run raw and harmonizers stand in for the rest, and
   descends its next-token loss in the harmonizers alone;
2. samples a few more, and credits their losses on one held-out batch to the importance of their
   raw layers (`methods.scaleot.importance`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradot_jax.errors import InputError
from gradot_jax.files.digest import tree_digest
from gradot_jax.methods.options import ScaleOTOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.methods.scaleot.importance import sample_network, update_importance
from gradot_jax.models.family import ModelConfig, config_identity
from gradot_jax.models.params import Params, depth
from gradot_jax.models.partition import place, place_batch
from gradot_jax.models.run import apply_layer, embed, head, runs
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.harmonizer import Harmonizer, harmonize
from gradot_jax.nn.linear import Dense
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.parallel import DeviceMesh, to_host
from gradot_jax.training.adapter import descend
from gradot_jax.training.loop import DivergenceError, StepMetrics, run_training
from gradot_jax.training.optimizer import current_learning_rate, shared_optimizer
from gradot_jax.training.public_text import shuffled_epochs

INIT_STD = 0.02
"""Standard deviation of a fresh down projection."""

WEIGHT_DECAY = 0.01
"""Of the harmonizers' matrices; what AdamW has where nothing is said."""


class ReplaceState(NamedTuple):
    """What a step of Dynamic LayerReplace changes.

    Attributes:
        harmonizers: stack over all layers of the model, float32.
        optimizer: state of the optimiser over it.
        importance: `[L]`.
        key: raw bits of the random key of the next step.
    """

    harmonizers: Harmonizer
    optimizer: optax.OptState
    importance: jax.Array
    key: jax.Array


def init_harmonizers(config: ModelConfig, rank: int, key: jax.Array) -> Harmonizer:
    """A stack of harmonizers that are the identity, one for each layer; float32."""
    layers, width = config.num_hidden_layers, config.hidden_size
    return Harmonizer(
        down=Dense(
            INIT_STD * jax.random.normal(key, (layers, width, rank)), jnp.zeros((layers, rank))
        ),
        up=Dense(jnp.zeros((layers, rank, width)), jnp.zeros((layers, width))),
    )


def summed_network_loss(
    config: ModelConfig, model: Params, harmonizers: Harmonizer, raw: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss of a network in nats, summed over the counted targets, and their number.

    Args:
        config: of the model.
        model: the original as one stack of blocks, in any dtype; the arithmetic is that of
            float32.
        harmonizers: stack over the same layers.
        raw: `[L]` booleans, true where the block runs and false where the harmonizer does.
        batch: `[B, T]`.
    """
    mask = batch.attention_mask

    hidden = embed(config, model.shell, batch.input_ids, mask).astype(jnp.float32)
    start = 0
    for run, window in runs(config, model.segments):
        # One branch alone is computed. A conditional keeps what the backward pass needs of both,
        # so that is recomputed instead.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(hidden, weights, window=window):
            block, harmonizer, runs_raw = weights
            return jax.lax.cond(
                runs_raw,
                lambda: apply_layer(config, block, hidden, mask, window=window),
                lambda: harmonize(harmonizer, hidden),
            ), None

        stop = start + depth(run)
        beside = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], (harmonizers, raw))
        hidden, _ = jax.lax.scan(layer, hidden, (run, *beside))
        start = stop
    logits = head(config, model.shell, hidden)
    counted = batch.loss_mask.astype(jnp.float32)
    return -(token_log_likelihood(logits, batch.targets) * counted).sum(), counted.sum()


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "options", "mesh"), donate_argnames=("state",)
)
def replace_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    options: ScaleOTOptions,
    state: ReplaceState,
    model: Params,
    batch: Batch,
    validation: Batch,
    *,
    mesh: DeviceMesh | None = None,
) -> tuple[ReplaceState, StepMetrics]:
    """One step of Dynamic LayerReplace; `state` is donated.

    Args:
        config: of the model.
        optimizer: of the harmonizers, compared by identity when jit looks for a compiled step.
        options: of the method.
        state: before the step.
        model: the original as one stack of blocks.
        batch: `[B, T]`, on which the harmonizers descend.
        validation: `[S, B, T]`, each counting a target; one of S, drawn, validates all networks.
        mesh: where `state` lies, if anywhere but on one device.
    """

    def mean_loss(harmonizers: Harmonizer, raw: jax.Array, text: Batch) -> jax.Array:
        total, count = summed_network_loss(config, model, harmonizers, raw, text)
        return total / count

    keys = jax.random.split(jax.random.wrap_key_data(state.key), 3 + options.num_networks)
    draw = functools.partial(
        sample_network, importance=state.importance, group_size=options.group_size
    )
    loss, gradient = jax.value_and_grad(mean_loss)(state.harmonizers, draw(keys[1]), batch)
    harmonizers, optimizer_state = descend(
        optimizer, state.harmonizers, state.optimizer, gradient, mesh
    )
    drawn = jax.random.randint(keys[2], (), 0, validation.input_ids.shape[0])
    text = jax.tree.map(lambda leaf: leaf[drawn], validation)
    networks = jax.vmap(draw)(keys[3:])
    # A vmap would run both branches of every layer.
    losses = jax.lax.map(lambda raw: mean_loss(harmonizers, raw, text), networks)
    importance = update_importance(state.importance, networks, losses, options.importance_rate)
    rest = importance, jax.random.key_data(keys[0])
    if mesh is not None:
        rest = jax.lax.with_sharding_constraint(rest, mesh.replicated)
    metrics = StepMetrics(loss, optax.tree.norm(gradient), current_learning_rate(optimizer_state))
    return ReplaceState(harmonizers, optimizer_state, *rest), metrics


def harmonizer_optimizer(options: ScaleOTOptions) -> optax.GradientTransformation:
    """Of the harmonizers."""
    return shared_optimizer(
        learning_rate=options.learning_rate,
        num_steps=options.steps,
        schedule="constant",
        weight_decay=WEIGHT_DECAY,
    )


def train_harmonizers(
    problem: Problem, model: Params, training: Sequence[Batch], validation: Sequence[Batch]
) -> tuple[Harmonizer, np.ndarray]:
    """Runs Dynamic LayerReplace, or what is left of it after the newest checkpoint.

    Args:
        problem: its options, mesh and checkpoints are read, and its seed.
        model: the original as one stack of blocks, placed.
        training: batches on which the harmonizers descend.
        validation: batches that validate networks; one at least counts a target.

    Returns:
        Harmonizers of all layers, as numpy arrays on the host because the model they go into
        need not lie on the mesh, and importance `[L]`.

    Raises:
        InputError: for batches of unequal shapes, or checkpoints of another run.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the training; its state is saved.
    """
    config, mesh, options = problem.config, problem.mesh, problem.options.scaleot
    optimizer = harmonizer_optimizer(options)
    text = _stacked([batch for batch in validation if np.any(batch.loss_mask)], mesh)

    def step(state: ReplaceState, batch: Batch) -> tuple[ReplaceState, StepMetrics]:
        placed = place_batch(batch, mesh)
        return replace_step(config, optimizer, options, state, model, placed, text, mesh=mesh)

    checkpoints = problem.checkpoints
    trained = run_training(
        step,
        place(_initial_state(problem, optimizer), mesh),
        shuffled_epochs(training, problem.options.seed),
        num_steps=options.steps,
        keep=lambda state: (state.harmonizers, state.importance),
        evaluate_every=max(options.steps // 10, 1),
        checkpoints=checkpoints,
        identity=None if checkpoints is None else _identity(problem),
        resume=checkpoints is not None,
        progress=problem.progress,
        description="harmonizers",
    )
    harmonizers, importance = to_host(trained.kept)
    if not np.isfinite(importance).all():
        raise DivergenceError("a sampled network has a loss on held-out text that is not finite")
    return harmonizers, importance


def _initial_state(problem: Problem, optimizer: optax.GradientTransformation) -> ReplaceState:
    key, initial = jax.random.split(jax.random.key(problem.options.seed))
    rank, layers = problem.options.scaleot.harmonizer_rank, problem.config.num_hidden_layers
    harmonizers = init_harmonizers(problem.config, rank, initial)
    return ReplaceState(
        harmonizers, optimizer.init(harmonizers), jnp.zeros(layers), jax.random.key_data(key)
    )


def _stacked(batches: Sequence[Batch], mesh: DeviceMesh | None) -> Batch:
    shapes = {np.shape(batch.input_ids) for batch in batches}
    if len(shapes) > 1:
        raise InputError(f"scaleot: batches must have one shape, got {sorted(shapes)}")
    placed = [place_batch(batch, mesh) for batch in batches]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *placed)


def _identity(problem: Problem) -> dict[str, Any]:
    options = dataclasses.asdict(problem.options.scaleot)
    del options["rank_removed"]
    return {
        "method": "scaleot",
        "config": config_identity(problem.config),
        "model": tree_digest(problem.params),
        "text": tree_digest(list(problem.batches)),
        "options": options,
        "seed": problem.options.seed,
    }


def mean_network_loss(
    config: ModelConfig,
    model: Params,
    harmonizers: Harmonizer,
    raw: np.ndarray,
    batches: Sequence[Batch],
    mesh: DeviceMesh | None = None,
) -> float:
    """Loss of a network over several batches, in nats per counted target.

    Arguments as in `summed_network_loss`.
    """
    sums = [
        jitted_network_loss(config, model, harmonizers, raw, place_batch(batch, mesh))
        for batch in batches
    ]
    total, count = (sum(map(float, part)) for part in zip(*sums, strict=True))
    return total / count


jitted_network_loss = jax.jit(summed_network_loss, static_argnames=("config",))
