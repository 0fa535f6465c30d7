"""Fine-tuning of the adapter A1, A2 around a frozen middle: the data owner's part.

Gradients and optimiser state exist for the adapter only, in float32. The same function trains the
upper bound of the papers on the owner's side: an `Emulator` whose middle is the original one.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import Block, Shell
from gradot_jax.models.opt.partition import param_shardings, shard_params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.checkpoint import CheckpointStore, tree_digest
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.interrupt import Interrupted, stop_flag
from gradot_jax.offsite.optimizer import current_learning_rate
from gradot_jax.offsite.run_log import RunLog
from gradot_jax.offsite.split import Adapter
from gradot_jax.parallel import DeviceMesh


class DivergenceError(RuntimeError):
    """Training came to a loss or gradient that is not finite; nothing of it has been saved."""


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
        adapter: float32, whatever the dtype of the arithmetic: a step of 1e-6 is lost in bfloat16.
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
    validation_batches: Sequence[Batch] | None = None,
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
        validation_batches: texts that choose the best adapter; None returns the last.
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
    _check_settings(num_steps, evaluate_every, validation_batches, resume, checkpoints)
    run = _Run(config, optimizer, remat, mesh, validation_batches, num_steps, evaluate_every)
    frozen, state = _initial(emulator, optimizer, jnp.dtype(compute_dtype or jnp.float32), mesh)
    with ExitStack() as stack:
        store, best, start = None, None, 0
        if checkpoints is not None:
            identity = {"config": dataclasses.asdict(config), "emulator": tree_digest(emulator)}
            store = stack.enter_context(CheckpointStore(checkpoints, identity))
            state, best, start = _resumed(store, state, resume, validation_batches is not None)
        log = stack.enter_context(RunLog(num_steps, start, metrics_path, progress=progress))
        flag = stack.enter_context(stop_flag(enabled=store is not None))
        if start == 0:
            best = run.validated(frozen, state, best, 0, log)
        batches = _from_step(train_batches, start)
        return run.train(frozen, state, best, start, batches, store, log, flag)


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
    """One step on one batch; `state` is donated."""

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
    return state, StepMetrics(total / count, optax.global_norm(gradient), learning_rate)


@functools.partial(jax.jit, static_argnames=("config",))
def evaluation_step(
    config: OPTConfig, adapter: Adapter, frozen: Frozen, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss summed over the counted targets of a batch, and their number."""
    return _adapter_loss(config, adapter, frozen, batch, remat=False)


