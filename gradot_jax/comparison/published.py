"""The numbers of the papers, each with where it was read; what could not be read is null.

    python -m gradot_jax.comparison.published
    python -m gradot_jax.comparison.published --result OUT/result.json    # with ours beside them

Nothing here was measured by this project, and nothing was computed from what is here.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.measured import (
    AVERAGE,
    FULL_MODEL,
    QUANTITY,
    Measured,
    load_measured,
    measured_value,
    protocol,
)
from gradot_jax.data.tasks import TASKS
from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json

PATH = Path(__file__).with_suffix(".json")
MODELS = ("OPT-1.3B", "OPT-6.7B")

_CHOICES = {
    "kind": ("repository image", "repository results", "independent log", "third party"),
    "model": MODELS,
    "system": (FULL_MODEL, "offsite-tuning", "layer-drop", "crash", "scaleot", "gradot"),
    "setting": tuple(QUANTITY),
    "metric": ("accuracy", "points", "perplexity"),
}
_HEADING = (
    "**{}**: accuracy in percent, WikiText-2 in perplexity, differences in points; ours is "
    "the mean ± its standard error (runs)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers were read.

    Attributes:
        kind: how near it is to the paper.
        paper: arXiv number of the paper that the numbers are said to be of; None for no paper.
        where: repository and file, or page.
        note: what to know before relying on it.
    """

    kind: str
    paper: str | None
    where: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One published number.

    Attributes:
        model: that was adapted.
        system: of which the emulator is, or the full model.
        setting: which of the five quantities, or the gap between two.
        task: name of a task, or the average of the eight question sets.
        metric: accuracy in percent, points of it, or perplexity.
        value: None where no source could be read.
        source: key of the source; None where there is no value.
        note: what the source leaves open; may be left out.
    """

    model: str
    system: str
    setting: str
    task: str
    metric: str
    value: float | None
    source: str | None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Published numbers.

    Attributes:
        protocol: how they were measured.
        sources: by key.
        entries: the numbers.
    """

    protocol: str
    sources: Mapping[str, Source]
    entries: Sequence[Entry]

    def find(self, **fields: str) -> list[Entry]:
        """The entries with the given values of `Entry`'s fields."""
        return [e for e in self.entries if all(getattr(e, k) == v for k, v in fields.items())]


def load_published(path: Path = PATH) -> Published:
    """Reads published numbers.

    Raises:
        InputError: when it is malformed, names an entry twice, gives a value without a known
            source, or a source that nothing uses.
    """
    read = _record(Published, read_json(path), str(path))
    places = {key: f"{path} source {key}" for key in read.sources}
    sources = {key: _record(Source, read.sources[key], where) for key, where in places.items()}
    entries: dict[tuple[Any, ...], Entry] = {}
    for number, value in enumerate(read.entries, start=1):
        where = f"{path} entry {number}"
        entry = _record(Entry, value, where)
        for fault in _faults(entry, sources):
            raise InputError(f"{where}: {fault}")
        key = (entry.model, entry.system, entry.setting, entry.task, entry.source)
        if key in entries:
            raise InputError(f"{where}: given twice: {', '.join(map(str, key))}")
        entries[key] = entry
    if unused := sources.keys() - {entry.source for entry in entries.values()}:
        raise InputError(f"{path}: no entry is from {', '.join(sorted(unused))}")
    return dataclasses.replace(read, sources=sources, entries=tuple(entries.values()))


def _record(kind: type, value: Any, where: str) -> Any:
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(value, dict) or not needed <= value.keys() <= set(names):
        got = sorted(value) if isinstance(value, dict) else value
        raise InputError(f"{where}: expected the keys {', '.join(names)}, got {got!r}")
    for name, known in _CHOICES.items():
        if name in value and value[name] not in known:
            choices = ", ".join(known)
            raise InputError(f"{where}: {name} is {value[name]!r}, expected one of: {choices}")
    return kind(**value)


