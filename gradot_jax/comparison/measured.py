"""What comparisons measured, by the papers' names of it: every gap is said, none is filled."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradot_jax.comparison.stages import FULL_ALL
from gradot_jax.comparison.summary import QUANTITIES, estimate, planned, select
from gradot_jax.data.tasks import PUBLISHED_TASKS, TASKS
from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json

AVERAGE = "average of 8"
FULL_MODEL = "full model"
QUANTITY = {
    "zero-shot": "zero_shot",
    "full fine-tuned": "full_finetuned",
    "emulator zero-shot": "emulator_zero_shot",
    "emulator fine-tuned": "emulator_finetuned",
    "plug-in": "plug_in",
    "plug-in - emulator fine-tuned": "delta",
}
"""Our names of the papers' settings."""

_PROTOCOL = (
    ("BOS before a prompt", "no", "bos"),
    ("text", "-", "preset"),
    ("split measured", "as below", "split"),
    ("items", "-", "items"),
    ("rows without an answer to learn", "-", "left_out"),
    ("prompts that lost their beginning", "-", "cut"),
)
"""What a task's protocol says: in words, as published, and its key."""

_SETTINGS = ("draws", "rates", "split", "compute_dtype")
_TUNING = ("steps", "batch_size", "learning_rate", "warmup", "b2", "weight_decay")
_QUESTION_SETS = tuple(name for name in PUBLISHED_TASKS if TASKS[name].metric != "perplexity")
_KEYS = {"model", "settings", "planned", "tasks", "rows", "failures", "environment"}


class Measured(NamedTuple):
    """What comparisons of one model measured.

    Attributes:
        results: the contents of their `result.json`.
        tasks: descriptions by name, of all of them.
        rows: runs, of all of them.
    """

    results: tuple[dict[str, Any], ...]
    tasks: dict[str, dict[str, Any]]
    rows: tuple[dict[str, Any], ...]

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """Every budget of the plans; None alone where only the full model was to be run."""
        found = {budget for result in self.results for _, budget in planned(result)}
        return tuple(sorted((b for b in found if b is not None), reverse=True)) or (None,)


def load_measured(paths: Sequence[Path]) -> Measured:
    """Reads results that `gradot compare` wrote of one model.

    Raises:
        InputError: when one is no such file, or they are of several models or of one task twice.
    """
    results, tasks = [], {}
    for path in paths:
        result = read_json(path)
        if lacking := ", ".join(sorted(_KEYS - result.keys())):
            raise InputError(f"{path}: no result of a comparison, lacks {lacking}")
        if result["model"]["digest"] != (results or [result])[0]["model"]["digest"]:
            raise InputError(f"{path}: of another model than {paths[0]}; give results of one model")
        if again := tasks.keys() & result["tasks"].keys():
            raise InputError(f"{path}: has {', '.join(sorted(again))}, as an earlier file has")
        results.append(result)
        tasks |= result["tasks"]
    rows = itertools.chain.from_iterable(result["rows"] for result in results)
    return Measured(tuple(results), tasks, tuple(rows))


def measured_value(
    measured: Measured, system: str, setting: str, task: str, *, budget: float | None
) -> str:
    """Mean and standard error of a published quantity with the number of runs, or `not run`.

    The average is over the eight question sets, of the runs that all of them have. The setting is
    one of `QUANTITY`; for the full model the budget is not read.
    """
    names = _QUESTION_SETS if task == AVERAGE else (task,)
    runs = [_runs(measured, system, setting, name, budget) for name in names]
    shared = sorted(set.intersection(*map(set, runs)), key=str)
    if not shared:
        return "not run"
    mean, error, count = estimate([sum(r[key] for r in runs) / len(runs) for key in shared])
    if not math.isfinite(mean):
        return f"diverged ({count})"
    return f"{mean:.1f} ({count})" if error is None else f"{mean:.1f} ± {error:.1f} ({count})"


def _runs(
    measured: Measured, system: str, setting: str, task: str, budget: float | None
) -> dict[tuple[Any, ...], float]:
    """Values by seed and draw, as far as they depend on them."""
    quantity = QUANTITY[setting]
    rows = select(measured.rows, task=task)
    if system != FULL_MODEL:
        rows = select(rows, method=system, budget=budget)
    elif quantity == "full_finetuned":
        # The papers train all blocks of the full model.
        rows = select(rows, method=FULL_ALL)
    # Numbers that JSON lacks are strings there.
    return {
        tuple(row[name] for name in QUANTITIES[quantity]): float(
            row[quantity][measured.tasks[task]["metric"]]
        )
        for row in rows
        if row.get(quantity) is not None
    }


def protocol(measured: Measured) -> Iterator[tuple[str, str, str]]:
    """How the numbers came about: what, as published, and as the results record it."""
    yield "measured by", "lm-eval 0.3 or older", _each(measured, _versions)
    yield "seeds", "1", _each(measured, lambda result: len(result["settings"]["seeds"]))
    for title, published, key in _PROTOCOL:
        yield title, published, _by_task(measured, "protocol", key)
    for key in _SETTINGS:
        ours = _each(measured, lambda result, k=key: result["settings"][k])
        yield key.replace("_", " "), "-", ours
    for key in _TUNING:
        yield key.replace("_", " "), "-", _by_task(measured, "tuning", key)


def _versions(result: Mapping[str, Any]) -> str:
    template = "gradot_jax {gradot_jax}, jax {jax}, {device_kind}, no lm-eval"
    return template.format(**result["environment"])


def _each(measured: Measured, read: Callable[[Mapping[str, Any]], Any]) -> str:
    return "; ".join(dict.fromkeys(_spelled(read(result)) for result in measured.results))


def _by_task(measured: Measured, part: str, key: str) -> str:
    """A value that all tasks share, or each task's."""
    values = {
        name: _spelled(task.get(part, {}).get(key, "not recorded"))
        for name, task in measured.tasks.items()
    }
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_spelled(item)}" for key, item in value.items() if item != [])
    if isinstance(value, list):
        return ", ".join(map(_spelled, value))
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
