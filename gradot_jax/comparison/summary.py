"""What the rows of a comparison say: means, differences paired by seed, and V1 to V3.

Runs on one draw of calibration text share that draw, so with several draws each draw's mean is
one observation; with one draw each seed is.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

from gradot_jax.comparison.stages import BASELINE, EMPTY, REFERENCES
from gradot_jax.methods.table import METHODS

QUANTITIES = {
    "zero_shot": (),
    "full_finetuned": ("seed",),
    "emulator_zero_shot": ("draw",),
    "emulator_finetuned": ("seed", "draw"),
    "plug_in": ("seed", "draw"),
    "delta": ("seed", "draw"),
}
"""What is measured, and what it varies with; rows that agree in that repeat one measurement."""

COSTS = (
    "share_shipped share_verbatim gradient_cosine gradient_relative_error gradient_norm_ratio "
    "loss_gap seconds added_host_bytes plug_in_gain emulator_gain moved_relative_error"
).split()
PREDICTORS = {
    "gradient_cosine": 1,
    "gradient_relative_error": -1,
    "loss_gap": -1,
    "plug_in_gain": 1,
    "emulator_gain": 1,
    "moved_relative_error": -1,
}
"""What is known before fine-tuning, with the sign of what is hoped to be better."""
LEAST_RANKED = 5
"""Emulators below which ranks say nothing."""
PAIRED = ("plug_in", "emulator_finetuned", "delta")
LIKELIHOOD = "answer_log_likelihood"
"""A second measure of tasks that are measured by answers: nats of the right one, mean."""
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over runs.

    Attributes:
        mean: the mean.
        error: its standard error; None of a single run.
        count: runs.
    """

    mean: float
    error: float | None
    count: int


class Interval(NamedTuple):
    """A mean with its confidence interval by Student's t.

    Attributes:
        mean: the mean.
        low: lower end; None of a single observation.
        high: upper end; None of a single observation.
        count: observations.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def planned(result: Mapping[str, Any], task: str | None = None) -> list[tuple[str, float | None]]:
    """Methods and budgets of the plan, finished or not; of one task, or of all."""
    rows = result["planned"] if task is None else select(result["planned"], task=task)
    return list(dict.fromkeys((row["method"], row["budget"]) for row in rows))


def same_system(result: Mapping[str, Any], method: str, other: str) -> bool:
    """Whether two compared names are settings of one method, as `gradot` and `gradot+` are."""
    ours, theirs = (result["systems"].get(name, name) for name in (method, other))
    known = ours in METHODS and theirs in METHODS
    return METHODS[ours].compress is METHODS[theirs].compress if known else ours == theirs


def summarise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task, method and budget: each quantity's `Estimate` over seeds and draws.

    `plug_in_nats` and the like are log-likelihoods of the right answers, where there are answers. A
    quantity that was not measured is None; a row without a run has `runs` 0.
    """
    summary = []
    for name, task in result["tasks"].items():
        for method, budget in planned(result, name):
            rows = select(result["rows"], task=name, method=method, budget=budget)
            row = {"task": name, "method": method, "budget": budget, "runs": len(rows)}
            row["learning_rate"] = rows[0]["learning_rate"] if rows else None
            row["rate"] = _rate_found(rows[0]) if rows else None
            row["untuned"] = sum(r.get("best_step") == 0 for r in rows)
            values = {q: _values(rows, q, task["metric"]) for q in QUANTITIES}
            values |= {f"{q}_nats": _values(rows, q, LIKELIHOOD) for q in PAIRED}
            summary.append(row | {q: estimate(v) if v else None for q, v in values.items()})
    return summary


def summarise_compressions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per compressed method and budget: each cost's `Estimate` over draws."""
    summary = []
    for method, budget in planned(result):
        found = select(result["compressions"], method=method, budget=budget)
        if found:
            values = {c: [f[c] for f in found if f.get(c) is not None] for c in COSTS}
            costs = {c: estimate(v) if v else None for c, v in values.items()}
            summary.append({"method": method, "budget": budget, "draws": len(found)} | costs)
    return summary


