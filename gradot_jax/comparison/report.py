"""The report of a comparison: `result.json`, Markdown tables and plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.frontier import frontiers
from gradot_jax.comparison.plots import draw_frontier, draw_gradient_error, draw_kept
from gradot_jax.comparison.stages import BASELINE
from gradot_jax.comparison.summary import (
    PAIRED,
    QUANTITIES,
    Estimate,
    Interval,
    paired_differences,
    predictions,
    select,
    summarise,
    summarise_compressions,
    validity,
)
from gradot_jax.evaluation.record import write_result


def write_tables(out: Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json` and `table.md` of a comparison into a folder."""
    derived = {
        "summary": list(map(_spelled, summarise(result))),
        "paired": list(map(_spelled, paired_differences(result))),
        "predictions": predictions(result),
        "frontiers": list(map(_spelled, frontiers(result))),
        "validity": validity(result),
    }
    write_result(out / "result.json", {**result, **derived})
    (out / "table.md").write_text(report(result), encoding="utf-8")


def write_plots(out: Path, result: Mapping[str, Any]) -> None:
    """Writes `frontier.png`, `gradient_error.png` and `kept.png`, those that have data."""
    draw_frontier(out / "frontier.png", result)
    draw_gradient_error(out / "gradient_error.png", result)
    draw_kept(out / "kept.png", result)


