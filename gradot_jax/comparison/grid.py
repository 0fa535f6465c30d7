"""The grid: every method at every budget, on every task, with every seed, one cell at a time.

A cell is one compression, one zero-shot measurement, one trial of a learning rate or one
fine-tuning run. Cells that a folder already holds are not run again.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.compressing import CompressionCell
from gradot_jax.comparison.jobs import Job, choose_rate, finetuned, zero_shot
from gradot_jax.comparison.report import write_plots, write_tables
from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.comparison.tuning import all_blocks
from gradot_jax.comparison.variants import FULL, REFERENCES, Case, cases
from gradot_jax.errors import InputError, out_of_memory
from gradot_jax.evaluation.record import environment
from gradot_jax.files.digest import json_digest, tree_digest
from gradot_jax.memory.process import resident_bytes
from gradot_jax.models.split import SplitModel, split_model
from gradot_jax.training.loop import DivergenceError

logger = logging.getLogger("gradot_jax")

_CODE_BYTES = 2**30
"""Growth of the process after which compiled code is thrown away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run.

    Attributes:
        methods: of `METHODS` and `REFERENCES`.
        budgets: shares of the middle's parameters to keep.
        seeds: of the order of fine-tuning examples.
        draws: of the calibration text.
        rates: factors on each task's learning rate, of which the data owner takes the one with
            the least development loss on the first seed.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    draws: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        """Checks ranges; raises InputError."""
        for name in ("budgets", "seeds", "draws", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: expected some, each once, got {list(values)}")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise InputError(f"rates must be positive and finite, got {list(self.rates)}")
        cases(self.methods, self.budgets, self.draws)

    @property
    def cases(self) -> list[Case]:
        """Every compression and reference, in the order in which they run."""
        return cases(self.methods, self.budgets, self.draws)


def run_comparison(
    bed: Testbed, grid: Grid, out: Path, *, drop_bundles: bool = False
) -> dict[str, Any]:
    """Runs what is missing in a folder, and writes its tables and plots.

    Tables are written anew after every method and budget, so that a long run can be looked at.
    With `drop_bundles` each emulator is removed once its cells are finished.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: after all others are finished, when a method could not be run.
    """
    run = _Run(bed, grid, out)
    failures: dict[str, str] = {}
    for case in grid.cases:
        try:
            run.add(case, drop_bundle=drop_bundles)
        except (InputError, DivergenceError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("%s: not run: %s", case.label, reason)
            failures[case.label] = reason
        write_tables(out, run.result(failures))
        run.trim()
    result = run.result(failures)
    write_plots(out, result)
    if failures:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise InputError(f"{out}: the rest is written, not run: {reasons}")
    return result


class _Run:
    """The cells of a grid, and the rows made of them so far."""

    def __init__(self, bed: Testbed, grid: Grid, out: Path):
        self._bed, self._grid = bed, grid
        self._store = CellStore(out / "cells")
        self._job = partial(Job, bed, self._store, out / "curves")
        self._model = _model_digest(bed)
        self._factors: dict[tuple[str, float | None, str], float] = {}
        self._full: dict[tuple[str, int], dict[str, float]] = {}
        self._rows: list[dict[str, Any]] = []
        self._compressions: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._resident = resident_bytes()

    def add(self, case: Case, *, drop_bundle: bool) -> None:
        """Every cell of one case."""
        if case.method in REFERENCES:
            self._run_tasks(case, {"model": self._model}, lambda: self._reference(case))
            return
        cell = CompressionCell(self._bed, self._store, self._model, case)
        record = cell.record()
        self._compressions.append({**case._asdict(), **record})
        logger.info(
            "%s: %.0f %% of the model shipped, gradient cosine %.3f, relative error %.3f",
            case.label,
            100 * record["share_shipped"],
            record["gradient_cosine"],
            record["gradient_relative_error"],
        )
        self._run_tasks(case, cell.settings, cell.emulator)
        if drop_bundle:
            cell.drop()

    def result(self, failures: Mapping[str, str]) -> dict[str, Any]:
        """Everything so far, as `result.json` holds it."""
        bed, grid = self._bed, self._grid
        return {
            "model": {
                "name": bed.name,
                "digest": self._model,
                "width": bed.config.hidden_size,
                "layers": bed.config.num_hidden_layers,
            },
            "settings": {
                **dataclasses.asdict(grid),
                "split": dataclasses.asdict(bed.split),
                "compute_dtype": bed.compute_dtype,
            },
            "cases": [case._asdict() for case in grid.cases],
            "tasks": {task.name: _described(task) for task in bed.tasks},
            "compressions": self._compressions,
            "rows": self._rows,
            "failures": dict(failures),
            "environment": environment(),
            "seconds": round(time.monotonic() - self._began, 1),
        }

    def trim(self) -> None:
        """Drops compiled code when the process has grown by much."""
        resident = resident_bytes()
        if resident and self._resident and resident - self._resident > _CODE_BYTES:
            jax.clear_caches()
            self._resident = resident_bytes()

    def _reference(self, case: Case) -> SplitModel:
        bed = self._bed
        if case.method == FULL:
            return split_model(bed.params, bed.split)
        return all_blocks(bed.params)

    def _run_tasks(
        self, case: Case, origin: Mapping[str, Any], emulator: Callable[[], SplitModel]
    ) -> None:
        for task in self._bed.tasks:
            job = self._job(case, task, origin, emulator)
            first, rates = self._grid.seeds[0], self._grid.rates
            key = (case.method, case.budget, task.name)
            tuned = None
            # Further draws of calibration text take the rate of the first.
            if key not in self._factors:
                self._factors[key], tuned = choose_rate(job, first, rates)
            factor = self._factors[key]
            for seed in self._grid.seeds:
                cell = finetuned(job, seed, factor, tuned if seed == first else None)
                self._rows.append(self._row(job, seed, factor, cell))

    def _row(self, job: Job, seed: int, factor: float, cell: dict[str, Any]) -> dict[str, Any]:
        case, task = job.case, job.task
        row = {
            **case._asdict(),
            "task": task.name,
            "seed": seed,
            "learning_rate": factor * task.tuning.learning_rate,
            "development_loss": cell["development_loss"],
            "best_step": cell["best_step"],
            "seconds": cell["seconds"],
            "zero_shot": self._original(task),
        }
        if job.is_reference:
            full = cell["full_finetuned"]
            if case.method == FULL:
                self._full[task.name, seed] = full
            logger.info("%s, seed %d: %s %.2f", job.name, seed, task.metric, full[task.metric])
            return row | {"full_finetuned": full}
        tuned, plugged = cell["emulator_finetuned"], cell["plug_in"]
        told = (job.name, seed, task.metric, tuned[task.metric], plugged[task.metric])
        logger.info("%s, seed %d: %s of the tuned emulator %.2f, of the plug-in %.2f", *told)
        return row | {
            "full_finetuned": self._full.get((task.name, seed)),
            "emulator_zero_shot": zero_shot(job),
            "emulator_finetuned": tuned,
            "plug_in": plugged,
            "delta": {name: task.better_by(plugged[name], tuned[name]) for name in plugged},
        }

    def _original(self, task: Task) -> dict[str, float]:
        full = partial(split_model, self._bed.params, self._bed.split)
        return zero_shot(self._job(Case("original"), task, {"model": self._model}, full))


def _model_digest(bed: Testbed) -> str:
    """SHA-256 of the weights and of the configuration that says how they are used."""
    return json_digest([bed.config.to_hf(), tree_digest(bed.params)])


def _described(task: Task) -> dict[str, Any]:
    fields = ("label", "metric", "higher_is_better")
    described = {name: getattr(task, name) for name in fields}
    settings = {"tuning": task.tuning, "validity": task.validity}
    described |= {name: dataclasses.asdict(value) for name, value in settings.items()}
    return described | {"protocol": dict(task.protocol)}
