"""V1 to V3: whether a comparison on a task means something at all."""

from collections.abc import Mapping
from typing import Any

from gradot_jax.comparison.summary import paired_differences, select, summarise
from gradot_jax.comparison.variants import BASELINE, FLOOR, REFERENCES, VARIANTS


def validity(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three checks for every task on which the empty middle was run.

    V1: tuning the full model improves on zero-shot by the task's threshold. V2: with an empty
    middle the tuned model is worse by the task's threshold than the full model tuned, so what is
    asked for sits in the middle. V3: the plug-in beats the tuned emulator (Delta > 0) for every
    method at every budget, and the interval of each paired difference between the plug-ins of
    another system and of `gradot` excludes 0; `random` counts for neither, and V3 is None where
    there is no interval.

    Args:
        result: of a comparison.
    """
    summary, pairs = summarise(result), paired_differences(result)
    checks = {}
    for name, task in result["tasks"].items():
        rows = select(summary, task=name)
        floor = [row for row in rows if row["method"] == FLOOR and row["runs"]]
        if not floor or floor[0]["full_finetuned"] is None:
            continue
        zero, full, empty = (
            floor[0][q].mean for q in ("zero_shot", "full_finetuned", "emulator_finetuned")
        )
        not_judged = (FLOOR, "random", *REFERENCES)
        others = [r for r in rows if r["method"] not in not_judged and r["delta"]]
        checks[name] = {
            "V1": _check(_gain(task, zero, full), task["validity"]["gain"]),
            "V2": _check(_loss(task, full, empty), task["validity"]["loss"]),
            "V3": _v3(others, select(pairs, task=name)),
        }
    return checks


def _gain(task: Mapping[str, Any], zero: float, full: float) -> float:
    return full - zero if task["higher_is_better"] else 1 - full / zero


def _loss(task: Mapping[str, Any], full: float, empty: float) -> float:
    return full - empty if task["higher_is_better"] else empty / full - 1


def _check(got: float, threshold: float) -> dict[str, Any]:
    return {"holds": got >= threshold, "got": got, "threshold": threshold}


def _v3(rows, pairs) -> dict[str, Any]:
    negative = [f"{r['method']} {r['budget']:g}" for r in rows if not r["delta"].mean > 0]
    judged = {row["method"] for row in rows if _system(row["method"]) != BASELINE}
    intervals = {
        f"{p['method']} {p['budget']:g}": p["plug_in"] for p in pairs if p["method"] in judged
    }
    untested = [name for name, i in intervals.items() if i.low is None]
    level = [name for name, i in intervals.items() if i.low is not None and i.low <= 0 <= i.high]
    fails = negative or level or not rows
    return {
        "holds": False if fails else None if untested or not intervals else True,
        "delta_not_positive": negative,
        "level_with_gradot": level,
        "not_tested": untested,
    }


def _system(method: str) -> str:
    return VARIANTS[method]["method"] if method in VARIANTS else method