def report(result: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    summary, areas = summarise(result), frontiers(result)
    parts = []
    for name, task in result["tasks"].items():
        better = "higher" if task["higher_is_better"] else "lower"
        planned = select(summary, task=name)
        rows = [row for row in planned if row["runs"]]
        parts.append(f"**{task['label']}** ({better} is better)")
        parts += [task_table(rows)] if rows else []
        if waiting := [_label(row) for row in planned if not row["runs"]]:
            parts.append(f"Not run: {', '.join(waiting)}.")
        untuned = [f"{_label(r)} ({r['untuned']} of {r['runs']})" for r in rows if r["untuned"]]
        if untuned:
            parts.append(
                "Tuning improved no development loss, so the adapter is as it was shipped: "
                + ", ".join(untuned)
            )
        parts += [line] if (line := _rates_line(rows)) else []
        if own := select(areas, task=name):
            parts.append(f"Area that a method dominates:\n\n{frontier_table(own)}")
    parts.append(f"**compression**\n\n{compression_table(result)}")
    if found := predictions(result):
        parts.append(
            "**what is known before fine-tuning** against the plug-in: Spearman's rank correlation "
            f"over methods and budgets\n\n{prediction_table(found)}"
        )
    if pairs := paired_differences(result):
        parts.append(
            f"**against {BASELINE}**, at equal budget, seed and draw (95 % interval over "
            f"{_observed(result)}; positive is better, for Delta larger)\n\n{paired_table(pairs)}"
        )
    if checks := validity(result):
        parts.append(validity_lines(checks))
    parts += [f"{label} was not run: {why}" for label, why in result["failures"].items()]
    if result["missing"]:
        parts.append(f"{result['missing']} of the planned runs are missing.")
    if len(result["codes"]) > 1:
        runs = ", ".join(f"{count} by {code}" for code, count in result["codes"].items())
        parts.append(f"The runs are of {len(result['codes'])} versions of the code: {runs}.")
    if result["again"]:
        parts.append(
            f"Tuned and measured again by the code as it is:\n\n{again_table(result['again'])}"
        )
    return "\n\n".join(parts) + "\n"


def again_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Units that were measured by other code, as they were and as they are now."""
    titles = ["method", "budget", "task", "seed", "quantity", "then", "now"]
    cells = [
        [
            row["method"],
            _budget(row["budget"]),
            row["task"],
            str(row["seed"]),
            row["quantity"].replace("_", " "),
            f"{row['then']:.2f}",
            f"{row['now']:.2f}",
        ]
        for row in rows
    ]
    return markdown(titles, cells)


def _rates_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether every learning rate that was searched for lies between two that are no better."""
    searched = [row for row in rows if row["rate"] in ("bracketed", "edge")]
    at_edge = [_label(row) for row in searched if row["rate"] == "edge"]
    if at_edge:
        return f"Learning rates at an edge of those that were tried: {', '.join(at_edge)}."
    return "Every learning rate lies between two that were no better." if searched else ""


def frontier_table(areas: Sequence[Mapping[str, Any]]) -> str:
    """The dominated areas of one task with their intervals over seeds or draws."""
    titles = ["method", "budgets", "area", "runs"]
    cells = [
        [
            row["method"],
            ", ".join(map(_budget, row["budgets"])),
            _interval(row["area"], "{:.3f}"),
            str(row["area"].count),
        ]
        for row in areas
    ]
    return markdown(titles, cells)


def task_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Quantities and Delta of rows that have runs: means and standard errors."""
    nats = [f"{q}_nats" for q in PAIRED if any(row[f"{q}_nats"] for row in rows)]
    quantities = [*QUANTITIES, *nats]
    titles = ["method", "budget", "rate", *(q.replace("_", " ") for q in quantities), "runs"]
    cells = []
    for row in rows:
        values = [_estimate(row[q], 2 if q in nats else 1) for q in quantities]
        rate = f"{row['learning_rate']:.2g}"
        cells.append([row["method"], _budget(row["budget"]), rate, *values, str(row["runs"])])
    return markdown(titles, cells)


def compression_table(result: Mapping[str, Any]) -> str:
    """What each compression ships, how true its gradient is and what it cost."""
    columns: dict[str, tuple[str, Callable[[Estimate | None], str]]] = {
        "share_shipped": ("shipped", _percent),
        "share_verbatim": ("verbatim", _percent),
        "gradient_cosine": ("grad. cosine", lambda e: _estimate(e, 3)),
        "gradient_relative_error": ("grad. rel. error", lambda e: _estimate(e, 3)),
        "gradient_norm_ratio": ("norm ratio", lambda e: _estimate(e, 2)),
        "loss_gap": ("loss gap, nats", lambda e: _estimate(e, 3)),
        "plug_in_gain": ("plug-in gain, nats", lambda e: _estimate(e, 3)),
        "seconds": ("seconds, with compilation", lambda e: _estimate(e, 1)),
        "added_host_bytes": ("host memory added, MiB", _mebibytes),
    }
    titles = ["method", "budget", *(title for title, _ in columns.values())]
    cells = [
        [row["method"], _budget(row["budget"]), *(f(row[c]) for c, (_, f) in columns.items())]
        for row in summarise_compressions(result)
    ]
    return markdown(titles, cells)


def prediction_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Rank correlations of `predictions`."""
    titles = ["task", "quantity", "with the metric", "with nats", "emulators"]
    cells = [
        [
            p["task"],
            p["quantity"].replace("_", " "),
            *("-" if p[rho] is None else f"{p[rho]:+.2f}" for rho in ("rho", "rho_nats")),
            str(p["emulators"]),
        ]
        for p in found
    ]
    return markdown(titles, cells)


def paired_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Differences from the baseline with their intervals."""
    titles = ["task", "method", "budget", *(q.replace("_", " ") for q in PAIRED), "pairs"]
    cells = [
        [p["task"], p["method"], _budget(p["budget"])]
        + [_interval(p[q]) for q in PAIRED]
        + [str(p["plug_in"].count)]
        for p in pairs
    ]
    return markdown(titles, cells)


def validity_lines(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """V1 to V3 of each task, one line each."""
    lines = []
    for task, check in checks.items():
        for name in ("V1", "V2"):
            verdict = "holds" if check[name]["holds"] else "FAILS"
            figures = f"{check[name]['got']:.3g}, needs {check[name]['threshold']:g}"
            lines.append(f"- {task}: {name} {verdict} ({figures})")
        v3 = check["V3"]
        notes = [
            f"{label}: {', '.join(v3[key])}"
            for key, label in (
                ("delta_not_positive", "Delta not positive"),
                ("level_with_gradot", f"level with {BASELINE}"),
                ("not_tested", "one run"),
            )
            if v3[key]
        ]
        verdict = {True: "holds", False: "FAILS", None: "not tested"}[v3["holds"]]
        lines.append(f"- {task}: V3 {verdict}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "\n".join(lines)


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of even width."""
    rows = [list(titles), *map(list, cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['method']} {_budget(row['budget'])}".removesuffix(" -")


def _observed(result: Mapping[str, Any]) -> str:
    draws = {row["draw"] for row in result["rows"]} - {None}
    return "draws" if len(draws) > 1 else "seeds, on one draw"


def _estimate(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value.mean):
        return "diverged"
    shown = f"{value.mean:.{digits}f}"
    return shown if value.error is None else f"{shown} ± {value.error:.{digits}f}"


def _interval(value: Interval, form: str = "{:+.2f}") -> str:
    if value.low is None or value.high is None:
        return form.format(value.mean)
    mean, low, high = map(form.format, (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _percent(value: Estimate | None) -> str:
    return "-" if value is None else f"{100 * value.mean:.1f} %"


def _mebibytes(value: Estimate | None) -> str:
    return "-" if value is None else f"{round(value.mean / 2**20)}"


def _budget(budget: float | None) -> str:
    return "-" if budget is None else f"{budget:g}"


def _spelled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Estimate | Interval) else value
        for name, value in row.items()
    }
