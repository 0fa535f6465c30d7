"""A comparison: what is missing of a plan is run, and the report made of what is there.

A cell is one compression, one zero-shot measurement, one trial of a learning rate or one
fine-tuning run. Several processes may work on one folder.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from filelock import Timeout

from gradot_jax.comparison.cells import CellStore, NotThere
from gradot_jax.comparison.compressing import CompressionCell
from gradot_jax.comparison.jobs import (
    Job,
    all_blocks,
    choose_rate,
    finetuned,
    repeated,
    zero_shot,
)
from gradot_jax.comparison.report import write_plots, write_tables
from gradot_jax.comparison.stages import FULL, REFERENCES, Case, Plan, Unit
from gradot_jax.comparison.testbed import Task, Testbed
from gradot_jax.errors import InputError, out_of_memory
from gradot_jax.evaluation.record import code_digest, environment
from gradot_jax.files.digest import bytes_digest
from gradot_jax.memory.process import resident_bytes
from gradot_jax.models.split import split_model
from gradot_jax.training.loop import DivergenceError
from gradot_jax.training.rate import RateSearch

logger = logging.getLogger("gradot_jax")

_CODE_BYTES = 2**30
"""Growth of the process after which compiled code is thrown away."""
_FIRST_SEED = 0
"""On which rates are chosen."""


class Shard(NamedTuple):
    """A part of a plan for one of several processes.

    Attributes:
        index: from 1.
        count: of parts.
    """

    index: int
    count: int

    def takes(self, unit: Unit) -> bool:
        """Whether a unit is of this part; those that share the choice of a rate stay together."""
        return int(bytes_digest(unit.group.encode()), 16) % self.count == self.index - 1


WHOLE = Shard(1, 1)


def run_comparison(
    bed: Testbed,
    plan: Plan,
    out: Path,
    *,
    drop_bundles: bool = False,
    shard: Shard = WHOLE,
    probes: bool = False,
    again: bool = False,
    work: bool = True,
) -> dict[str, Any]:
    """Runs what is missing in a folder, and writes its tables and plots.

    They are written anew after every unit, so that a long run can be looked at. What another
    process is at work on is left to it.

    Args:
        bed: what the plan runs on; has its tasks.
        plan: what to run.
        out: folder of the cells and of the report.
        drop_bundles: remove each emulator once no unit of this process needs it.
        shard: the part of the plan to run.
        probes: also look ahead with every emulator, see `compressing.look_ahead`.
        again: also tune and measure the first unit of each method again, where other code did.
        work: whether anything is run; else the report is made of what is there.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: after all others are finished, when a method could not be run.
    """
    units = [unit for unit in plan.units if shard.takes(unit)] if work else []
    last = {unit.case: place for place, unit in enumerate(units)}
    run = _Run(bed, plan, out)
    failures: dict[str, str] = {}
    for place, unit in enumerate(units):
        _attempt(run, unit, failures, lambda unit=unit: run.row(unit))
        if place == last[unit.case]:
            if probes and unit.case.method not in REFERENCES:
                _attempt(run, unit, failures, lambda unit=unit: run.compression(unit.case).probe())
            run.leave(unit.case, drop_bundle=drop_bundles)
    for unit in _firsts(units) if again else ():
        _attempt(run, unit, failures, lambda unit=unit: run.again(unit))
    result = _result(bed, plan, out, failures)
    write_tables(out, result)
    write_plots(out, result)
    if failures := result["failures"]:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise InputError(f"{out}: the rest is written, not run: {reasons}")
    return result


def _firsts(units: Iterable[Unit]) -> list[Unit]:
    """The first unit of each method."""
    return list({unit.case.method: unit for unit in reversed(list(units))}.values())


def _attempt(run: "_Run", unit: Unit, failures: dict[str, str], work: Callable[[], Any]) -> None:
    """Does some work on a unit unless another process is at it; why not goes to `failures`."""
    label = unit.case.label
    if label in failures:
        return
    before = run.store.computed
    try:
        with run.store.lock(f"group-{unit.group}", wait=False):
            work()
    except Timeout:
        logger.info("%s on %s: another process is at it", label, unit.task)
    except NotThere as error:
        logger.info("%s on %s: %s is not there yet", label, unit.task, error)
    except (InputError, DivergenceError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory(error):
            raise
        failures[label] = str(error).partition("\n")[0]
        logger.warning("%s: not run: %s", label, failures[label])
    if run.store.computed > before:
        write_tables(run.out, _result(run.bed, run.plan, run.out, failures))
        run.trim()


class _Run:
    """The cells of a plan, and the rows made of them."""

    def __init__(self, bed: Testbed, plan: Plan, out: Path, *, computes: bool = True):
        self.bed, self.plan, self.out = bed, plan, out
        self.store = CellStore(out / "cells", computes=computes)
        self._tasks = {task.name: task for task in bed.tasks}
        self._compressions: dict[Case, CompressionCell] = {}
        self._resident = resident_bytes()

    def row(self, unit: Unit) -> dict[str, Any]:
        """The measurements of a unit; raises NotThere in a run that computes none."""
        case, task = unit.case, self._tasks[unit.task]
        job = self._job(case, task)
        found = self._rate(unit)
        cell = finetuned(job, unit.seed, found.rate, found.best)
        result = cell["result"]
        row = {
            **case._asdict(),
            "task": task.name,
            "seed": unit.seed,
            "learning_rate": found.rate * task.tuning.learning_rate,
            "bracketed": found.bracketed,
            "trials": {f"{factor:g}": loss for factor, loss in sorted(found.losses.items())},
            "development_loss": result["development_loss"],
            "best_step": result["best_step"],
            "seconds": result["seconds"],
            "code": cell["environment"]["code"],
            "zero_shot": self._original(task),
        }
        if job.is_reference:
            return row | {"full_finetuned": result["full_finetuned"]}
        tuned_emulator, plugged = result["emulator_finetuned"], result["plug_in"]
        if self.store.computes:
            told = (
                job.name,
                unit.seed,
                task.metric,
                *(values[task.metric] for values in (tuned_emulator, plugged)),
            )
            logger.info("%s, seed %d: %s of the tuned emulator %.2f, of the plug-in %.2f", *told)
        return row | {
            "emulator_zero_shot": zero_shot(job),
            "emulator_finetuned": tuned_emulator,
            "plug_in": plugged,
            "delta": {
                name: _improvement(task, name, plugged[name], tuned_emulator[name])
                for name in plugged
            },
        }

    def again(self, unit: Unit) -> dict[str, Any] | None:
        """A unit as it was measured and as the code measures it now; None where that is the same.

        Raises:
            NotThere: when it has not been measured.
        """
        there = _Run(self.bed, self.plan, self.out, computes=False)
        row = there.row(unit)
        if row["code"] == code_digest():
            return None
        task, factor = self._tasks[unit.task], there._rate(unit).rate
        now = repeated(self._job(unit.case, task), unit.seed, factor)["result"]
        quantity = "full_finetuned" if unit.case.method in REFERENCES else "plug_in"
        then = {**unit.case._asdict(), "task": unit.task, "seed": unit.seed}
        values = {"then": row[quantity][task.metric], "now": now[quantity][task.metric]}
        return {**then, "quantity": quantity, **values}

    def compression(self, case: Case) -> CompressionCell:
        """The compression of a case that is no reference."""
        if case not in self._compressions:
            self._compressions[case] = CompressionCell(
                self.bed,
                self.store,
                self.out / "bundles",
                case,
                self.plan.options(case, self.bed.training),
            )
        return self._compressions[case]

    def leave(self, case: Case, *, drop_bundle: bool) -> None:
        """Lets go of the emulator of a case."""
        cell = self._compressions.pop(case, None)
        if cell is not None and drop_bundle:
            cell.drop()

    def trim(self) -> None:
        """Drops compiled code when the process has grown by much."""
        resident = resident_bytes()
        if resident and self._resident and resident - self._resident > _CODE_BYTES:
            jax.clear_caches()
            self._resident = resident_bytes()

    def _rate(self, unit: Unit) -> RateSearch:
        """What the first seed on the first draw chose; its run only for that unit itself."""
        case = unit.case._replace(draw=None if unit.case.draw is None else 0)
        found = choose_rate(self._job(case, self._tasks[unit.task]), _FIRST_SEED, self.plan.rates)
        same = case == unit.case and unit.seed == _FIRST_SEED
        return found if same else found._replace(best=None)

    def _job(self, case: Case, task: Task) -> Job:
        bed, make = self.bed, partial(Job, self.bed, self.store, self.out / "curves", case, task)
        if case.method == FULL:
            return make({"model": bed.model_digest}, lambda: split_model(bed.params, bed.split))
        if case.method in REFERENCES:
            return make({"model": bed.model_digest}, lambda: all_blocks(bed.params))
        cell = self.compression(case)
        cell.record()
        return make(cell.settings, cell.emulator)

    def _original(self, task: Task) -> dict[str, float]:
        return zero_shot(self._job(Case(FULL), task))


def _improvement(task: Task, metric: str, value: float, other: float) -> float:
    """How much better a value is; a likelihood is better when it is higher."""
    return value - other if metric != task.metric else task.better_by(value, other)


def _result(bed: Testbed, plan: Plan, out: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is there, as `result.json` holds it."""
    run, failures = _Run(bed, plan, out, computes=False), dict(failures)
    rows = _present(run.row, {unit: unit.case.label for unit in plan.units}, failures)
    full = {(r["task"], r["seed"]): r["full_finetuned"] for r in rows if r["method"] == FULL}
    for row in rows:
        row.setdefault("full_finetuned", full.get((row["task"], row["seed"])))
    labels = {case: case.label for case in plan.cases if case.method not in REFERENCES}
    records = _present(lambda case: (case, run.compression(case).record()), labels, failures)
    probes = dict(_present(lambda case: (case, run.compression(case).probe()), labels, failures))
    compressions = [
        {
            **case._asdict(),
            **cell["result"],
            **probes.get(case, {"result": {}})["result"],
            "code": cell["environment"]["code"],
        }
        for case, cell in records
    ]
    again = _present(run.again, {unit: unit.case.label for unit in _firsts(plan.units)}, failures)
    return {
        "model": {
            "name": bed.name,
            "digest": bed.model_digest,
            "width": bed.config.hidden_size,
            "layers": bed.config.num_hidden_layers,
        },
        "settings": {
            "seeds": list(range(max(stage.seeds for stage in plan.stages))),
            "draws": list(range(max(stage.draws for stage in plan.stages))),
            "rates": plan.rates,
            "split": dataclasses.asdict(bed.split),
            "compute_dtype": bed.compute_dtype,
        },
        "systems": {case.method: plan.system(case.method) for case in plan.cases},
        "planned": [
            {"task": task, "method": method, "budget": budget}
            for task, method, budget in dict.fromkeys(
                (unit.task, unit.case.method, unit.case.budget) for unit in plan.units
            )
        ],
        "missing": len(plan.units) - len(rows),
        "tasks": {task.name: _described(task) for task in bed.tasks},
        "compressions": compressions,
        "rows": rows,
        "again": [found for found in again if found],
        "codes": dict(Counter(row["code"] for row in rows)),
        "failures": failures,
        "environment": environment(),
        "seconds": round(sum(row["seconds"] or 0 for row in rows), 1),
    }


def _present(read, labels: Mapping[Any, str], failures: dict[str, str]) -> list[Any]:
    """What is there of what is read by key; what is there and cannot be read is a failure."""
    found = []
    for key, label in labels.items():
        try:
            found.append(read(key))
        except NotThere:
            continue
        except InputError as error:
            failures.setdefault(label, str(error).partition("\n")[0])
    return found


def _described(task: Task) -> dict[str, Any]:
    fields = ("label", "metric", "higher_is_better")
    described = {name: getattr(task, name) for name in fields}
    settings = {"tuning": task.tuning, "validity": task.validity}
    described |= {name: dataclasses.asdict(value) for name, value in settings.items()}
    return described | {"protocol": dict(task.protocol)}