def _faults(entry: Entry, sources: Mapping[str, Source]) -> Iterator[str]:
    """What is wrong with an entry, the gravest first."""
    if (entry.system == FULL_MODEL) != (entry.setting in ("zero-shot", "full fine-tuned")):
        yield f"{entry.setting} is no setting of the system {entry.system}"
    if entry.task != AVERAGE and entry.task not in TASKS:
        yield f"unknown task {entry.task!r}"
    expected = "points" if QUANTITY[entry.setting] == "delta" else "accuracy"
    if entry.task in TASKS and TASKS[entry.task].metric == "perplexity":
        expected = "perplexity"
    if entry.metric != expected:
        yield f"metric is {entry.metric}, expected {expected}"
    if (entry.value is None) != (entry.source is None):
        yield "a value and its source go together, or are both null"
    if entry.source is not None and entry.source not in sources:
        yield f"unknown source {entry.source!r}"
    limit = math.inf if entry.metric == "perplexity" else 100
    value = entry.value
    if value is not None and (type(value) not in (int, float) or not 0 < value <= limit):
        yield f"value must lie in (0, {limit}], got {value!r}"


def table(published: Published) -> str:
    """All numbers as a Markdown table."""
    lines = ["| model | system | setting | task | value | source |", "|---|---|---|---|---:|---|"]
    for entry in published.entries:
        value = "not available" if entry.value is None else f"{entry.value:g}"
        source = ": ".join(filter(None, (entry.source, entry.note)))
        lines.append(_line(entry.model, entry.system, entry.setting, entry.task, value, source))
    return "\n".join([published.protocol, "", *lines])


def beside(published: Published, measured: Measured, model: str) -> str:
    """Markdown: a table, the sources, and in what the two protocols differ; of one of `MODELS`."""
    entries = published.find(model=model)
    used = {e.source: published.sources[e.source] for e in entries if e.source}
    sources = [f"- [{key}] {source.kind}: {source.where}" for key, source in used.items()]
    sources += [f"- {e.system}, {e.setting}, {e.task}: {e.note}" for e in entries if e.note]
    ours = "{name}, width {width}".format(**measured.results[0]["model"])
    rows = [("protocol", "published", "ours"), ("---",) * 3, ("model", model, ours)]
    parts = [
        [_HEADING.format(model)],
        _table(entries, measured),
        sources,
        [_line(*row) for row in (*rows, *protocol(measured))],
        [published.protocol],
        [f"- {k} was not run: {why}" for r in measured.results for k, why in r["failures"].items()],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _table(entries: Sequence[Entry], measured: Measured) -> list[str]:
    budgets = measured.budgets
    titles = ["ours" if b is None else f"ours, budget {b:g}" for b in budgets]
    lines = [_line("system", "setting", "task", "published", *titles)]
    lines.append(_line(*["---"] * 3, *["---:"] * (1 + len(budgets))))
    values: dict[tuple[str, str, str], list[str]] = {}
    for e in entries:
        known = [] if e.value is None else [f"{e.value} [{e.source}]"]
        values.setdefault((e.system, e.setting, e.task), []).extend(known)
    for what, known in values.items():
        ours = (measured_value(measured, *what, budget=budget) for budget in budgets)
        lines.append(_line(*what, ", ".join(known) or "not available", *ours))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _model_of(measured: Measured) -> str:
    name = measured.results[0]["model"]["name"]
    for model in MODELS:
        if name.lower().endswith(model.lower()):
            return model
    raise InputError(f"{name} is no model of the papers; --model says which to compare it with")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is published, and where results are given, ours beside it."""
    name = "python -m gradot_jax.comparison.published"
    parser = argparse.ArgumentParser(prog=name, description=main.__doc__)
    parser.add_argument("--result", nargs="+", type=Path, help="files that gradot compare wrote")
    parser.add_argument("--model", choices=MODELS, help="by the name in the results")
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


if __name__ == "__main__":
    main()
