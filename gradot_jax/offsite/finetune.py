"""Fine-tuning of the adapter A1, A2 within an emulator: the data owner's part.

The same function trains the papers' upper bound on the owner's side: there the emulator's middle
is the original one, `Emulator(shell, adapter, (middle,))`.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.checkpoint import CheckpointStore, tree_digest
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.interrupt import Interrupted, stop_flag
from gradot_jax.offsite.metrics_file import MetricsFile
from gradot_jax.offsite.split import Adapter
from gradot_jax.offsite.training import (
    Frozen,
    StepMetrics,
    TrainState,
    evaluation_step,
    init_training,
    place_batch,
    train_step,
)
from gradot_jax.parallel import DeviceMesh
from gradot_jax.progress import track

logger = logging.getLogger("gradot_jax")

_ADVICE = (
    "try a lower learning rate, a longer warm-up, or float32 or bfloat16 if the arithmetic is "
    "float16"
)


class DivergenceError(RuntimeError):
    """Training came to a loss or gradient that is not finite; nothing of it has been saved."""


class Best(NamedTuple):
    """The adapter of least validation loss so far, in nats per counted target."""

    adapter: Adapter
    loss: float
    step: int


def finetune_adapter(
    config: OPTConfig,
    emulator: Emulator,
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
    _check_settings(num_steps, evaluate_every, validation, resume, checkpoints)
    dtype = jnp.float32 if compute_dtype is None else compute_dtype
    frozen, state = init_training(emulator, optimizer, compute_dtype=dtype, mesh=mesh)
    store, best, start = None, None, 0
    with ExitStack() as stack:
        if checkpoints is not None:
            identity = {"config": dataclasses.asdict(config), "emulator": tree_digest(emulator)}
            store = stack.enter_context(CheckpointStore(checkpoints, identity))
            validated = validation is not None
            state, best, start = _begin(store, state, resume=resume, validated=validated)
        metrics_file = stack.enter_context(MetricsFile(metrics_path, start))
        flag = stack.enter_context(stop_flag(enabled=store is not None))
        validate = partial(_validate, config, frozen, validation, mesh, metrics_file)
        if start == 0:
            best = validate(state.adapter, None, step=0)
        batches = _from_step(train_batches, start)
        watch = _Watch(metrics_file)
        for step in track(range(start + 1, num_steps + 1), "fine-tuning", enabled=progress):
            batch = _next(batches, step, num_steps)
            placed = place_batch(batch, mesh)
            state, metrics = train_step(
                config, optimizer, state, frozen, placed, remat=remat, mesh=mesh
            )
            watch.follow(step, metrics, num_tokens=int(np.sum(batch.attention_mask)))
            signum = flag.signum
            boundary = step % evaluate_every == 0 or step == num_steps
            if not boundary and signum is None:
                continue
            watch.settle()
            if boundary:
                best = validate(state.adapter, best, step=step)
            if store is not None:
                _save(store, step, state, best)
            if signum is not None:
                raise Interrupted(signum, step)
    return state.adapter if best is None else best.adapter


def _validate(
    config: OPTConfig,
    frozen: Frozen,
    batches: Sequence[Batch] | None,
    mesh: DeviceMesh | None,
    metrics_file: MetricsFile,
    adapter: Adapter,
    best: Best | None,
    *,
    step: int,
) -> Best | None:
    """The better of the best so far and the adapter as it is; None without validation."""
    if batches is None:
        return None
    sums = [evaluation_step(config, adapter, frozen, place_batch(b, mesh)) for b in batches]
    total, count = (sum(map(float, part)) for part in zip(*sums, strict=True))
    loss = total / count
    if not math.isfinite(loss):
        raise DivergenceError(f"the validation loss is {loss} after step {step}: {_ADVICE}")
    metrics_file.record(step, validation_loss=loss)
    logger.info("step %d: validation loss %.4f", step, loss)
    if best is not None and best.loss <= loss:
        return best
    # A copy, because the next step overwrites the original.
    return Best(jax.tree.map(jnp.copy, adapter), loss, step)


class _Watch:
    """Reads the metrics of a step while the next one runs, and stops a run that diverges."""

    def __init__(self, metrics_file: MetricsFile):
        self._file = metrics_file
        self._unread: tuple[int, StepMetrics, int] | None = None
        self._last_finite: float | None = None
        self._time = time.perf_counter()

    def follow(self, step: int, metrics: StepMetrics, num_tokens: int) -> None:
        """Takes the metrics of a step that was just started, and reads those of the last."""
        self.settle()
        self._unread = (step, metrics, num_tokens)

    def settle(self) -> None:
        """Reads what is unread; raises DivergenceError."""
        if self._unread is None:
            return
        (step, metrics, num_tokens), self._unread = self._unread, None
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(
                f"at step {step} the loss is {loss} and the gradient's norm {norm}, the last "
                f"finite loss was {self._last_finite}: {_ADVICE}"
            )
        self._last_finite = loss
        now = time.perf_counter()
        speed, self._time = num_tokens / (now - self._time), now
        rate = None if metrics.learning_rate is None else float(metrics.learning_rate)
        self._file.record(step, loss=loss, learning_rate=rate, tokens_per_second=speed)


def _check_settings(
    num_steps: int,
    evaluate_every: int,
    validation: Sequence[Batch] | None,
    resume: bool,
    checkpoints: Path | str | None,
) -> None:
    if num_steps < 1 or evaluate_every < 1:
        raise InputError(
            f"num_steps and evaluate_every must be at least 1, got {num_steps} and {evaluate_every}"
        )
    if resume and checkpoints is None:
        raise InputError("a run can only resume from a folder of checkpoints, none is given")
    if validation is not None and not any(np.any(batch.loss_mask) for batch in validation):
        raise InputError("the validation batches count no target: each loss_mask is zero")


def _from_step(
    train_batches: Iterable[Batch] | Callable[[int], Iterable[Batch]], start: int
) -> Iterator[Batch]:
    if callable(train_batches):
        return iter(train_batches(start))
    return itertools.islice(train_batches, start, None)


def _next(batches: Iterator[Batch], step: int, num_steps: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise InputError(f"the training batches ended after {step - 1} of {num_steps} steps")
    if not np.any(batch.loss_mask):
        raise InputError(f"the training batch of step {step} counts no target: loss_mask is zero")
    return batch


def _save(store: CheckpointStore, step: int, state: TrainState, best: Best | None) -> None:
    notes = {} if best is None else {"best_loss": best.loss, "best_step": best.step}
    store.save(step, _saved_tree(state, best and best.adapter), notes)


def _begin(
    store: CheckpointStore, state: TrainState, *, resume: bool, validated: bool
) -> tuple[TrainState, Best | None, int]:
    """State, best adapter and steps taken: from the newest checkpoint, or as they were given."""
    if not resume and store.steps:
        raise InputError(
            f"{store.folder} holds checkpoints of steps {store.steps}: resume from them, or "
            "choose another folder"
        )
    checkpoint = store.restore(_saved_tree(state, state.adapter if validated else None))
    if checkpoint is None:
        return state, None, 0
    tree, notes = checkpoint.state, checkpoint.notes
    best = None
    if validated:
        best = Best(tree["best"], notes["best_loss"], notes["best_step"])
    return TrainState(tree["adapter"], tree["optimizer"]), best, checkpoint.step


def _saved_tree(state: TrainState, best: Adapter | None) -> dict[str, Any]:
    return state._asdict() if best is None else {**state._asdict(), "best": best}
