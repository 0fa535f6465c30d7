"""One emulator on one task: its zero-shot metrics, its learning rate, its fine-tuning runs.

Runs that differ in seed, rate and weights share their compiled step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.stages import REFERENCES, Case
from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.data.examples import epoch_batches, eval_batches
from gradot_jax.evaluation.record import code_digest
from gradot_jax.models.params import Params, concatenate_blocks, slice_blocks
from gradot_jax.models.split import Adapter, SplitModel
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.training.adapter import train_adapter
from gradot_jax.training.loop import DivergenceError
from gradot_jax.training.optimizer import rated_optimizer
from gradot_jax.training.rate import RateSearch, search_rate


class Tuned(NamedTuple):
    """A finished fine-tuning.

    Attributes:
        adapter: the best by development loss.
        loss: that loss, nats per counted target.
        step: at which it was, 0 for the adapter as it was shipped.
        seconds: of the tuning.
    """

    adapter: Adapter
    loss: float
    step: int
    seconds: float


def tune(
    bed: Testbed, emulator: SplitModel, task: Task, *, seed: int, factor: float, curve: Path
) -> Tuned:
    """Tunes the adapter of an emulator on a task, at a factor on its rate; `curve` is the history.

    Raises:
        DivergenceError: when a loss or gradient is not finite.
    """
    tuning, began = task.tuning, time.perf_counter()
    trained = train_adapter(
        bed.config,
        emulator,
        lambda step: epoch_batches(task.train, tuning.batch_size, seed=seed, start_step=step),
        rated_optimizer(
            factor,
            learning_rate=tuning.learning_rate,
            num_steps=tuning.steps,
            warmup_steps=tuning.warmup,
            weight_decay=tuning.weight_decay,
            betas=(tuning.b1, tuning.b2),
            clip_norm=tuning.clip_norm,
        ),
        num_steps=tuning.steps,
        validation_batches=list(eval_batches(task.development, task.evaluation_batch)),
        evaluate_every=-(-tuning.steps // tuning.evaluations),
        compute_dtype=bed.compute_dtype,
        mesh=bed.mesh,
        metrics_path=curve,
    )
    seconds = time.perf_counter() - began
    loss = math.inf if trained.loss is None else trained.loss
    return Tuned(trained.kept, loss, trained.step, seconds)


def all_blocks(params: Params) -> SplitModel:
    """The full model with every block in the adapter, to train all of them."""
    blocks = concatenate_blocks(params.segments)
    count = params.num_layers
    adapter = Adapter(bottom=blocks, top=slice_blocks(blocks, count, count))
    return SplitModel(params.shell, jax.tree.map(jnp.asarray, adapter), ())


class Job(NamedTuple):
    """An emulator, or the full model as one, and a task.

    Attributes:
        bed: the testbed.
        store: of the cells.
        curves: folder of the histories of the runs.
        case: what made the emulator.
        task: one of the testbed's.
        origin: settings that the emulator depends on.
        emulator: loads or makes it; not called where every cell is there.
    """

    bed: Testbed
    store: CellStore
    curves: Path
    case: Case
    task: Task
    origin: Mapping[str, Any]
    emulator: Callable[[], SplitModel]

    @property
    def where(self) -> dict[str, Any]:
        """Coordinates of its cells, but for seed and rate."""
        return {**self.case._asdict(), "task": self.task.name}

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.case.label}-{self.task.name}"

    @property
    def is_reference(self) -> bool:
        """Whether it is the full model that is tuned."""
        return self.case.method in REFERENCES

    @property
    def settings(self) -> dict[str, Any]:
        """What its fine-tuning runs depend on, but for seed and rate."""
        return {
            "tuned": self.case.method if self.is_reference else "adapter",
            "origin": self.origin,
            "split": dataclasses.asdict(self.bed.split),
            "task": task_identity(self.task),
            "compute_dtype": self.bed.compute_dtype,
        }


def task_identity(task: Task) -> dict[str, Any]:
    """JSON values that tell a task from any other."""
    return {
        "name": task.name,
        "metric": task.metric,
        "tuning": dataclasses.asdict(task.tuning),
        **task.digests,
        "test": task.test_digest,
    }


def zero_shot(job: Job) -> dict[str, float]:
    """Metrics of the emulator as it was shipped."""
    settings = {
        "cell": "zero-shot",
        "origin": job.origin,
        "metric": job.task.metric,
        "test": job.task.test_digest,
        "compute_dtype": job.bed.compute_dtype,
    }
    cell = job.store.get(
        "zero-shot",
        job.where,
        settings,
        lambda: job.bed.measure(job.task, job.emulator().assemble()),
    )
    return cell["result"]


def choose_rate(job: Job, seed: int, rates: Sequence[float]) -> RateSearch:
    """The factor on the learning rate of least development loss; its run where it was just made."""
    made: list[Tuned] = []

    def trial(factor: float) -> dict[str, Any]:
        try:
            tuned = _tune(job, seed, factor)
        except DivergenceError as error:
            return {"development_loss": math.inf, "diverged": str(error)}
        made.append(tuned)
        return {"development_loss": tuned.loss, "seconds": tuned.seconds}

    def run(factor: float) -> tuple[float, Tuned | None]:
        where = {**job.where, "seed": seed, "factor": factor}
        settings = {"cell": "trial", **job.settings, "seed": seed, "factor": factor}
        cell = job.store.get("trial", where, settings, lambda: trial(factor))
        return cell["result"]["development_loss"], made.pop() if made else None

    return search_rate(run, rates)


def finetuned(job: Job, seed: int, factor: float, tuned: Tuned | None = None) -> dict[str, Any]:
    """The cell of one fine-tuning, which is `tuned` where it was made already.

    Returns:
        Values of the cell. Its result has `development_loss`, `best_step`, `seconds`, and metrics
        by name: `full_finetuned` of a reference, else `emulator_finetuned` and `plug_in`. A run
        that diverges has `nan` for its metric.
    """
    rate = factor * job.task.tuning.learning_rate
    return job.store.get(
        "run",
        {**job.where, "seed": seed, "rate": rate},
        {"cell": "run", **job.settings, "seed": seed, "factor": factor},
        lambda: _measure_tuned(job, seed, factor, tuned),
    )


def repeated(job: Job, seed: int, factor: float) -> dict[str, Any]:
    """The cell of a fine-tuning that is run again by the code as it is, as `finetuned` has it.

    Through the emulator that is there, by whatever code it was made.
    """
    return job.store.get(
        "again",
        {**job.where, "seed": seed},
        {"cell": "again", **job.settings, "seed": seed, "factor": factor, "code": code_digest()},
        lambda: _measure_tuned(job, seed, factor, None),
    )


def _measure_tuned(job: Job, seed: int, factor: float, tuned: Tuned | None) -> dict[str, Any]:
    names = ("full_finetuned",) if job.is_reference else ("emulator_finetuned", "plug_in")
    try:
        tuned = tuned or _tune(job, seed, factor)
    except DivergenceError as error:
        lost = {name: {job.task.metric: math.nan} for name in names}
        nothing = {"development_loss": math.inf, "best_step": None, "seconds": None}
        return {**nothing, "diverged": str(error), **lost}
    values = {names[0]: job.bed.measure(job.task, job.emulator().assemble(tuned.adapter))}
    if not job.is_reference:
        values["plug_in"] = job.bed.measure(job.task, plug_in(job.bed.params, tuned.adapter))
    return {
        "development_loss": tuned.loss,
        "best_step": tuned.step,
        "seconds": tuned.seconds,
        **values,
    }


def _tune(job: Job, seed: int, factor: float) -> Tuned:
    where = {**job.where, "seed": seed, "factor": factor}
    settings = {**job.settings, "seed": seed, "factor": factor}
    curve = job.curves / f"{job.store.path('curve', where, settings).stem}.jsonl"
    return tune(job.bed, job.emulator(), job.task, seed=seed, factor=factor, curve=curve)
