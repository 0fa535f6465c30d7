"""What the rows of a comparison say: means over runs, and differences paired by seed.

Runs on one draw of calibration text share that draw, so with several draws each draw's mean is
one observation; with one draw each seed is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradot_jax.comparison.statistics import estimate, paired_interval
from gradot_jax.comparison.variants import BASELINE

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
    "share_shipped",
    "share_verbatim",
    "gradient_cosine",
    "gradient_relative_error",
    "gradient_norm_ratio",
    "loss_gap",
    "seconds",
    "added_host_bytes",
)
PAIRED = ("plug_in", "emulator_finetuned", "delta")


def planned(result: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Methods and budgets of the grid, finished or not."""
    return list(dict.fromkeys((s["method"], s["budget"]) for s in result["subjects"]))


def summarise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task, method and budget: each quantity's `Estimate` over seeds and draws.

    A quantity that was not measured is None; a row without a run has `runs` 0.
    """
    summary = []
    for name, task in result["tasks"].items():
        for method, budget in planned(result):
            rows = select(result["rows"], task=name, method=method, budget=budget)
            row = {"task": name, "method": method, "budget": budget, "runs": len(rows)}
            row["learning_rate"] = rows[0]["learning_rate"] if rows else None
            row["untuned"] = sum(r.get("best_step") == 0 for r in rows)
            values = {q: _values(rows, q, task["metric"]) for q in QUANTITIES}
            summary.append(row | {q: estimate(v) if v else None for q, v in values.items()})
    return summary


def summarise_compressions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per compressed method and budget: each cost's `Estimate` over draws."""
    summary = []
    for method, budget in planned(result):
        found = select(result["compressions"], method=method, budget=budget)
        if found:
            values = {c: [f[c] for f in found if f[c] is not None] for c in COSTS}
            costs = {c: estimate(v) if v else None for c, v in values.items()}
            summary.append({"method": method, "budget": budget, "draws": len(found)} | costs)
    return summary


def paired_differences(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each method against `gradot` at equal budget, seed and draw; positive is better.

    A difference of Delta is positive where the method's Delta is larger. A method that reads no
    calibration text is paired with every draw.
    """
    differences = []
    for name, task in result["tasks"].items():
        for method, budget in planned(result):
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
                row[quantity] = paired_interval(_observations(gaps))
            differences += [row] if pairs else []
    return differences


def select(rows: Iterable[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    """Rows whose fields have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _values(rows: Sequence[Mapping[str, Any]], quantity: str, metric: str) -> list[float]:
    varies = QUANTITIES[quantity]
    measured = [row for row in rows if row.get(quantity) is not None]
    values = {}
    for row in measured:
        seed, draw = (row[name] if name in varies else None for name in ("seed", "draw"))
        values[seed, draw] = row[quantity][metric]
    return _observations(values)


def _observations(values: Mapping[tuple[Any, Any], float]) -> list[float]:
    """Independent observations of values by (seed, draw): means of draws where there are some."""
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
