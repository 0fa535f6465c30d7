"""Running tasks of the lm-evaluation-harness, and the record of what their results depend on."""

import logging
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from gradot_jax.errors import InputError
from gradot_jax.evaluation.lm_eval import HarnessModel

logger = logging.getLogger("gradot_jax")

PAPER_TASKS = "openbookqa piqa arc_easy arc_challenge hellaswag sciq webqs race".split()
"""The tasks of the offsite-tuning papers, which report `acc`, and `exact_match` of `webqs`."""


def harness_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """Names of harness tasks from lists of them, comma-separated; `paper` is `PAPER_TASKS`.

    Raises:
        InputError: when there is none.
    """
    parts = [part.strip() for name in names for part in name.split(",")]
    tasks = [task for part in parts for task in (PAPER_TASKS if part == "paper" else [part])]
    chosen = tuple(dict.fromkeys(filter(None, tasks)))
    if not chosen:
        raise InputError("no harness task is named")
    return chosen


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs harness tasks and records what their results depend on.

    Args:
        model: the model.
        tasks: names, see `harness_tasks`.
        include: folder of further tasks as YAML. A task may name Python code, which is run.
        num_fewshot: solved examples before each question; what each task says when None.
        limit: first items of each task to take; all when None.

    Returns:
        `metrics` by task, `task_versions`, `num_fewshot` and `num_items` by task, and
        `lm_eval`, `bos`, `bos_token`, `max_length` and `limit`.

    Raises:
        InputError: for an unknown task, a number out of range, or data that cannot be had.
    """
    for name, value, floor in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None and value < floor:
            raise InputError(f"{name} must be at least {floor}, got {value}")
    manager = _task_manager(tasks, include)
    try:
        found: Any = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            # A bootstrap forks, and a process with JAX's threads must not.
            bootstrap_iters=0,
            torch_random_seed=cast(Any, None),
        )
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the data of {', '.join(tasks)} cannot be loaded: {reason}") from None
    return {
        "lm_eval": metadata.version("lm_eval"),
        "task_versions": dict(found["versions"]),
        "bos": model.bos,
        "bos_token": model.bos_token,
        "max_length": model.max_length,
        "num_fewshot": dict(found["n-shot"]),
        "limit": limit,
        "num_items": {task: count["effective"] for task, count in found["n-samples"].items()},
        "metrics": {task: _numbers(metrics) for task, metrics in found["results"].items()},
    }


def _task_manager(tasks: Sequence[str], include: str | Path | None) -> TaskManager:
    # The harness takes ten seconds to index its own tasks, an included folder's none.
    if include is not None:
        if not Path(include).is_dir():
            raise InputError(f"{include}: not a folder, expected one of harness tasks")
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    logger.info("indexing the tasks of the lm-evaluation-harness, about ten seconds")
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        where = "" if include is None else f" or {include}"
        raise InputError(f"the lm-evaluation-harness{where} has no task {', '.join(unknown)}")
    return manager


def _numbers(metrics) -> dict[str, float]:
    """Metrics by name; the harness appends the filter, `none` for most."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if "," in name and not isinstance(value, str)
    }
