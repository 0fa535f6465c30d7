"""What is published, beside what was measured: every gap is said, none is filled.

python -m benchmarks.published --result OUT/result.json
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.published import (
    AVERAGE,
    FULL_MODEL,
    Entry,
    Model,
    Published,
    Source,
    load_published,
    table,
)
from gradot_jax.comparison.statistics import estimate
from gradot_jax.comparison.summary import QUANTITIES, planned, select
from gradot_jax.comparison.variants import FULL_ALL
from gradot_jax.data.tasks import TASKS
from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json

NOT_RUN = "not run"
NOT_RECORDED = "not recorded"
_HEADING = (
    "**{}**: accuracy in percent, WikiText-2 in perplexity, differences in points; ours is "
    "the mean ± its standard error (runs)"
)
_QUESTION_SETS = tuple(name for name, task in TASKS.items() if task.metric != "perplexity")
_QUANTITY = {
    "zero-shot": "zero_shot",
    "full fine-tuned": "full_finetuned",
    "emulator zero-shot": "emulator_zero_shot",
    "emulator fine-tuned": "emulator_finetuned",
    "plug-in": "plug_in",
    "plug-in - emulator fine-tuned": "delta",
}
"""Our names of the settings."""

_KEYS = {"model", "settings", "subjects", "tasks", "rows", "failures", "environment"}

Budget = float | None
Runs = dict[tuple[Any, ...], float]
"""Values by seed and draw, as far as they depend on them."""


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
    def budgets(self) -> tuple[Budget, ...]:
        """Every budget of the plans; None alone where only the full model was to be run."""
        found = {budget for result in self.results for _, budget in planned(result)} - {None}
        return tuple(sorted(found, reverse=True)) or (None,)


def load_measured(paths: Sequence[Path]) -> Measured:
    """Reads results of comparisons that share a model.

    Args:
        paths: files that `gradot compare` wrote.

    Raises:
        InputError: when one is no such file, or they are of several models or of one task twice.
    """
    results, tasks = [], {}
    for path in paths:
        result = _read(path)
        if result["model"]["digest"] != (results or [result])[0]["model"]["digest"]:
            raise InputError(f"{path}: of another model than {paths[0]}; give results of one model")
        if again := tasks.keys() & result["tasks"].keys():
            raise InputError(f"{path}: has {', '.join(sorted(again))}, as an earlier file has")
        results.append(result)
        tasks |= result["tasks"]
    rows = itertools.chain.from_iterable(result["rows"] for result in results)
    return Measured(tuple(results), tasks, tuple(rows))


def _read(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if missing := _KEYS - result.keys():
        raise InputError(f"{path}: no result of a comparison, lacks {', '.join(sorted(missing))}")
    return result


def beside(published: Published, measured: Measured, model: Model) -> str:
    """Markdown: a table, the sources, and in what the two protocols differ.

    Args:
        published: the numbers of the papers.
        measured: ours.
        model: which of the papers' models ours is to be set beside.
    """
    entries = published.find(model=model)
    used = dict.fromkeys(entry.source for entry in entries if entry.source)
    sources = [_source(key, published.sources[key]) for key in used]
    sources += [
        f"- {entry.system}, {entry.setting}, {entry.task}: {entry.note}"
        for entry in entries
        if entry.note
    ]
    protocol = [_line("protocol", "published", "ours"), _line(*["---"] * 3)]
    protocol += [_line(*row) for row in _protocol(measured, model)]
    parts = [[_HEADING.format(model)], _table(entries, measured), sources, protocol]
    parts += [[published.protocol], _failures(measured)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _table(entries: Sequence[Entry], measured: Measured) -> list[str]:
    budgets = measured.budgets
    titles = ["ours" if b is None else f"ours, budget {b:g}" for b in budgets]
    lines = [_line("system", "setting", "task", "published", *titles)]
    lines.append(_line(*["---"] * 3, *["---:"] * (1 + len(budgets))))
    for system, setting, task in dict.fromkeys((e.system, e.setting, e.task) for e in entries):
        values = [e for e in entries if (e.system, e.setting, e.task) == (system, setting, task)]
        ours = (_ours(measured, system, setting, task, budget) for budget in budgets)
        lines.append(_line(system, setting, task, _published(values), *ours))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _source(key: str, source: Source) -> str:
    return f"- [{key}] {source.kind}: {source.where}"


def _published(entries: Sequence[Entry]) -> str:
    known = [f"{entry.value} [{entry.source}]" for entry in entries if entry.value is not None]
    return ", ".join(known) or "not available"


def _ours(measured: Measured, system: str, setting: str, task: str, budget: Budget) -> str:
    if task == AVERAGE:
        runs = _average(measured, system, setting, budget)
    else:
        runs = _runs(measured, system, setting, task, budget)
    if not runs:
        return NOT_RUN
    mean, error, count = estimate(list(runs.values()))
    if not math.isfinite(mean):
        return f"diverged ({count})"
    return f"{mean:.1f} ({count})" if error is None else f"{mean:.1f} ± {error:.1f} ({count})"


def _average(measured: Measured, system: str, setting: str, budget: Budget) -> Runs:
    """The mean over the eight question sets of each run that all of them have."""
    runs = [_runs(measured, system, setting, task, budget) for task in _QUESTION_SETS]
    shared = set.intersection(*map(set, runs))
    return {key: sum(values[key] for values in runs) / len(runs) for key in sorted(shared, key=str)}


def _runs(measured: Measured, system: str, setting: str, task: str, budget: Budget) -> Runs:
    quantity = _QUANTITY[setting]
    rows = select(measured.rows, task=task)
    if system != FULL_MODEL:
        rows = select(rows, method=system, budget=budget)
    elif quantity == "full_finetuned":
        # The papers train all blocks of the full model.
        rows = select(rows, method=FULL_ALL)
    found = [row for row in rows if row.get(quantity) is not None]
    # Numbers that JSON lacks are strings there.
    return {
        tuple(row[name] for name in QUANTITIES[quantity]): float(
            row[quantity][measured.tasks[task]["metric"]]
        )
        for row in found
    }


def _protocol(measured: Measured, model: Model) -> Iterator[tuple[str, str, str]]:
    """What, as published, and as the results record it."""
    name, width = (measured.results[0]["model"][key] for key in ("name", "width"))
    yield "model", model, f"{name}, width {width}"
    yield "measured by", "lm-eval 0.3 or older", _each(measured, _versions)
    yield "seeds", "1", _each(measured, lambda result: len(result["settings"]["seeds"]))
    yield "BOS before a prompt", "no", _by_task(measured, "protocol", "bos")
    for title, key in (
        ("text", "preset"),
        ("split measured", "split"),
        ("items", "items"),
        ("rows without an answer to learn", "left_out"),
        ("prompts that lost their beginning", "cut"),
    ):
        yield title, "as below" if key == "split" else "-", _by_task(measured, "protocol", key)
    for key in ("draws", "rates", "split", "compute_dtype"):
        yield (
            key.replace("_", " "),
            "-",
            _each(measured, lambda result, k=key: result["settings"][k]),
        )
    for key in ("steps", "batch_size", "learning_rate", "warmup", "b2", "weight_decay"):
        yield key.replace("_", " "), "-", _by_task(measured, "tuning", key)


def _versions(result: Mapping[str, Any]) -> str:
    record = result["environment"]
    names = ("gradot_jax", "jax", "device_kind")
    return "{} {}, jax {}, {}, no lm-eval".format("gradot_jax", *(record[name] for name in names))


def _each(measured: Measured, read: Callable[[Mapping[str, Any]], Any]) -> str:
    return "; ".join(dict.fromkeys(_spelled(read(result)) for result in measured.results))


def _by_task(measured: Measured, part: str, key: str) -> str:
    """A value that all tasks share, or each task's."""
    values = {
        name: _spelled(task[part][key]) if key in task.get(part, {}) else NOT_RECORDED
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


def _failures(measured: Measured) -> list[str]:
    failed = [result["failures"] for result in measured.results]
    return [f"- {label} was not run: {why}" for each in failed for label, why in each.items()]


def _model_of(measured: Measured) -> Model:
    name = measured.results[0]["model"]["name"]
    found = [model for model in get_args(Model) if name.lower().endswith(model.lower())]
    if not found:
        raise InputError(f"{name} is no model of the papers; --model says which to compare it with")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is published, and where results are given, ours beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--result", nargs="+", type=Path, help="files that gradot compare wrote")
    parser.add_argument("--model", choices=get_args(Model), help="by the name in the results")
    options = parser.parse_args(arguments)
    published = load_published()
    if options.result is None:
        print(table(published))
        return
    try:
        measured = load_measured(options.result)
        print(beside(published, measured, options.model or _model_of(measured)))
    except InputError as error:
        parser.error(str(error))
