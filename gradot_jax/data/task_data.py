"""A task's data, from the Hub or a copy of it, as records and then as examples."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from gradot_jax.data.questions import Part, Preset, Row
from gradot_jax.data.records import (
    Item,
    ItemRecords,
    Prompt,
    PromptRecords,
    TextRecords,
    configurations,
    load_table,
)
from gradot_jax.data.tasks import TASKS, Metric, Splits
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.nn.batch import Batch

_PROCESSES = 88
"""Processes by which the published runs prepared WikiText-2."""
_NO_CONFIG = "default"
_FOLDERS = {"data", "train", "validation", "test"}
"""Where the files of a single configuration may lie; those in any other folder are another's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QATask:
    """A task ready to be tokenised.

    Attributes:
        name: of the task.
        preset: text that was asked for.
        splits: where the parts come from.
        train: to fine-tune on.
        validation: to choose by.
        report: to measure on.
        metric: to report.
        length: T of the examples at most.
        append_eos: whether the answers of `train` and `validation` end in `eos_token_id`.
        report_bos: whether a prompt of `report` begins as a document does.
        num_left_out: rows of `train` and `validation` without an answer to learn.
    """

    name: str
    preset: Preset
    splits: Splits
    train: PromptRecords | TextRecords
    validation: PromptRecords | TextRecords
    report: ItemRecords | TextRecords
    metric: Metric
    length: int
    append_eos: bool
    report_bos: bool
    num_left_out: int


def load_task(
    name: str, *, preset: Preset, data: str | Path | None = None, limit: int | None = None
) -> QATask:
    """Loads a task from the Hugging Face hub, or from a copy of its data.

    Args:
        name: a key of `TASKS`.
        preset: which text.
        data: folder in the hub's layout instead, for one configuration or a copy of all.
        limit: most records of each part; None for all.

    Raises:
        InputError: for an unknown name or preset, data that cannot be read or is of another
            configuration, a column that is missing, or a row that is malformed.
    """
    _check_choice("task", name, tuple(TASKS))
    _check_choice("preset", preset, get_args(Preset))
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    task, paper = TASKS[name], preset == "paper"
    splits = task.paper if paper else task.corrected
    if splits is None:
        raise InputError(f"{name}: no task of the papers; expected the preset corrected")
    if task.hub_id is None and data is None:
        raise InputError(
            f"{name}: not on the Hugging Face Hub; scripts/real_data.sh makes its data"
        )
    read = functools.partial(_read, name, data, preset, limit)
    space = "" if paper and not task.space else " "
    train, dropped = _to_learn(*read("train", splits.train), space)
    validation, dropped_too = _to_learn(*read("validation", splits.validation), space)
    return QATask(
        name=name,
        preset=preset,
        splits=splits,
        train=train,
        validation=validation,
        report=_to_report(*read("report", splits.report), task.metric),
        metric=task.metric,
        length=task.paper_length if paper else task.corrected_length,
        append_eos=task.ends and not paper and isinstance(train, PromptRecords),
        report_bos=not paper,
        num_left_out=dropped + dropped_too,
    )


def task_examples(
    task: QATask,
    records: PromptRecords | TextRecords,
    tokenizer,
    *,
    bos_id: int | None,
    eos_id: int | None,
    longest: int,
) -> tuple["Batch", int]:
    """Examples of one of a task's parts; see `multiple_choice` for questions to report on.

    Args:
        task: the task.
        records: of one of its parts.
        tokenizer: see `load_tokenizer`.
        bos_id: begins every document and prompt; None for none.
        eos_id: ends an answer; None where the model has none.
        longest: largest T that the model takes.

    Returns:
        Examples `[N, T]`, and how many prompts lost their beginning.

    Raises:
        InputError: when an answer does not fit or is to end and has nothing to end it, or text does
            not fill one window.
    """
    if task.append_eos and eos_id is None:
        raise InputError(f"{task.name}: answers end in eos_token_id, which the model has not")
    # They load jax.
    from gradot_jax.data.examples import line_examples, prompt_examples, text_examples

    length = min(task.length, longest)
    if isinstance(records, PromptRecords):
        end = eos_id if task.append_eos else None
        return prompt_examples(tokenizer, records, bos_id, length, eos_id=end)
    if task.preset == "paper":
        texts = records.records
        return line_examples(tokenizer, texts, length, bos_id, num_groups=_PROCESSES), 0
    return text_examples(tokenizer, records.records, length, bos_id), 0


