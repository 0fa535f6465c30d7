"""How much a plug-in is worth for what the emulator gives away: the area that a method dominates.

Both are put on one scale, 0 for the untuned model and 1 for the full model tuned, perplexities by
their logarithm. An emulator that is worth e and a plug-in that is worth u dominate all that gives
away more and is worth less, the rectangle from (e, 0) to (1, u); a method dominates what its
budgets do together. Its least area is 0, the largest 1, and the line Delta = 0 reaches 1/2.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradot_jax.comparison.stages import EMPTY, REFERENCES
from gradot_jax.comparison.summary import mean_interval, observations, planned, select


def dominated_area(points: Sequence[tuple[float, float]]) -> float:
    """Area of the union of the rectangles from `(e, 0)` to `(1, u)`; of pairs `(e, u)`."""
    area, best, last = 0.0, 0.0, 0.0
    for given, worth in sorted(points):
        area += best * (given - last)
        best, last = max(best, worth), given
    return area + best * (1 - last)


def worth(value: float, zero: float, full: float, *, higher: bool) -> float:
    """A metric on the scale from the untuned model to the full model tuned, cut to [0, 1].

    Args:
        value: of the metric.
        zero: of the untuned model.
        full: of the full model, tuned.
        higher: whether higher is better; a perplexity is better when it is lower.
    """
    if not math.isfinite(value) or (not higher and value <= 0):
        return 0.0
    if not higher:
        value, zero, full = (-math.log(number) for number in (value, zero, full))
    if full <= zero:
        return 0.0
    return min(max((value - zero) / (full - zero), 0.0), 1.0)


def frontiers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dominated area of every method on every task, by runs that have all its budgets.

    Returns:
        Rows of `task`, `method`, `budgets` and `area`, an `Interval` over seeds or draws; the
        largest area of a task first.
    """
    found = []
    for name, task in result["tasks"].items():
        methods = dict.fromkeys(method for method, _ in planned(result, name))
        rows = [
            {"task": name, "method": method, **area}
            for method in methods
            if method not in (*REFERENCES, EMPTY) and (area := _area(result, name, task, method))
        ]
        found += sorted(rows, key=lambda row: -row["area"].mean)
    return found


def _area(
    result: Mapping[str, Any], name: str, task: Mapping[str, Any], method: str
) -> dict[str, Any] | None:
    rows = [
        row
        for row in select(result["rows"], task=name, method=method)
        if row.get("full_finetuned") and row.get("plug_in") and _has_ends(row, task)
    ]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    runs: dict[tuple[Any, Any], list[tuple[float, float]]] = {}
    for row in rows:
        runs.setdefault((row["seed"], row["draw"]), []).append(_point(row, task))
    whole = {key: dominated_area(p) for key, p in runs.items() if len(p) == len(budgets)}
    if not whole:
        return None
    area = mean_interval(observations(whole))
    return {"budgets": budgets, "area": area}


def _has_ends(row: Mapping[str, Any], task: Mapping[str, Any]) -> bool:
    """Whether the scale has two ends: a reference that diverged is none."""
    ends = [row[name][task["metric"]] for name in ("zero_shot", "full_finetuned")]
    return all(map(math.isfinite, ends)) and (task["higher_is_better"] or min(ends) > 0)


def _point(row: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[float, float]:
    metric, higher = task["metric"], task["higher_is_better"]
    ends = (row["zero_shot"][metric], row["full_finetuned"][metric])
    emulator, plugged = (
        worth(row[name][metric], *ends, higher=higher) for name in ("emulator_finetuned", "plug_in")
    )
    return emulator, plugged
