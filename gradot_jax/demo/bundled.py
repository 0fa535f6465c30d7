"""The bundled model with its texts and tasks, as a comparison takes them, and the demo on them."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.stages import EMPTY, FULL, single
from gradot_jax.comparison.testbed import Measure, Testbed
from gradot_jax.comparison.testbed import Task as ComparedTask
from gradot_jax.data.examples import eval_batches, take
from gradot_jax.data.recipe import FineTuning, Validity
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.bundled_tasks import FINE_TUNING, Task, calibration_examples, load_tasks
from gradot_jax.demo.corpus import bundled_facts, bundled_model
from gradot_jax.evaluation.exact_match import exact_match
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.files.digest import tree_digest
from gradot_jax.methods.options import DistillationOptions, ScaleOTOptions
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params

LABELS = {
    "top": "prose, perplexity",
    "api": "API facts, exact match %",
    "syn": "made-up people, exact match %",
}
TRAINING = {
    "distillation": DistillationOptions(steps=250, learning_rate=1e-3),
    "scaleot": ScaleOTOptions(steps=250, learning_rate=1e-3),
}
"""For the methods that train: a model this narrow takes a higher rate than the default."""

_VALIDITY = {"perplexity": Validity(gain=0.25, loss=0.8), "exact_match": Validity(gain=50, loss=40)}
_EVALUATION_BATCH = 30
_CALIBRATION_BATCH = 16
_HELD_OUT_WINDOWS = 64


def run_demo(
    out: Path,
    *,
    budget: float,
    methods: Sequence[str],
    tasks: Sequence[str],
    seeds: int = 1,
    draws: int = 1,
) -> dict[str, Any]:
    """Runs a comparison in its quickest setting, with the upper bound and the floor.

    The full model is tuned once a seed; per method, draw of calibration text and seed the
    emulator is tuned and its adapter plugged in, each at the task's own learning rate. Arguments
    are those of `gradot demo`.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: for an unknown method, or a budget out of range.
    """
    from gradot_jax.comparison.comparison import run_comparison

    compared = tuple(dict.fromkeys((FULL, *methods, EMPTY)))
    plan = single(compared, (budget,), tasks, seeds=seeds, draws=draws, rates=(1.0,))
    return run_comparison(bundled_testbed(tasks, tuning=FINE_TUNING), plan, out)


def bundled_testbed(
    tasks: Sequence[str],
    *,
    tuning: Mapping[str, FineTuning] = FINE_TUNING,
    num_sequences: int = 512,
) -> Testbed:
    """The bundled model with some of its tasks; gradients are compared on development prose.

    A draw of calibration text has `num_sequences` windows.

    Raises:
        ValueError: for a task that is none of `top`, `api` and `syn`.
    """
    config, params = load_model(bundled_model())
    tokenizer, facts = load_tokenizer(bundled_model()), bundled_facts()
    loaded = load_tasks(tokenizer, facts, tuple(dict.fromkeys((*tasks, "top"))))
    prose = take(loaded["top"].parts.development, slice(_HELD_OUT_WINDOWS))

    @functools.cache
    def calibration(draw: int) -> list:
        examples = calibration_examples(tokenizer, facts, seed=draw, num_sequences=num_sequences)
        return list(eval_batches(examples, _CALIBRATION_BATCH))

    return Testbed(
        name="bundled",
        config=config,
        params=params,
        tasks=tuple(_compared(loaded[name], tuning[name]) for name in tasks),
        calibration=calibration,
        held_out=list(eval_batches(prose, _CALIBRATION_BATCH)),
        training=TRAINING,
    )


def _compared(task: Task, tuning: FineTuning) -> ComparedTask:
    return ComparedTask(
        name=task.name,
        label=LABELS[task.name],
        metric=task.metric,
        higher_is_better=task.metric != "perplexity",
        tuning=tuning,
        train=task.parts.train,
        development=task.parts.development,
        measure=_measure(task),
        test_digest=tree_digest(task.parts.test),
        validity=_VALIDITY[task.metric],
        evaluation_batch=_EVALUATION_BATCH,
    )


def _measure(task: Task) -> Measure:
    def by_perplexity(config: ModelConfig, params: Params) -> dict[str, float]:
        batches = eval_batches(task.parts.test, _EVALUATION_BATCH)
        return {"perplexity": perplexity(config, params, batches).perplexity}

    def by_exact_match(config: ModelConfig, params: Params) -> dict[str, float]:
        score = exact_match(config, params, eval_batches(task.parts.test, _EVALUATION_BATCH))
        return {
            "exact_match": 100 * score.exact_match,
            "answer_log_likelihood": score.log_likelihood,
        }

    return by_perplexity if task.metric == "perplexity" else by_exact_match
