"""The papers' question sets on any OPT checkpoint, as a comparison takes them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradot_jax.comparison.task import FineTuning, Measure, Task, Validity
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.data.examples import eval_batches, take
from gradot_jax.data.records import TextRecords
from gradot_jax.data.tasks import Preset, QATask, load_task, task_examples
from gradot_jax.errors import InputError
from gradot_jax.evaluation.multiple_choice import accepted_match, multiple_choice
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.checkpoint import tree_digest

_HELD_OUT = 32
_VALIDITY = {
    "perplexity": Validity(gain=0.1, loss=0.1),
    "accuracy": Validity(gain=3, loss=3),
    "exact_match": Validity(gain=3, loss=3),
}


def question_tasks(
    names: Sequence[str],
    config: OPTConfig,
    tokenizer,
    tuning: FineTuning,
    *,
    preset: Preset,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    epochs: float | None = None,
) -> tuple[Task, ...]:
    """Tasks of `gradot_jax.data.tasks` as a comparison takes them; scores are in percent.

    Args:
        names: of the tasks.
        config: of the model.
        tokenizer: of the model.
        tuning: settings for all of them.
        preset: which text.
        data: folder with one folder per task, or with the data of the only one.
        limit: most records of each part.
        batch_size: sequences a batch when measuring.
        epochs: passes over the training part, instead of the steps of `tuning`.

    Raises:
        InputError: when a task cannot be read, or has fewer examples than a training batch.
    """
    tasks = []
    for name in names:
        folder = data / name if data is not None and (data / name).is_dir() else data
        loaded = load_task(name, preset=preset, data=folder, limit=limit)
        tasks.append(_task(loaded, config, tokenizer, tuning, batch_size, epochs))
    return tuple(tasks)


def question_testbed(
    name: str,
    config: OPTConfig,
    params: Params,
    tasks: tuple[Task, ...],
    calibration: Batch,
    *,
    num_sequences: int,
    batch_size: int,
    training: Mapping[str, Mapping[str, Any]] | None = None,
) -> Testbed:
    """A testbed whose draws are random rows of one set of calibration examples.

    Gradients are compared on the last rows, which no draw takes, where there are enough.

    Args:
        name: of the model.
        config: its configuration.
        params: its weights, float32.
        tasks: see `question_tasks`.
        calibration: the owner's text.
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
        order = np.random.default_rng(seed).permutation(count)
        return list(eval_batches(take(examples, order[:rows]), batch_size))

    return draw


def _task(
    task: QATask, config, tokenizer, tuning: FineTuning, batch_size: int, epochs: float | None
) -> Task:
    limits = {"bos_id": config.bos_token_id, "eos_id": config.eos_token_id}
    limits["longest"] = config.max_position_embeddings
    train, development = (
        task_examples(task, records, tokenizer, **limits)[0]
        for records in (task.train, task.validation)
    )
    if len(train.input_ids) < tuning.batch_size:
        raise InputError(
            f"{task.name}: {len(train.input_ids)} examples to train on do not fill a batch of "
            f"{tuning.batch_size}; give a smaller batch_size"
        )
    if epochs is not None:
        steps = max(round(epochs * (len(train.input_ids) // tuning.batch_size)), 1)
        tuning = dataclasses.replace(tuning, steps=steps, warmup=min(tuning.warmup, steps - 1))
    measure, digest = _measure(task, config, tokenizer, batch_size)
    percent = "" if task.metric == "perplexity" else " %"
    return Task(
        name=task.name,
        label=f"{task.name} ({task.preset}), {task.metric.replace('_', ' ')}{percent}",
        metric=task.metric,
        higher_is_better=task.metric != "perplexity",
        tuning=tuning,
        train=train,
        development=development,
        measure=measure,
        test_digest=digest,
        validity=_VALIDITY[task.metric],
        evaluation_batch=min(batch_size, len(development.input_ids)),
        protocol={
            "preset": task.preset,
            "split": task.splits.report,
            "items": len(task.report.records),
            "bos": task.report_bos,
        },
    )


def _measure(task: QATask, config, tokenizer, batch_size: int) -> tuple[Measure, str]:
    """How the report part is measured, and a digest of it and of how."""
    if isinstance(task.report, TextRecords):
        limits = {"bos_id": config.bos_token_id, "eos_id": config.eos_token_id}
        limits["longest"] = config.max_position_embeddings
        windows, _ = task_examples(task, task.report, tokenizer, **limits)

        def by_perplexity(config: OPTConfig, params: Params) -> dict[str, float]:
            batches = eval_batches(windows, batch_size)
            return {"perplexity": perplexity(config, params, batches).perplexity}

        return by_perplexity, tree_digest(windows)
    records, settings = task.report, {"batch_size": batch_size, "bos": task.report_bos}

    def by_accuracy(config: OPTConfig, params: Params) -> dict[str, float]:
        score = multiple_choice(config, params, tokenizer, records, **settings)
        return {
            "accuracy": 100 * score.accuracy,
            "accuracy_normalised": 100 * score.accuracy_normalised,
            "answer_log_likelihood": score.log_likelihood,
        }

    def by_exact_match(config: OPTConfig, params: Params) -> dict[str, float]:
        score = accepted_match(config, params, tokenizer, records, **settings)
        return {
            "exact_match": 100 * score.exact_match,
            "answer_log_likelihood": score.log_likelihood,
        }

    measure = by_accuracy if task.metric == "accuracy" else by_exact_match
    return measure, f"{records.digest} bos {task.report_bos}"