def _check_choice(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise InputError(f"unknown {what} {got!r}, expected one of: {', '.join(known)}")


def _read(
    name: str, data: str | Path | None, preset: Preset, limit: int | None, part: Part, split: str
) -> tuple[tuple, str]:
    """Questions or documents of one part, and its label."""
    task, label = TASKS[name], f"{name} {split}"
    hint = "scripts/real_data.sh makes it"
    if task.hub_id is not None:
        hint = f"a local folder laid out as {task.hub_id} needs no network"
    path, config = task.hub_id or "", task.config
    if data is not None:
        path, config = _folder(Path(data), task.config, label, hint)
    table = load_table(path, config, split, where=label, hint=hint)
    missing = [column for column in task.columns if column not in table.column_names]
    if missing:
        raise InputError(
            f"{label}: has no column {', '.join(missing)}; got the columns "
            f"{', '.join(table.column_names)}"
        )
    table = table.select_columns(list(task.columns))
    rows = (Row(f"{label} row {i}", dict(values)) for i, values in enumerate(table, start=1))
    read = tuple(itertools.islice(task.read(rows, preset, part), limit))
    if not read:
        raise InputError(f"{label}: empty, expected at least one row")
    return read, label


def _folder(folder: Path, config: str | None, label: str, hint: str) -> tuple[str, str | None]:
    """The folder of one configuration, or a copy of the whole data set and its configuration."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with the data of a task")
    if config is None:
        return str(folder), None
    declared = configurations(folder, where=label, hint=hint)
    if config in declared:
        return str(folder), config
    if (folder / config).is_dir():
        return str(folder / config), None
    # Files in folders of any name would be read as well, whatever they are of.
    others = sorted({*declared, *_foreign_folders(folder)} - {_NO_CONFIG})
    if others:
        raise InputError(
            f"{label}: {folder} has data of {', '.join(others)}, expected the configuration "
            f"{config}, in a folder of that name or alone"
        )
    return str(folder), None


def _foreign_folders(folder: Path) -> set[str]:
    """Subfolders with files, save those in which the one configuration of a folder may lie."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    visible = (file for file in files if not any(part.startswith(".") for part in file.parts))
    return {part for file in visible for part in file.parts[:-1]} - _FOLDERS


def _to_learn(
    read: tuple, label: str, space: str
) -> tuple[PromptRecords, int] | tuple[TextRecords, int]:
    """Records to train on, and how many questions have an empty answer."""
    if isinstance(read[0], str):
        return TextRecords(read, label), 0
    pairs = [(question.prompt, question.choices[question.accepted[0]]) for question in read]
    records = tuple(Prompt(prompt, space + answer) for prompt, answer in pairs if answer)
    if not records:
        raise InputError(f"{label}: every answer is empty, there is nothing to learn")
    return PromptRecords(records, label), len(pairs) - len(records)


def _to_report(read: tuple, label: str, metric: Metric) -> ItemRecords | TextRecords:
    if isinstance(read[0], str):
        return TextRecords(read, label)
    if metric == "exact_match":
        # What is not accepted plays no part in a match.
        read = tuple(question.accepted_alone for question in read)
    items = (
        Item(question.prompt, tuple(f" {text}" for text in question.choices), question.accepted)
        for question in read
    )
    return ItemRecords(tuple(items), label)
