"""One emulator on one task: its zero-shot metrics, its learning rate, its fine-tuning runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.plan import REFERENCES, Case
from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.comparison.tuning import Tuned, tune
from gradot_jax.models.split import SplitModel
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.training.loop import DivergenceError
from gradot_jax.training.rate import RateSearch, search_rate

Origin = Callable[[], SplitModel]


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
    emulator: Origin

    @property
    def where(self) -> dict[str, Any]:
        """Coordinates of its cells, but for seed and rate."""
        return {**self.case._asdict(), "task": self.task.name}

    @property
    def name(self) -> str:
        """For files and logs."""
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


def choose_rate(job: Job, seed: int, rates: Sequence[float]) -> tuple[RateSearch, Tuned | None]:
    """The factor on the learning rate of least development loss, see `search_rate`.

    Returns:
        The search, and the run with its best factor where that was just made.
    """
    losses: dict[float, float] = {}
    made: dict[float, Tuned] = {}

    def trial(factor: float) -> dict[str, Any]:
        try:
            tuned = _tune(job, seed, factor)
        except DivergenceError as error:
            return {"development_loss": math.inf, "diverged": str(error)}
        if all(tuned.loss < loss for loss in losses.values()):
            # Only the best so far, since each holds an adapter on the device.
            made.clear()
            made[factor] = tuned
        return {"development_loss": tuned.loss, "seconds": tuned.seconds}

    def loss_of(factor: float) -> float:
        where = {**job.where, "seed": seed, "factor": factor}
        settings = {"cell": "trial", **job.settings, "seed": seed, "factor": factor}
        cell = job.store.get("trial", where, settings, lambda: trial(factor))
        losses[factor] = cell["result"]["development_loss"]
        return losses[factor]

    found = search_rate(loss_of, rates)
    return found, made.get(found.rate)


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
