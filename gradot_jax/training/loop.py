"""The one training loop: whatever trains here is a step function over some state.

It owns what is the same for all of them: checkpoints and resuming, signals, the file of metrics,
the choice of the best state by validation, and the watch over divergence.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch
from gradot_jax.progress import track
from gradot_jax.training.checkpoint_store import CheckpointStore
from gradot_jax.training.metrics import MetricsFile
from gradot_jax.training.stop import Interrupted, stop_flag

logger = logging.getLogger("gradot_jax")

_ADVICE = (
    "try a lower learning rate, a longer warm-up, or float32 or bfloat16 if the arithmetic is "
    "float16"
)


class DivergenceError(RuntimeError):
    """Training came to a loss or gradient that is not finite; nothing of it has been saved."""


class StepMetrics(NamedTuple):
    """Scalars of one step, float32.

    Attributes:
        loss: before the update; nats per counted target where it is a next-token loss.
        gradient_norm: before clipping.
        learning_rate: of the latest update; None when the optimiser does not record it.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array | None


class Best(NamedTuple):
    """What was kept of the state of least validation loss so far."""

    kept: Any
    loss: float
    step: int


class Trained(NamedTuple):
    """The result of a run.

    Attributes:
        kept: what `keep` takes of the best state by validation, or of the last without validation.
        state: the last state.
        step: steps that `kept` had seen.
        loss: validation loss of `kept`; None without validation.
    """

    kept: Any
    state: Any
    step: int
    loss: float | None


def run_training(
    step: Callable[[Any, Batch], tuple[Any, StepMetrics]],
    state: Any,
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    *,
    num_steps: int,
    keep: Callable[[Any], Any],
    validate: Callable[[Any], float] | None = None,
    evaluate_every: int = 100,
    checkpoints: Path | str | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    metrics_path: Path | str | None = None,
    progress: bool = False,
    description: str = "training",
) -> Trained:
    """Takes `num_steps` steps from a state, or what is left of them after the newest checkpoint.

    All that a step depends on, beside its batch, belongs into the state: random keys, counters
    and whatever is learnt without a gradient. Then a resumed run equals an uninterrupted one.

    Example:
        >>> import jax.numpy as jnp
        >>> class Sum(NamedTuple):
        ...     total: jax.Array
        >>> def step(state, batch):
        ...     total = state.total + batch.loss_mask.sum()
        ...     return Sum(total), StepMetrics(total, total, None)
        >>> batch = Batch(*[np.ones((2, 3), np.float32)] * 4)
        >>> run_training(
        ...     step, Sum(jnp.zeros(())), [batch] * 2, num_steps=2, keep=lambda state: state.total
        ... ).kept.item()
        12.0

    Args:
        step: from state and batch to the next state and its metrics. It may donate the state, and
            places the batch on its devices itself (`models.partition.place_batch`).
        state: a NamedTuple of trees of JAX arrays, placed (`models.partition.place`); no field
            may be called `best`. Its leaves keep shape, dtype and sharding from step to step.
        batches: batches of equal shape, each counting a target and at least `num_steps` of them;
            or a function from the number of steps already taken to the batches that follow, such
            as `public_text.shuffled_epochs` makes. Only a function spares a resumed run from
            drawing the batches of the steps already taken.
        num_steps: batches to train on, those before a checkpoint included.
        keep: takes from a state what is to be returned, a tree of its arrays.
        validate: loss of a state, by which the best is chosen: before the first step, every
            `evaluate_every` steps and after the last one, so that the result is never worse on it
            than the state that came in. None keeps the last state.
        evaluate_every: steps between two validations, and between two checkpoints.
        checkpoints: folder for the state of the run; with one, SIGTERM and SIGINT save before
            they stop it.
        identity: JSON values that must be equal for a run to be resumed; read with checkpoints
            only.
        resume: go on from the newest checkpoint, if there is one.
        metrics_path: JSON lines of `step`, `loss`, `learning_rate` and `tokens_per_second`, and
            of `step` and `validation_loss`.
        progress: show progress on standard error.
        description: its name there.

    Raises:
        InputError: for batches that run out or count no target, or when the checkpoints belong
            to another run, or exist and `resume` is false.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the run; its state is saved.
        OSError: when a checkpoint cannot be written.
    """
    _check_settings(num_steps, evaluate_every, resume, checkpoints)
    store, best, start = None, None, 0
    with ExitStack() as stack:
        if checkpoints is not None:
            store = stack.enter_context(CheckpointStore(checkpoints, identity or {}))
            state, best, start = _begin(store, state, keep if validate else None, resume=resume)
        metrics_file = stack.enter_context(MetricsFile(metrics_path, start))
        flag = stack.enter_context(stop_flag(enabled=store is not None))
        choice = _BestSoFar(validate, keep, metrics_file)
        if start == 0:
            best = choice.better(None, state, step=0)
        remaining = iter(batches(start)) if callable(batches) else islice(batches, start, None)
        watch = _Watch(metrics_file)
        for number in track(range(start + 1, num_steps + 1), description, enabled=progress):
            batch = _next(remaining, number, num_steps)
            state, metrics = step(state, batch)
            watch.follow(number, metrics, num_tokens=int(np.sum(batch.attention_mask)))
            signum = None if store is None else flag.agreed()
            boundary = number % evaluate_every == 0 or number == num_steps
            if not boundary and signum is None:
                continue
            watch.settle()
            if boundary:
                best = choice.better(best, state, step=number)
            if store is not None:
                _save(store, number, state, best)
            if signum is not None:
                raise Interrupted(signum, number)
    if best is None:
        return Trained(keep(state), state, max(start, num_steps), None)
    return Trained(best.kept, state, best.step, best.loss)


