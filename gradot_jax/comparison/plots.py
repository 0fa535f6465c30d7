"""Plots of a comparison."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradot_jax.comparison.summary import planned, select, summarise, summarise_compressions
from gradot_jax.comparison.variants import REFERENCES

_MARKERS = "osDvP*X<>"


def draw_utility_privacy(path: Path, result: Mapping[str, Any]) -> None:
    """Plug-in over tuned emulator, a panel per task, a marker per method and budget."""
    summary = [row for row in summarise(result) if row["plug_in"] and row["emulator_finetuned"]]
    tasks = [name for name in result["tasks"] if select(summary, task=name)]
    if not tasks:
        return
    pyplot = _pyplot()
    size = (5.2 * len(tasks) + 2, 4.6)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False)
    colours = _colours(result)
    for axis, name in zip(axes[0], tasks, strict=True):
        task = result["tasks"][name]
        for row in select(summary, task=name):
            tuned, plugged = row["emulator_finetuned"], row["plug_in"]
            budget = "" if row["budget"] is None else f" {row['budget']:g}"
            axis.errorbar(
                tuned.mean,
                plugged.mean,
                xerr=tuned.error,
                yerr=plugged.error,
                fmt=_marker(result, row["budget"]),
                color=colours[row["method"]],
                label=f"{row['method']}{budget}",
            )
        full = [row["full_finetuned"] for row in select(summary, task=name)]
        if full[0] is not None:
            axis.axhline(full[0].mean, color="grey", linestyle="--", label="full model tuned")
        limits = axis.get_xlim()
        plugged = select(summary, task=name)[0]["plug_in"].mean
        axis.axline((plugged, plugged), slope=1, color="lightgrey", label="Delta = 0")
        axis.set_xlim(limits)
        axis.set_xlabel("emulator tuned (what the data owner holds)")
        axis.set_ylabel("plug-in (what the model's owner gets)")
        axis.set_title(task["label"], fontsize=10)
        if not task["higher_is_better"]:
            axis.invert_xaxis()
            axis.invert_yaxis()
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(pyplot, figure, path)


def draw_gradient_error(path: Path, result: Mapping[str, Any]) -> None:
    """Relative error of the adapter's gradient against the budget, a line per method."""
    summary = [row for row in summarise_compressions(result) if row["budget"] is not None]
    if not summary:
        return
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.6))
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
    _save(pyplot, figure, path)


def draw_kept(path: Path, result: Mapping[str, Any]) -> None:
    """Mean rank and number of channels per layer, at the smallest budget and on the first draw.

    A dropped layer has neither, a layer that is kept whole has as many as the widest.
    """
    budgets = [c["budget"] for c in result["compressions"] if c["budget"] is not None]
    if not budgets:
        return
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6))
    colours = _colours(result)
    drawn = set()
    for compression in select(result["compressions"], budget=min(budgets)):
        layers = [kept for kept in compression["kept"] if "ranks" in kept]
        if not layers or compression["method"] in drawn:
            continue
        drawn.add(compression["method"])
        places = [kept["layer"] for kept in layers]
        full = result["model"]["width"]
        ranks = [
            np.mean([full if rank is None else rank for rank in kept["ranks"].values()])
            for kept in layers
        ]
        style = {"color": colours[compression["method"]], "label": compression["method"]}
        axes[0].plot(places, ranks, marker="o", **style)
        axes[1].plot(places, [kept["channels"] for kept in layers], marker="o", **style)
    for axis, label in zip(axes, ("mean rank of attention", "channels of the MLP"), strict=True):
        axis.set_xlabel("layer")
        axis.set_ylabel(f"{label}, budget {min(budgets):g}")
        axis.set_ylim(bottom=0)
    if drawn:
        axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(pyplot, figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot, figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _colours(result: Mapping[str, Any]) -> dict[str, Any]:
    methods = [name for name, _ in planned(result) if name not in REFERENCES]
    shades = _pyplot().get_cmap("tab20").colors
    return {name: shades[i % 20] for i, name in enumerate(dict.fromkeys(methods))}


def _marker(result: Mapping[str, Any], budget: float | None) -> str:
    budgets = sorted({b for _, b in planned(result) if b is not None}, reverse=True)
    return "x" if budget is None else _MARKERS[budgets.index(budget) % len(_MARKERS)]