def predictions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How well what is known before fine-tuning ranks the plug-ins: Spearman's rho by task.

    Over methods and budgets, the empty middle left out.

    Returns:
        Rows of `task`, `quantity`, `rho` with the metric and `rho_nats` with the log-likelihood of
        the right answers, None where all are level or there are none, and `emulators`, their
        number.
    """
    known = {(c["method"], c["budget"]): c for c in summarise_compressions(result)}
    summary, found = summarise(result), []
    for name, task in result["tasks"].items():
        rows = [
            row
            for row in select(summary, task=name)
            if row["method"] != EMPTY
            and (row["method"], row["budget"]) in known
            and row["plug_in"]
            and math.isfinite(row["plug_in"].mean)
        ]
        for quantity, sign in PREDICTORS.items():
            guesses = [known[row["method"], row["budget"]][quantity] for row in rows]
            pairs = [(sign * g.mean, r) for g, r in zip(guesses, rows, strict=True) if g]
            pairs = [(guess, row) for guess, row in pairs if math.isfinite(guess)]
            if len(pairs) < LEAST_RANKED:
                continue
            upwards = 1 if task["higher_is_better"] else -1
            worth = [upwards * row["plug_in"].mean for _, row in pairs]
            nats = [row["plug_in_nats"].mean for _, row in pairs if row["plug_in_nats"]]
            rho = partial(_spearman, [guess for guess, _ in pairs])
            ranked = {"rho": rho(worth), "rho_nats": rho(nats) if len(nats) == len(pairs) else None}
            found.append({"task": name, "quantity": quantity, **ranked, "emulators": len(pairs)})
    return found


def paired_differences(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each method against `gradot` at equal budget, seed and draw; positive is better.

    A difference of Delta is positive where the method's Delta is larger. A method that reads no
    calibration text is paired with every draw.
    """
    differences = []
    for name, task in result["tasks"].items():
        for method, budget in planned(result, name):
            rows = select(result["rows"], task=name, method=method, budget=budget)
            base = select(result["rows"], task=name, method=BASELINE, budget=budget)
            if method == BASELINE or not rows or not base:
                continue
            pairs = [(row, other) for other in base if (row := _partner(rows, other))]
            row = {"task": name, "method": method, "budget": budget}
            for quantity in PAIRED if pairs else ():
                upwards = quantity == "delta" or task["higher_is_better"]
                sign = 1 if upwards else -1
                gaps = {
                    (other["seed"], other["draw"]): sign
                    * (ours[quantity][task["metric"]] - other[quantity][task["metric"]])
                    for ours, other in pairs
                }
                row[quantity] = mean_interval(observations(gaps))
            differences += [row] if pairs else []
    return differences


def validity(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three checks for every task on which the empty middle was run.

    V1: tuning the full model improves on zero-shot by the task's threshold. V2: with an empty
    middle the tuned model is worse by the task's threshold than the full model tuned, so what is
    asked for sits in the middle. V3: the plug-in beats the tuned emulator (Delta > 0) for every
    method at every budget, and the interval of each paired difference between the plug-ins of
    another system and of `gradot` excludes 0; `random` counts for neither, and V3 is None where
    there is no interval.
    """
    summary, pairs = summarise(result), paired_differences(result)
    checks = {}
    for name, task in result["tasks"].items():
        rows = select(summary, task=name)
        floor = [row for row in rows if row["method"] == EMPTY and row["runs"]]
        if not floor or floor[0]["full_finetuned"] is None:
            continue
        zero, full, empty = (
            floor[0][q].mean for q in ("zero_shot", "full_finetuned", "emulator_finetuned")
        )
        higher = task["higher_is_better"]
        gain = full - zero if higher else 1 - full / zero
        loss = full - empty if higher else empty / full - 1
        left_out = (EMPTY, "random", *REFERENCES)
        others = [r for r in rows if r["method"] not in left_out and r["delta"]]
        checks[name] = {
            "V1": _check(gain, task["validity"]["gain"]),
            "V2": _check(loss, task["validity"]["loss"]),
            "V3": _v3(result, others, select(pairs, task=name)),
        }
    return checks


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value; a value that is not finite spoils both."""
    count = len(values)
    if count == 1 or not all(map(math.isfinite, values)):
        return Estimate(sum(values) / count, None, count)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(count), count)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of at least one observation, with its 95 % interval."""
    found = estimate(values)
    if found.error is None:
        return Interval(found.mean, None, None, found.count)
    reach = t_reach(found)
    return Interval(found.mean, found.mean - reach, found.mean + reach, found.count)


def t_reach(value: Estimate) -> float:
    """Half the width of the 95 % interval of a mean of at least two runs, by Student's t."""
    return float(stdtrit(value.count - 1, (1 + CONFIDENCE) / 2)) * (value.error or 0.0)


def select(rows: Iterable[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    """Rows whose fields have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _rate_found(row: Mapping[str, Any]) -> str:
    """How a rate came about: `given`, `bracketed`, or at an `edge` of those that were tried."""
    if not row["trials"]:
        return "given"
    return "bracketed" if row["bracketed"] else "edge"


def _values(rows: Sequence[Mapping[str, Any]], quantity: str, metric: str) -> list[float]:
    values = {}
    for row in (row for row in rows if row.get(quantity) is not None):
        varies = {name: row[name] for name in QUANTITIES[quantity]}
        if metric in row[quantity]:
            values[varies.get("seed"), varies.get("draw")] = row[quantity][metric]
    return observations(values)


def observations(values: Mapping[tuple[Any, Any], float]) -> list[float]:
    """Independent observations of values by (seed, draw): each draw's mean where there are some."""
    draws: dict[Any, list[float]] = {}
    for (_, draw), value in values.items():
        draws.setdefault(draw, []).append(value)
    if len(draws) > 1:
        return [sum(group) / len(group) for group in draws.values()]
    return list(values.values())


def _partner(
    rows: Sequence[Mapping[str, Any]], other: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    found = [r for r in rows if r["seed"] == other["seed"] and r["draw"] in (other["draw"], None)]
    return found[0] if found else None


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation; None where either is the same throughout."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _check(got: float, threshold: float) -> dict[str, Any]:
    return {"holds": got >= threshold, "got": got, "threshold": threshold}


def _v3(result, rows, pairs) -> dict[str, Any]:
    negative = [f"{r['method']} {r['budget']:g}" for r in rows if not r["delta"].mean > 0]
    others = {r["method"] for r in rows if not same_system(result, r["method"], BASELINE)}
    intervals = {
        f"{p['method']} {p['budget']:g}": p["plug_in"] for p in pairs if p["method"] in others
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
