"""The bundled model with its texts and tasks, as a comparison takes them."""

import functools
from collections.abc import Mapping, Sequence

from gradot_jax.comparison.task import FineTuning, Measure, Validity
from gradot_jax.comparison.task import Task as ComparedTask
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.compression.options import DistillationOptions, ScaleOTOptions
from gradot_jax.data.examples import eval_batches, take
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.corpus import bundled_facts, bundled_model
from gradot_jax.demo.tasks import FINE_TUNING, Task, calibration_examples, load_tasks
from gradot_jax.evaluation.exact_match import exact_match
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.hf import load_opt
from gradot_jax.models.opt.params import Params
from gradot_jax.offsite.checkpoint import tree_digest

LABELS = {
    "top": "prose, perplexity",
    "api": "API facts, exact match %",
    "syn": "made-up people, exact match %",
}
TRAINING = {
    "offsite-tuning": {"distillation": DistillationOptions(steps=250, learning_rate=1e-3)},
    "scaleot": {"scaleot": ScaleOTOptions(steps=250, learning_rate=1e-3)},
}
"""For the methods that train: a model this narrow takes a higher rate than the default."""

_VALIDITY = {
    "perplexity": Validity(gain=0.25, loss=0.8),
    "exact_match": Validity(gain=50, loss=40),
}
_EVALUATION_BATCH = 30
_CALIBRATION_BATCH = 16
_HELD_OUT_WINDOWS = 64


def bundled_testbed(
    tasks: Sequence[str],
    *,
    tuning: Mapping[str, FineTuning] = FINE_TUNING,
    num_sequences: int = 512,
) -> Testbed:
    """The bundled model; gradients are compared on development prose.

    Args:
        tasks: of `top`, `api` and `syn`.
        tuning: settings by name of the task.
        num_sequences: windows of a draw of calibration text.

    Raises:
        ValueError: for another task.
    """
    config, params = load_opt(bundled_model())
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
    def by_perplexity(config: OPTConfig, params: Params) -> dict[str, float]:
        batches = eval_batches(task.parts.test, _EVALUATION_BATCH)
        return {"perplexity": perplexity(config, params, batches).perplexity}

    def by_exact_match(config: OPTConfig, params: Params) -> dict[str, float]:
        score = exact_match(config, params, eval_batches(task.parts.test, _EVALUATION_BATCH))
        return {
            "exact_match": 100 * score.exact_match,
            "answer_log_likelihood": score.log_likelihood,
        }

    return by_perplexity if task.metric == "perplexity" else by_exact_match
