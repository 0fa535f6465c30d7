"""Plots of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.figure import Figure

from gradot_jax.comparison.frontier import frontiers
from gradot_jax.comparison.stages import REFERENCES
from gradot_jax.comparison.summary import (
    Estimate,
    planned,
    select,
    summarise,
    summarise_compressions,
    t_reach,
)
from gradot_jax.models.split import AdapterSpec

_MARKERS = "osDvP*X<>"


def draw_frontier(path: Path, result: Mapping[str, Any]) -> None:
    """Plug-in over tuned emulator: a panel per task, a line per method through its budgets.

    Bars are 95 % intervals over seeds or draws. Up and to the left is better; what lies below and
    to the right of a line is what its method dominates.
    """
    summary = [row for row in summarise(result) if row["plug_in"] and row["emulator_finetuned"]]
    tasks = [name for name in result["tasks"] if select(summary, task=name)]
    if not tasks:
        return
    areas = frontiers(result)
    figure = Figure(figsize=(7.6 * len(tasks), 4.8), layout="tight")
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for axis, name in zip(axes[0], tasks, strict=True):
        own = {row["method"]: row["area"].mean for row in select(areas, task=name)}
        _draw_task(axis, result, name, select(summary, task=name), own)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)


def _draw_task(
    axis: Any,
    result: Mapping[str, Any],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    areas: Mapping[str, float],
) -> None:
    task, colours = result["tasks"][name], _colours(result)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted(select(rows, method=method), key=lambda row: -(row["budget"] or 0))
        colour = colours[method]
        label = f"{method}, {areas[method]:.2f}" if method in areas else method
        line = [[row[q].mean for row in own] for q in ("emulator_finetuned", "plug_in")]
        axis.plot(*line, color=colour, linewidth=1, alpha=0.7, label=label)
        for row in own:
            tuned, plugged = row["emulator_finetuned"], row["plug_in"]
            axis.errorbar(
                tuned.mean,
                plugged.mean,
                xerr=_reach(tuned),
                yerr=_reach(plugged),
                fmt=_marker(result, row["budget"]),
                color=colour,
            )
    for budget in sorted({row["budget"] for row in rows if row["budget"] is not None}):
        axis.plot([], [], _marker(result, budget), color="grey", label=f"budget {budget:g}")
    full = [row["full_finetuned"] for row in rows if row["full_finetuned"]]
    if full:
        axis.axhline(full[0].mean, color="grey", linestyle="--", label="full model tuned")
    limits = axis.get_xlim()
    plugged = rows[0]["plug_in"].mean
    axis.axline((plugged, plugged), slope=1, color="lightgrey", label="Delta = 0")
    axis.set_xlim(limits)
    axis.set_xlabel("emulator tuned (what the data owner holds)")
    axis.set_ylabel("plug-in (what the model owner gets)")
    axis.set_title(f"{task['label']}; area dominated in the legend", fontsize=9)
    if not task["higher_is_better"]:
        axis.invert_xaxis()
        axis.invert_yaxis()


def _reach(value: Estimate) -> float | None:
    return None if value.error is None else t_reach(value)


def draw_gradient_error(path: Path, result: Mapping[str, Any]) -> None:
    """Relative error of the adapter's gradient against the budget, a line per method."""
    summary = [row for row in summarise_compressions(result) if row["budget"] is not None]
    if not summary:
        return
    figure = Figure(figsize=(7, 4.6), layout="tight")
    axis = figure.subplots()
    for method, colour in _colours(result).items():
        rows = sorted(select(summary, method=method), key=lambda row: row["budget"])
        if rows:
            errors = [row["gradient_relative_error"].mean for row in rows]
            budgets = [row["budget"] for row in rows]
            axis.plot(budgets, errors, marker="o", color=colour, label=method)
    axis.set_xlabel("budget, share of the middle kept")
    axis.set_ylabel("relative error of the adapter's gradient")
    axis.set_yscale("log")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)


def draw_kept(path: Path, result: Mapping[str, Any]) -> None:
    """Mean rank and number of channels, a row per method and a column per layer.

    At the smallest budget and on the first draw. A layer that is dropped, or that a harmonizer
    stands in for, has neither; the adapter's blocks are left blank.
    """
    budgets = [c["budget"] for c in result["compressions"] if c["budget"] is not None]
    if not budgets:
        return
    found = select(result["compressions"], budget=min(budgets))
    first = {c["method"]: c for c in reversed(found)}
    methods = list(reversed(first))
    kept = np.array([_kept_per_layer(result, first[method]) for method in methods])
    figure = Figure(figsize=(13, 1.4 + 0.35 * len(methods)), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    labels = ("mean rank of attention", "channels of the MLP")
    for axis, label, values in zip(axes, labels, np.moveaxis(kept, 1, 0), strict=True):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", vmin=0)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_xlabel("layer")
        axis.set_title(f"{label}, budget {min(budgets):g}", fontsize=10)
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)


def _kept_per_layer(result: Mapping[str, Any], compression: Mapping[str, Any]) -> np.ndarray:
    """Mean ranks and channels `[2, L]`, NaN at the adapter's blocks."""
    model, adapter = result["model"], compression["adapter"]
    split = AdapterSpec(**{**adapter, "inner": tuple(adapter["inner"])})
    values = np.full((2, model["layers"]), np.nan)
    values[:, list(split.middle_layers(model["layers"]))] = 0
    for layer in (kept for kept in compression["kept"] if "ranks" in kept):
        ranks = [model["width"] if rank is None else rank for rank in layer["ranks"].values()]
        values[:, layer["layer"]] = np.mean(ranks), layer["channels"]
    return values


def _colours(result: Mapping[str, Any]) -> dict[str, Any]:
    methods = [name for name, _ in planned(result) if name not in REFERENCES]
    shades = color_sequences["tab20"]
    return {name: shades[i % 20] for i, name in enumerate(dict.fromkeys(methods))}


def _marker(result: Mapping[str, Any], budget: float | None) -> str:
    budgets = sorted({b for _, b in planned(result) if b is not None}, reverse=True)
    return "x" if budget is None else _MARKERS[budgets.index(budget) % len(_MARKERS)]
