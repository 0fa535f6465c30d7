"""The numbers of the papers, each with where it was read; what could not be read is null.

    python -m benchmarks.published
    python -m benchmarks.published --result OUT/result.json    # with ours beside them

Nothing here was measured by this project, and nothing was computed from what is here.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args

from gradot_jax.data.tasks import TASKS
from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json

PATH = Path(__file__).with_suffix(".json")
AVERAGE = "average of 8"
FULL_MODEL = "full model"

Model = Literal["OPT-1.3B", "OPT-6.7B"]
System = Literal["full model", "offsite-tuning", "layer-drop", "crash", "scaleot", "gradot"]
Setting = Literal[
    "zero-shot",
    "full fine-tuned",
    "emulator zero-shot",
    "emulator fine-tuned",
    "plug-in",
    "plug-in - emulator fine-tuned",
]
Metric = Literal["accuracy", "points", "perplexity"]
Kind = Literal["repository image", "repository results", "independent log", "third party"]

_OF_FULL_MODEL = ("zero-shot", "full fine-tuned")
_GAP = "plug-in - emulator fine-tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers were read.

    Attributes:
        kind: how near it is to the paper.
        paper: arXiv number of the paper that the numbers are said to be of; None for no paper.
        where: repository and file, or page.
        note: what to know before relying on it.
    """

    kind: Kind
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

    model: Model
    system: System
    setting: Setting
    task: str
    metric: Metric
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
    sources: dict[str, Source]
    entries: tuple[Entry, ...]

    def find(self, **fields: str) -> tuple[Entry, ...]:
        """The entries with the given values of `Entry`'s fields."""
        return tuple(
            entry
            for entry in self.entries
            if all(getattr(entry, name) == value for name, value in fields.items())
        )


def load_published(path: Path = PATH) -> Published:
    """Reads published numbers.

    Args:
        path: the file.

    Raises:
        InputError: when it is malformed, names an entry twice, gives a value without a known
            source, or a source that nothing uses.
    """
    content = read_json(path)
    _check_keys(content, ("protocol", "sources", "entries"), str(path))
    sources = {
        key: _record(Source, value, f"{path} source {key}")
        for key, value in content["sources"].items()
    }
    entries = tuple(
        _record(Entry, value, f"{path} entry {number}")
        for number, value in enumerate(content["entries"], start=1)
    )
    seen = set()
    for number, entry in enumerate(entries, start=1):
        where = f"{path} entry {number}"
        _check_entry(entry, sources, where)
        key = (entry.model, entry.system, entry.setting, entry.task, entry.source)
        if key in seen:
            raise InputError(f"{where}: given twice: {', '.join(map(str, key))}")
        seen.add(key)
    if unused := sources.keys() - {entry.source for entry in entries}:
        raise InputError(f"{path}: no entry is from {', '.join(sorted(unused))}")
    return Published(protocol=content["protocol"], sources=sources, entries=entries)


def _record(kind: type, value: Any, where: str) -> Any:
    fields = dataclasses.fields(kind)
    optional = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    value = optional | value if isinstance(value, dict) else value
    _check_keys(value, tuple(field.name for field in fields), where)
    for field in fields:
        known = get_args(field.type)
        if getattr(field.type, "__origin__", None) is Literal and value[field.name] not in known:
            raise InputError(
                f"{where}: {field.name} is {value[field.name]!r}, expected one of: "
                f"{', '.join(known)}"
            )
    return kind(**value)


def _check_keys(value: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict) or value.keys() != set(names):
        got = sorted(value) if isinstance(value, dict) else value
        raise InputError(f"{where}: expected the keys {', '.join(names)}, got {got!r}")


def _check_entry(entry: Entry, sources: dict[str, Source], where: str) -> None:
    if (entry.system == FULL_MODEL) != (entry.setting in _OF_FULL_MODEL):
        raise InputError(f"{where}: {entry.setting} is no setting of the system {entry.system}")
    if entry.task != AVERAGE and entry.task not in TASKS:
        raise InputError(f"{where}: unknown task {entry.task!r}")
    expected = "points" if entry.setting == _GAP else "accuracy"
    if entry.task in TASKS and TASKS[entry.task].metric == "perplexity":
        expected = "perplexity"
    if entry.metric != expected:
        raise InputError(f"{where}: metric is {entry.metric}, expected {expected}")
    if (entry.value is None) != (entry.source is None):
        raise InputError(f"{where}: a value and its source go together, or are both null")
    if entry.value is None:
        return
    if entry.source not in sources:
        raise InputError(f"{where}: unknown source {entry.source!r}")
    limit = math.inf if entry.metric == "perplexity" else 100
    if type(entry.value) not in (int, float) or not 0 < entry.value <= limit:
        raise InputError(f"{where}: value must lie in (0, {limit}], got {entry.value!r}")


def table(published: Published) -> str:
    """All numbers as a Markdown table."""
    lines = ["| model | system | setting | task | value | source |", "|---|---|---|---|---:|---|"]
    for entry in published.entries:
        value = "not available" if entry.value is None else f"{entry.value:g}"
        source = ": ".join(filter(None, (entry.source, entry.note)))
        cells = (entry.model, entry.system, entry.setting, entry.task, value, source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([published.protocol, "", *lines])


if __name__ == "__main__":
    from benchmarks.beside import main

    main()
