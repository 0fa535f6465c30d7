"""Data sets as checked records, from a local file, a folder of data files, or a Hugging Face name.

The fields of the records decide their kind: `text`; `prompt` and `completion`; or `question`,
`choices` and `answer`. Other fields are ignored.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import parse_json

if TYPE_CHECKING:
    import datasets

_SUFFIXES = (".txt", ".jsonl", ".json")
T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt and the text that should follow it, exactly as given."""

    prompt: str
    completion: str


class Choice(NamedTuple):
    """A question with candidate answers; `answer` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


class Item(NamedTuple):
    """A prompt and candidate continuations, exactly as given; `accepted` indexes the right ones."""

    prompt: str
    continuations: tuple[str, ...]
    accepted: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _RecordsOfOneKind(Generic[T]):
    """What a source holds.

    Attributes:
        records: in the order of the source.
        source: label for reports, without the folder.
    """

    kind: ClassVar[str]

    records: tuple[T, ...]
    source: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the content, whatever file it came from."""
        content = json.dumps([self.kind, self.records], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(content.encode("ascii")).hexdigest()


class TextRecords(_RecordsOfOneKind[str]):
    """Documents, one text each."""

    kind = "text"


class PromptRecords(_RecordsOfOneKind[Prompt]):
    """Prompts with completions."""

    kind = "prompt"


class ItemRecords(_RecordsOfOneKind[Item]):
    """Prompts with candidate continuations."""

    kind = "item"

    @property
    def items(self) -> tuple[Item, ...]:
        """The records, which need no rendering."""
        return self.records


class ChoiceRecords(_RecordsOfOneKind[Choice]):
    """Multiple-choice questions."""

    kind = "choice"

    @property
    def items(self) -> tuple[Item, ...]:
        r"""` {choice}` after `Question: {question}\nAnswer:`, for each choice."""
        return tuple(
            Item(
                f"Question: {record.question}\nAnswer:",
                tuple(f" {choice}" for choice in record.choices),
                (record.answer,),
            )
            for record in self.records
        )


Records = TextRecords | PromptRecords | ChoiceRecords


def read_records(source: str, *, split: str | None = None) -> Records:
    """Reads a data set.

    Args:
        source: one of
            a `.txt` file, which is one document;
            a `.jsonl` or `.json` file with one object a line;
            a folder of data files as `datasets` reads it;
            a name on the Hugging Face hub, as `name` or `name:config`.
            A folder or name may end in `@split`.
        split: the split of a folder or name, instead of `@split`; `train` when neither is given.

    Raises:
        InputError: when the source cannot be read, is empty, or holds a malformed record.
    """
    path = Path(source)
    if path.is_file() or path.suffix in _SUFFIXES:
        if split is not None:
            raise InputError(f"{path.name}: a single file has no splits, got split {split!r}")
        return _read_file(path)
    name, _, suffix = (source, "", "") if path.is_dir() else source.partition("@")
    if suffix and split is not None and split != suffix:
        raise InputError(f"{source}: names the split {suffix!r}, but split {split!r} was asked for")
    return _read_dataset(name, split or suffix or "train")


def _read_file(path: Path) -> Records:
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{path.name}: unknown extension {path.suffix!r}, expected {', '.join(_SUFFIXES)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    rows = _text_rows if path.suffix == ".txt" else _json_rows
    return _collect(rows(path.name, content), path.name)


def _text_rows(name: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield name, {"text": content.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}") from None


def _json_rows(name: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only a newline ends a line: JSON strings may hold the other separators of splitlines.
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        where = f"{name} line {number}"
        yield where, parse_json(line, where)


def _read_dataset(name: str, split: str) -> Records:
    path, config = name, None
    if not Path(name).is_dir():
        path, _, config = name.partition(":")
    hint = "a local .txt, .jsonl or .json file needs no network"
    table = load_table(path, config or None, split, where=f"{name}@{split}", hint=hint)
    label = f"{Path(name).name if Path(name).is_dir() else name}@{split}"
    fields = _FIELDS[_kind(table.column_names, label)]
    rows = table.select_columns(list(fields))
    return _collect(((f"{label} row {i}", row) for i, row in enumerate(rows, start=1)), label)


def load_table(
    path: str, config: str | None, split: str, *, where: str, hint: str
) -> "datasets.Dataset":
    """Loads one split of a folder of data files or of a data set on the Hugging Face hub.

    Args:
        path: the folder, or the name on the hub.
        config: of the data set; None for its only one.
        split: a split or a slice of one, as `datasets` spells it.
        where: names the data in errors.
        hint: what else a user may do, for errors.

    Raises:
        InputError: when it cannot be loaded.
    """
    import datasets

    with _refusing(where, hint):
        return datasets.load_dataset(path, config, split=split)


def configurations(folder: str | Path, *, where: str, hint: str) -> list[str]:
    """Configurations that a folder of data files declares; `default` where it declares none.

    Args:
        folder: of data files.
        where: names the data in errors.
        hint: what else a user may do, for errors.

    Raises:
        InputError: when it has no data files, or its card cannot be read.
    """
    import datasets

    with _refusing(where, hint):
        return datasets.get_dataset_config_names(str(folder))


@contextlib.contextmanager
def _refusing(where: str, hint: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise InputError(f"{where}: cannot be loaded as a data set: {reason} ({hint})") from None


def _collect(rows: Iterable[tuple[str, Any]], source: str) -> Records:
    records: list[Any] = []
    kind: type[Records] = TextRecords
    first = ""
    for where, row in rows:
        got = _kind(row, where)
        if not records:
            kind, first = got, where
        elif got is not kind:
            raise InputError(
                f"{where}: has the fields {', '.join(_FIELDS[got])}, but {first} has "
                f"{', '.join(_FIELDS[kind])}; one source holds one kind of record"
            )
        records.append(_PARSERS[kind](row, where))
    if not records or not any(records):
        raise InputError(f"{source}: empty, expected at least one record")
    return kind(tuple(records), source)


def _kind(fields: Collection[str], where: str) -> type[Records]:
    kinds = [kind for kind, needed in _FIELDS.items() if set(needed) <= set(fields)]
    if len(kinds) != 1:
        got, expected = ", ".join(sorted(fields)), "; or ".join(map(", ".join, _FIELDS.values()))
        raise InputError(f"{where}: got the fields {got or 'none'}, expected one of: {expected}")
    return kinds[0]


def _text(row: Mapping[str, Any], where: str) -> str:
    return _string(row["text"], "text", where)


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    prompt = _string(row["prompt"], "prompt", where)
    completion = _string(row["completion"], "completion", where)
    if not completion:
        raise InputError(f"{where}: the completion is empty, there is nothing to predict")
    return Prompt(prompt, completion)


def _choice(row: Mapping[str, Any], where: str) -> Choice:
    question = _string(row["question"], "question", where)
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(
            f"{where}: choices must be a list of two or more strings, got {_shown(choices)}"
        )
    choices = tuple(_string(choice, "choices", where) for choice in choices)
    if not all(choices):
        raise InputError(f"{where}: choices holds an empty string")
    return Choice(question, choices, _answer(row["answer"], choices, where))


def _answer(answer: Any, choices: tuple[str, ...], where: str) -> int:
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    raise InputError(
        f"{where}: answer must be an index from 0 to {len(choices) - 1} or the text of exactly "
        f"one choice, got {_shown(answer)}"
    )


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} must be a string, got {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {field} holds half of a surrogate pair") from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_FIELDS: dict[type[Records], tuple[str, ...]] = {
    TextRecords: ("text",),
    PromptRecords: ("prompt", "completion"),
    ChoiceRecords: ("question", "choices", "answer"),
}
_PARSERS: dict[type[Records], Callable[[Mapping[str, Any], str], Any]] = {
    TextRecords: _text,
    PromptRecords: _prompt,
    ChoiceRecords: _choice,
}
