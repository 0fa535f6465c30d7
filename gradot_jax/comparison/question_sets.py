"""The tasks of `gradot_jax.data.tasks` on any checkpoint, as a comparison takes them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradot_jax.comparison.testbed import Measure, Task, Testbed
from gradot_jax.data.examples import eval_batches, take
from gradot_jax.data.questions import Preset
from gradot_jax.data.recipe import FineTuning
from gradot_jax.data.records import ItemRecords, TextRecords
from gradot_jax.data.task_data import QATask, load_task, task_examples
from gradot_jax.data.tasks import TASKS
from gradot_jax.data.tokenizer import document_start
from gradot_jax.errors import InputError
from gradot_jax.evaluation.multiple_choice import accepted_match, choice_accuracy, tokenise
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.files.digest import tree_digest
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.nn.batch import Batch

_HELD_OUT = 32
_TEXT_BOS = {"paper": "every line", "corrected": "every document"}


def question_tasks(
    names: Sequence[str],
    config: ModelConfig,
    tokenizer,
    *,
    preset: Preset,
    data: Path | None = None,
    limit: int | None = None,
    changes: Mapping[str, Any] | None = None,
    epochs: float | None = None,
) -> tuple[Task, ...]:
    """Tasks of `gradot_jax.data.tasks` as a comparison takes them; scores are in percent.

    Args:
        names: of the tasks.
        config: of the model.
        tokenizer: of the model.
        preset: which text.
        data: folder with one folder per task, or with the data of the only one.
        limit: most records of each part.
        changes: fields of `FineTuning` that replace those of the tasks' records.
        epochs: passes over the training part, instead of steps.

    Raises:
        InputError: when a task has no folder or cannot be read, or has fewer examples than a
            training batch.
    """
    tasks = []
    for name in names:
        folder = None if data is None else _folder(data, name, alone=len(names) == 1)
        loaded = load_task(name, preset=preset, data=folder, limit=limit)
        tuning = TASKS[name].tuning.changed(**(changes or {}))
        tasks.append(_task(loaded, config, tokenizer, tuning, epochs))
    return tuple(tasks)


def _folder(data: Path, name: str, *, alone: bool) -> Path:
    """Where a task's data is: in a folder of its name, or all there is."""
    if (data / name).is_dir():
        return data / name
    found = [other for other in TASKS if (data / other).is_dir()]
    if data.is_dir() and (found or not alone):
        raise InputError(
            f"{data / name}: no such folder, expected the data of {name}; {data} has folders of "
            f"{', '.join(found) or 'no task'}"
        )
    return data