class _BestSoFar:
    """Chooses between the best state so far and the state as it is."""

    def __init__(
        self,
        validate: Callable[[Any], float] | None,
        keep: Callable[[Any], Any],
        metrics_file: MetricsFile,
    ):
        self._validate, self._keep, self._file = validate, keep, metrics_file

    def better(self, best: Best | None, state: Any, *, step: int) -> Best | None:
        """None without validation; raises DivergenceError."""
        if self._validate is None:
            return None
        loss = float(self._validate(state))
        if not math.isfinite(loss):
            raise DivergenceError(f"the validation loss is {loss} after step {step}: {_ADVICE}")
        self._file.record(step, validation_loss=loss)
        logger.info("step %d: validation loss %.4f", step, loss)
        if best is not None and best.loss <= loss:
            return best
        # A copy, because the next step overwrites the original.
        return Best(jax.tree.map(jnp.copy, self._keep(state)), loss, step)


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
    num_steps: int, evaluate_every: int, resume: bool, checkpoints: Path | str | None
) -> None:
    if num_steps < 1 or evaluate_every < 1:
        raise InputError(
            f"num_steps and evaluate_every must be at least 1, got {num_steps} and {evaluate_every}"
        )
    if resume and checkpoints is None:
        raise InputError("a run can only resume from a folder of checkpoints, none is given")


def _next(batches: Iterator[Batch], step: int, num_steps: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise InputError(f"the training batches ended after {step - 1} of {num_steps} steps")
    if not np.any(batch.loss_mask):
        raise InputError(f"the training batch of step {step} counts no target: loss_mask is zero")
    return batch


def _save(store: CheckpointStore, step: int, state: Any, best: Best | None) -> None:
    notes = {} if best is None else {"best_loss": best.loss, "best_step": best.step}
    store.save(step, _saved_tree(state, best and best.kept), notes)


def _begin(
    store: CheckpointStore, state: Any, keep: Callable[[Any], Any] | None, *, resume: bool
) -> tuple[Any, Best | None, int]:
    """State, best so far and steps taken: from the newest checkpoint, or as they were given."""
    if not resume and store.steps:
        raise InputError(
            f"{store.folder} holds checkpoints of steps {store.steps}: resume from them, or "
            "choose another folder"
        )
    checkpoint = store.restore(_saved_tree(state, keep and keep(state)))
    if checkpoint is None:
        return state, None, 0
    tree, notes = dict(checkpoint.state), checkpoint.notes
    best = None
    if keep is not None:
        best = Best(tree.pop("best"), notes["best_loss"], notes["best_step"])
    return type(state)(**tree), best, checkpoint.step


def _saved_tree(state: Any, kept: Any | None) -> dict[str, Any]:
    return state._asdict() if kept is None else {**state._asdict(), "best": kept}
