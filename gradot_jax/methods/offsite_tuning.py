"""`offsite-tuning`: evenly spread layers, distilled on public text (Xiao et al. 2023).

With h the input of the middle, s the output of the kept layers S and t that of all middle layers,

    kd = sum |t - s|^2 / sum |t|^2,    loss = lm_weight * lm + kd_weight * kd,

where the sums run over the real tokens of a batch and lm is the next-token loss of the emulator.
Two departures from the authors' code: padding does not count in kd, and no dropout is applied,
where theirs keeps the model's own (0.1) on. As there, the weights of least lm on held-out text are
kept; those that were merely dropped to are among the candidates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradot_jax.files.digest import tree_digest
from gradot_jax.methods import layer_drop
from gradot_jax.methods.options import CompressionOptions, DistillationOptions
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.methods.table import Stored
from gradot_jax.models.family import ModelConfig, config_identity
from gradot_jax.models.params import count_params, depth, get_block, stack_blocks
from gradot_jax.models.partition import place, place_batch
from gradot_jax.models.run import embed, head, run_blocks
from gradot_jax.models.split import AdapterSpec, SplitModel, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import Block
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.parallel import DeviceMesh
from gradot_jax.training.adapter import descend
from gradot_jax.training.loop import StepMetrics, Trained, run_training
from gradot_jax.training.optimizer import current_learning_rate, shared_optimizer
from gradot_jax.training.public_text import hold_out, shuffled_epochs


class DistillationState(NamedTuple):
    """What a step changes.

    Attributes:
        student: stack of the kept layers, float32.
        optimizer: state of the optimiser over it.
    """

    student: Block
    optimizer: optax.OptState


class DistillationSums(NamedTuple):
    """Float32 scalars, summed over a batch; both losses are quotients of two.

    Attributes:
        error: squared error of the student's output at real tokens.
        energy: squared output of the original middle there.
        nats: next-token loss of the emulator over the counted targets.
        targets: their number.
    """

    error: jax.Array
    energy: jax.Array
    nats: jax.Array
    targets: jax.Array

    @property
    def normalised_error(self) -> jax.Array:
        """Error relative to the energy: kd."""
        return self.error / self.energy

    @property
    def lm_loss(self) -> jax.Array:
        """Nats per counted target."""
        return self.nats / self.targets


def compress(problem: Problem) -> Outcome:
    """Keeps as many layers as the budget holds, and trains them.

    Goes on from the newest checkpoint of the same run in `problem.checkpoints`. The blocks come
    back in the dtype of the original.

    Raises:
        InputError: for a split with inner blocks, without a batch,
            with batches that count no target, or when the checkpoints belong to another run.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the training; its state is saved.
    """
    dropped = layer_drop.compress(problem)
    training, held_out = hold_out(problem.batches)
    student = place(stack_blocks(dropped.blocks), problem.mesh)
    original = place(split_model(problem.params, problem.split), problem.mesh)
    measured = held_out or training
    measure = functools.partial(_measure, problem.config, original, measured, problem.mesh)
    trained = _distil(problem, student, original, training, held_out)
    blocks = jax.tree.map(lambda new, old: new.astype(old.dtype), trained.kept, student)
    calibration = {
        "steps": problem.options.distillation.steps,
        "best_step": trained.step,
        "training_batches": len(training),
        "held_out_batches": len(held_out),
        "initial": measure(student),
        "final": measure(blocks),
    }
    singles = [get_block(blocks, layer) for layer in range(depth(blocks))]
    return dataclasses.replace(dropped, blocks=singles, calibration=calibration)


def distillation_sums(
    config: ModelConfig, student: Block, original: SplitModel, batch: Batch
) -> DistillationSums:
    """Both losses of a student on a batch; no gradient reaches anything but the student.

    Args:
        config: of the model.
        student: stack of the layers that stand in for the middle.
        original: the full model, in any dtype; the arithmetic is that of float32.
        batch: `[B, T]`.
    """
    mask, adapter = batch.attention_mask, original.adapter
    shell = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), original.shell)
    bottom, top = adapter.split.num_bottom, adapter.split.num_top
    whole, small = config.num_hidden_layers, bottom + depth(student) + top
    embedded = embed(config, shell, batch.input_ids, mask)
    inputs = run_blocks(config, (adapter.bottom,), embedded, mask, num_layers=whole)
    wanted = run_blocks(config, original.middle, inputs, mask, first=bottom, num_layers=whole)
    outputs = run_blocks(config, (student,), inputs, mask, first=bottom, num_layers=small)
    after = run_blocks(config, (adapter.top,), outputs, mask, first=whole - top, num_layers=whole)
    logits = head(config, shell, after)
    counted = batch.loss_mask.astype(jnp.float32)
    real = mask.astype(jnp.float32)[..., None]
    return DistillationSums(
        error=(jnp.square(wanted - outputs) * real).sum(),
        energy=(jnp.square(wanted) * real).sum(),
        nats=-(token_log_likelihood(logits, batch.targets) * counted).sum(),
        targets=counted.sum(),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "weights", "mesh"), donate_argnames=("state",)
)
def distillation_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: DistillationState,
    original: SplitModel,
    batch: Batch,
    weights: tuple[float, float],
    *,
    mesh: DeviceMesh | None,
) -> tuple[DistillationState, StepMetrics]:
    """One step on one batch; `state` is donated, and `weights` are of next tokens and error."""

    def loss_of(student: Block) -> jax.Array:
        sums = distillation_sums(config, student, original, batch)
        losses = zip(weights, (sums.lm_loss, sums.normalised_error), strict=True)
        # Without its error the original middle does not run at all.
        return sum((weight * loss for weight, loss in losses if weight), jnp.zeros(()))

    loss, gradient = jax.value_and_grad(loss_of)(state.student)
    state = DistillationState(*descend(optimizer, *state, gradient, mesh))
    rate = current_learning_rate(state.optimizer)
    return state, StepMetrics(loss, optax.tree.norm(gradient), rate)


def distillation_optimizer(options: DistillationOptions) -> optax.GradientTransformation:
    """Of the student."""
    return shared_optimizer(
        learning_rate=options.learning_rate,
        num_steps=options.steps,
        warmup_steps=options.warmup_steps,
        schedule="cosine",
        weight_decay=options.weight_decay,
    )


def _distil(
    problem: Problem,
    student: Block,
    original: SplitModel,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
) -> Trained:
    config, mesh, options = problem.config, problem.mesh, problem.options.distillation
    optimizer = distillation_optimizer(options)
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), student)
    state = place(DistillationState(copy, optimizer.init(copy)), mesh)
    weights = options.lm_weight, options.kd_weight

    def step(state, batch):
        placed = place_batch(batch, mesh)
        return distillation_step(config, optimizer, state, original, placed, weights, mesh=mesh)

    def validate(state) -> float:
        return _measure(config, original, held_out, mesh, state.student)["lm_loss"]

    checkpoints = problem.checkpoints
    return run_training(
        step,
        state,
        shuffled_epochs(training, problem.options.seed),
        num_steps=options.steps,
        keep=lambda state: state.student,
        validate=validate if held_out else None,
        # The authors' 100 steps, or a fifth of a short run.
        evaluate_every=min(100, max(options.steps // 5, 1)),
        checkpoints=checkpoints,
        identity=None if checkpoints is None else _identity(problem),
        resume=checkpoints is not None,
        progress=problem.progress,
        description="distillation",
    )


def _measure(
    config: ModelConfig,
    original: SplitModel,
    batches: Sequence[Batch],
    mesh: DeviceMesh | None,
    student: Block,
) -> dict[str, float]:
    """Both losses over several batches."""
    sums = [jitted_sums(config, student, original, place_batch(batch, mesh)) for batch in batches]
    total = DistillationSums(*(sum(map(float, part)) for part in zip(*sums, strict=True)))
    return {"normalised_error": total.normalised_error, "lm_loss": total.lm_loss}


jitted_sums = jax.jit(distillation_sums, static_argnames=("config",))


def _identity(problem: Problem) -> dict[str, Any]:
    """What a run is, beside the shapes of its state, which say how many layers it keeps."""
    return {
        "config": config_identity(problem.config),
        "split": dataclasses.asdict(problem.split),
        "distillation": dataclasses.asdict(problem.options.distillation),
        "seed": problem.options.seed,
        "model": tree_digest(problem.params),
        "text": tree_digest(problem.batches),
    }


def forecast(config: ModelConfig, split: AdapterSpec, options: CompressionOptions) -> Stored:
    """The layers that are kept and trained, see `methods.table.Stored`."""
    stored = layer_drop.forecast(config, split, options)
    trained = len(stored.shapes) * count_params(config.family.block_shapes(config))
    return stored._replace(trained=trained)