def question_testbed(
    name: str,
    config: ModelConfig,
    params: Params,
    tasks: tuple[Task, ...],
    calibration: Batch,
    *,
    num_sequences: int,
    batch_size: int,
    training: Mapping[str, Any] | None = None,
) -> Testbed:
    """A testbed whose draws are random rows of one set of calibration examples.

    Gradients are compared on the last rows, which no draw takes, where there are enough. A draw
    after the first is refused where fewer than two draws' rows are left: it would be much the
    same rows again.

    Args:
        name: of the model.
        config: its configuration.
        params: its weights, float32.
        tasks: see `question_tasks`.
        calibration: the model owner's text.
        num_sequences: rows of a draw, rounded down to whole batches.
        batch_size: rows of a calibration batch.
        training: see `Testbed`.
    """
    count = len(calibration.input_ids)
    held_out = min(_HELD_OUT, count // 4)
    batch_size = min(batch_size, num_sequences, count - held_out)
    return Testbed(
        name=name,
        config=config,
        params=params,
        tasks=tasks,
        calibration=_draws(take(calibration, slice(count - held_out)), num_sequences, batch_size),
        held_out=list(eval_batches(take(calibration, slice(-(held_out or 1), None)), batch_size)),
        training=training or {},
    )


def _draws(
    examples: Batch, num_sequences: int, batch_size: int
) -> Callable[[int], Sequence[Batch]]:
    count = len(examples.input_ids)
    rows = min(num_sequences, count) // batch_size * batch_size

    def draw(seed: int) -> list[Batch]:
        if seed and count < 2 * rows:
            raise InputError(
                f"draw {seed} of the calibration text: there are {count} sequences to draw {rows} "
                f"from, expected at least {2 * rows}; give more text or fewer sequences"
            )
        order = np.random.default_rng(seed).permutation(count)
        return list(eval_batches(take(examples, order[:rows]), batch_size))

    return draw


class _Report(NamedTuple):
    """The part to report on.

    Attributes:
        measure: a model's metrics on it.
        digest: of its tokens and of the right answers.
        bos: what begins with the token of `document_start`.
        num_cut: prompts that lost their beginning.
    """

    measure: Measure
    digest: str
    bos: str | bool
    num_cut: int


def _task(
    task: QATask,
    config: ModelConfig,
    tokenizer,
    tuning: FineTuning,
    epochs: float | None,
) -> Task:
    batch_size = tuning.batch_size
    start = document_start(tokenizer, config)
    read = functools.partial(
        task_examples,
        task,
        tokenizer=tokenizer,
        bos_id=start,
        eos_id=next(iter(config.end_token_ids), None),
        longest=config.max_position_embeddings,
    )
    (train, cut), (development, cut_too) = read(task.train), read(task.validation)
    if isinstance(task.report, TextRecords):
        begun = "no text" if start is None else _TEXT_BOS[task.preset]
        report = _text_report(read(task.report)[0], begun, batch_size)
    else:
        report = _question_report(task, task.report, config, tokenizer, batch_size)
    percent = "" if task.metric == "perplexity" else " %"
    return Task(
        name=task.name,
        label=f"{task.name} ({task.preset}), {task.metric.replace('_', ' ')}{percent}",
        metric=task.metric,
        higher_is_better=task.metric != "perplexity",
        tuning=_tuning(tuning, len(train.input_ids), epochs, task.name),
        train=train,
        development=development,
        measure=report.measure,
        test_digest=report.digest,
        validity=TASKS[task.name].validity,
        evaluation_batch=min(batch_size, len(development.input_ids)),
        protocol={
            "preset": task.preset,
            "split": task.splits.report,
            "items": len(task.report.records),
            "bos": report.bos,
            "left_out": task.num_left_out,
            "cut": {"train": cut, "development": cut_too, "report": report.num_cut},
        },
    )


def _tuning(tuning: FineTuning, count: int, epochs: float | None, name: str) -> FineTuning:
    """Settings for `count` examples, with the steps of so many passes over them."""
    if count < tuning.batch_size:
        raise InputError(
            f"{name}: {count} examples to train on do not fill a batch of {tuning.batch_size}; "
            "give a smaller batch_size"
        )
    if epochs is None:
        return tuning
    steps = max(round(epochs * (count // tuning.batch_size)), 1)
    return tuning.changed(steps=steps)


def _text_report(windows: Batch, bos: str, batch_size: int) -> _Report:
    def measure(config: ModelConfig, params: Params) -> dict[str, float]:
        batches = eval_batches(windows, batch_size)
        return {"perplexity": perplexity(config, params, batches).perplexity}

    return _Report(measure=measure, digest=tree_digest(windows), bos=bos, num_cut=0)


def _question_report(
    task: QATask, records: ItemRecords, config: ModelConfig, tokenizer, batch_size: int
) -> _Report:
    questions = tokenise(config, tokenizer, records, bos=task.report_bos)

    def by_accuracy(config: ModelConfig, params: Params) -> dict[str, float]:
        score = choice_accuracy(config, params, questions, batch_size=batch_size)
        return {
            "accuracy": 100 * score.accuracy,
            "accuracy_normalised": 100 * score.accuracy_normalised,
            "answer_log_likelihood": score.log_likelihood,
        }

    def by_exact_match(config: ModelConfig, params: Params) -> dict[str, float]:
        score = accepted_match(config, params, questions, batch_size=batch_size)
        return {
            "exact_match": 100 * score.exact_match,
            "answer_log_likelihood": score.log_likelihood,
        }

    return _Report(
        measure=by_accuracy if task.metric == "accuracy" else by_exact_match,
        # The tokens tell another tokenizer, the records another right answer.
        digest=f"{records.digest} {tree_digest(questions.examples)}",
        bos=task.report_bos and document_start(tokenizer, config) is not None,
        num_cut=questions.num_truncated,
    )