def _adapter_loss(
    config: OPTConfig, adapter: Adapter, frozen: Frozen, batch: Batch, remat: bool
) -> tuple[jax.Array, jax.Array]:
    adapter = _cast(adapter, frozen.shell.embed_tokens.dtype)
    params = Emulator(frozen.shell, adapter, frozen.middle).assemble()
    return summed_loss(config, params, batch, remat=remat)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same over a run; see `finetune_adapter`."""

    config: OPTConfig
    optimizer: optax.GradientTransformation
    remat: bool
    mesh: DeviceMesh | None
    validation_batches: Sequence[Batch] | None
    num_steps: int
    evaluate_every: int

    def train(
        self,
        frozen: Frozen,
        state: TrainState,
        best: Best | None,
        start: int,
        batches,
        store,
        log,
        flag,
    ) -> Adapter:
        """Takes the steps after `start`; returns the best adapter, or the last."""
        watch = _Watch(log)
        for step in range(start + 1, self.num_steps + 1):
            batch = _next(batches, step, self.num_steps)
            state, metrics = train_step(
                self.config,
                self.optimizer,
                state,
                frozen,
                _place(batch, self.mesh),
                remat=self.remat,
                mesh=self.mesh,
            )
            watch.follow(step, metrics, int(np.sum(batch.attention_mask)))
            signum = flag.signum
            boundary = step % self.evaluate_every == 0 or step == self.num_steps
            if boundary or signum is not None:
                watch.settle()
            if boundary:
                best = self.validated(frozen, state, best, step, log)
            if store is not None and (boundary or signum is not None):
                _save(store, step, state, best)
            if signum is not None:
                raise Interrupted(signum, step)
        return state.adapter if best is None else best.adapter

    def validated(
        self, frozen: Frozen, state: TrainState, best: Best | None, step: int, log: RunLog
    ) -> Best | None:
        """The better of `best` and the adapter as it is; None without validation."""
        if self.validation_batches is None:
            return None
        sums = [
            evaluation_step(self.config, state.adapter, frozen, _place(batch, self.mesh))
            for batch in self.validation_batches
        ]
        total, count = (sum(map(float, part)) for part in zip(*sums, strict=True))
        loss = total / count
        if not np.isfinite(loss):
            raise DivergenceError(f"the validation loss is {loss} at step {step}; {_ADVICE}")
        log.record(step, validation_loss=loss)
        if best is not None and best.loss <= loss:
            return best
        # A copy, because the next step is given the original to overwrite.
        return Best(jax.tree.map(jnp.copy, state.adapter), loss, step)


_ADVICE = (
    "try a lower learning rate, a longer warm-up, or float32 or bfloat16 if the arithmetic is "
    "float16"
)


class _Watch:
    """Reads the metrics of each step while the next one runs, and stops a run that diverges."""

    def __init__(self, log: RunLog):
        self._log = log
        self._pending: tuple[int, StepMetrics, int] | None = None
        self._last_finite: float | None = None
        self._time = time.perf_counter()

    def follow(self, step: int, metrics: StepMetrics, num_tokens: int) -> None:
        """Checks the step before this one."""
        self.settle()
        self._pending = (step, metrics, num_tokens)

    def settle(self) -> None:
        """Checks the step that is still unread, if any; raises DivergenceError."""
        if self._pending is None:
            return
        step, metrics, num_tokens = self._pending
        self._pending = None
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise DivergenceError(
                f"at step {step} the loss is {loss} and the gradient norm {norm}; the last finite "
                f"loss was {self._last_finite}; {_ADVICE}"
            )
        self._last_finite = loss
        now = time.perf_counter()
        rate, self._time = num_tokens / (now - self._time), now
        learning_rate = None if metrics.learning_rate is None else float(metrics.learning_rate)
        self._log.record(step, loss=loss, learning_rate=learning_rate, tokens_per_second=rate)


def _check_settings(num_steps, evaluate_every, validation_batches, resume, checkpoints) -> None:
    if num_steps < 1 or evaluate_every < 1:
        raise InputError(
            f"num_steps and evaluate_every must be at least 1, got {num_steps} and {evaluate_every}"
        )
    if validation_batches is not None:
        if not validation_batches:
            raise InputError("validation_batches is empty; leave it out to train without")
        for index, batch in enumerate(validation_batches):
            _check_counts(batch, f"validation batch {index}")
    if resume and checkpoints is None:
        raise InputError("resume needs the folder of the checkpoints")


def _initial(
    emulator: Emulator, optimizer: optax.GradientTransformation, dtype, mesh: DeviceMesh | None
) -> tuple[Frozen, TrainState]:
    """Frozen weights cast once, and fresh float32 masters that may be donated."""
    frozen = _cast(Frozen(emulator.shell, emulator.middle), dtype)
    adapter = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), emulator.adapter)
    state = TrainState(adapter, optimizer.init(adapter))
    if mesh is None:
        return frozen, state
    return shard_params(frozen, mesh), shard_params(state, mesh)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _place(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """The batch on its devices, filled up with rows that count nothing until the mesh divides it."""
    if mesh is None:
        return Batch(*map(jnp.asarray, batch))
    missing = -len(batch.input_ids) % mesh.mesh.shape["data"]
    rows = (np.pad(np.asarray(leaf), ((0, missing), (0, 0))) for leaf in batch)
    return jax.device_put(Batch(*rows), mesh.batched)


def _check_counts(batch: Batch, where: str) -> None:
    if not np.any(batch.loss_mask):
        raise InputError(f"{where} counts no target: its loss_mask is zero everywhere")


def _from_step(train_batches, start: int) -> Iterator[Batch]:
    if callable(train_batches):
        return iter(train_batches(start))
    return itertools.islice(iter(train_batches), start, None)


def _next(batches: Iterator[Batch], step: int, num_steps: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise InputError(f"train_batches ended after {step - 1} of {num_steps} batches")
    _check_counts(batch, f"training batch {step - 1}")
    return batch


def _tree(state: TrainState, best: Adapter | None):
    return state._asdict() if best is None else {**state._asdict(), "best": best}


def _save(store: CheckpointStore, step: int, state: TrainState, best: Best | None) -> None:
    notes = {} if best is None else {"best_loss": best.loss, "best_step": best.step}
    store.save(step, _tree(state, best and best.adapter), notes)


def _resumed(
    store: CheckpointStore, state: TrainState, resume: bool, validated: bool
) -> tuple[TrainState, Best | None, int]:
    """State, best adapter and number of steps taken, from the newest checkpoint or afresh."""
    if not resume and store.steps:
        raise InputError(
            f"{store.folder} holds checkpoints of steps {store.steps}: resume them or choose "
            "another folder"
        )
    checkpoint = store.restore(_tree(state, state.adapter if validated else None))
    if checkpoint is None:
        return state, None, 0
    tree, notes = checkpoint.state, checkpoint.notes
    best = None
    if validated:
        best = Best(tree["best"], notes["best_loss"], notes["best_step"])
    return TrainState(tree["adapter"], tree["optimizer"]), best, checkpoint.step
