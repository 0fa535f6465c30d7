"""What the demo shows: whether the bench is valid, a table and a plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.report import markdown
from gradot_jax.comparison.statistics import estimate

QUANTITIES = (
    "zero_shot",
    "full_finetuned",
    "emulator_zero_shot",
    "emulator_finetuned",
    "plug_in",
    "delta",
)
_LABELS = {
    "perplexity": "prose, perplexity (lower is better)",
    "exact_match": "API facts, exact match %",
    "syn_exact_match": "made-up people, exact match %",
}


def bench_validity(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the comparison means something: V1, V2 and V3, on means over seeds and draws.

    V1: tuning the full model lowers perplexity by at least 25 % and raises exact match by at
    least 50 points. V2: with an empty middle the tuned model is at least 1.8 times worse in
    perplexity and 40 points in exact match, so what is asked for sits in the middle. V3: plug-in
    beats the tuned emulator (Delta > 0) on prose for every method at its budget, and other methods
    differ from GradOT by more than twice the standard error over seeds, where there are several.

    Args:
        rows: of a result, with `empty` among the methods.
    """
    means = {row["method"]: row for row in summarise(rows)}
    floor = means.pop("empty")
    zero, full = floor["zero_shot"], floor["full_finetuned"]
    empty = floor["emulator_finetuned"]
    v1 = {"perplexity_reduction": 1 - full["perplexity"][0] / zero["perplexity"][0]}
    v2 = {"perplexity_ratio": empty["perplexity"][0] / full["perplexity"][0]}
    v1_holds, v2_holds = v1["perplexity_reduction"] >= 0.25, v2["perplexity_ratio"] >= 1.8
    if "exact_match" in full:
        v1["exact_match_gain"] = full["exact_match"][0] - zero["exact_match"][0]
        v2["exact_match_loss"] = full["exact_match"][0] - empty["exact_match"][0]
        v1_holds &= v1["exact_match_gain"] >= 50
        v2_holds &= v2["exact_match_loss"] >= 40
    delta = {name: row["delta"]["perplexity"][0] for name, row in means.items()}
    gaps = {name: _paired_gap(rows, name) for name in means if not name.startswith("gradot")}
    tested = any(error > 0 for _, error in gaps.values())
    apart = all(abs(gap) > 2 * error for gap, error in gaps.values())
    v3 = {
        "delta_perplexity": delta,
        "plug_in_perplexity_above_gradot": gaps,
        "noise_tested": tested,
    }
    return {
        "V1": {"holds": bool(v1_holds), **v1},
        "V2": {"holds": bool(v2_holds), **v2},
        "V3": {"holds": apart and all(d > 0 for d in delta.values()), **v3},
    }


def _paired_gap(rows: Sequence[dict[str, Any]], method: str) -> tuple[float, float]:
    """How much worse a method's plug-in is than GradOT's at the same seed: mean, standard error."""
    other = {row["seed"]: row["plug_in"]["perplexity"] for row in rows if row["method"] == method}
    ours = [(r["seed"], r["plug_in"]["perplexity"]) for r in rows if r["method"] == "gradot"]
    return _mean([other[seed] - perplexity for seed, perplexity in ours]) if ours else (0.0, 0.0)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and budget: (mean, standard error) over seeds and draws."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    summary = []
    for (method, budget), members in groups.items():
        row: dict[str, Any] = {"method": method, "budget": budget, "runs": len(members)}
        for name in ("share_shipped", "gradient_cosine", "gradient_relative_error", "loss_gap"):
            row[name] = _mean([member[name] for member in members])
        for quantity in QUANTITIES:
            names = members[0][quantity]
            row[quantity] = {n: _mean([m[quantity][n] for m in members]) for n in names}
        summary.append(row)
    return summary


def _mean(values: Sequence[float]) -> tuple[float, float]:
    mean, error, _ = estimate(values)
    return mean, error or 0.0


def table(summary: Sequence[dict[str, Any]], bench: dict[str, Any]) -> str:
    """The result as Markdown: one table per metric, and the checks V1 to V3."""
    lines = []
    for metric, label in _LABELS.items():
        if metric in summary[0]["plug_in"]:
            lines += [f"**{label}**", "", *_metric_table(summary, metric), ""]
    for name, check in bench.items():
        figures = ", ".join(f"{k} {v:.3g}" for k, v in check.items() if isinstance(v, float))
        lines.append(f"{name} {'holds' if check['holds'] else 'FAILS'} {figures}".rstrip())
    return "\n".join(lines) + "\n"


def _metric_table(summary: Sequence[dict[str, Any]], metric: str) -> list[str]:
    columns = ["method", "budget", "shipped", "grad. cosine", "grad. rel. error"]
    columns += [quantity.replace("_", " ") for quantity in QUANTITIES]
    cells = []
    for row in summary:
        figures = [_shown(row["gradient_cosine"], 3), _shown(row["gradient_relative_error"], 3)]
        share = f"{100 * row['share_shipped'][0]:.0f} %"
        values = [_shown(row[quantity][metric], 1) for quantity in QUANTITIES]
        cells.append([row["method"], f"{row['budget']:g}", share, *figures, *values])
    return markdown(columns, cells).splitlines()


def _shown(value: tuple[float, float], digits: int) -> str:
    mean, error = value
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def draw_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Utility against privacy: plug-in over tuned emulator, one marker per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [metric for metric in _LABELS if metric in rows[0]["plug_in"]]
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 4.6))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["method"] for r in rows))}
    for axis, metric in zip(axes if len(metrics) > 1 else [axes], metrics, strict=True):
        for method, colour in colours.items():
            runs = [row for row in rows if row["method"] == method]
            axis.scatter(
                [row["emulator_finetuned"][metric] for row in runs],
                [row["plug_in"][metric] for row in runs],
                color=colour,
                label=method,
            )
        full = statistics.fmean(row["full_finetuned"][metric] for row in rows)
        axis.axhline(full, color="grey", linestyle="--", label="full model tuned")
        limits = axis.get_xlim()
        axis.axline((full, full), slope=1, color="lightgrey", label="plug-in = tuned emulator")
        axis.set_xlim(limits)
        axis.set_xlabel("emulator tuned (what the data owner holds)")
        axis.set_ylabel("plug-in (what the model's owner gets)")
        axis.set_title(_LABELS[metric], fontsize=10)
        if metric == "perplexity":
            axis.invert_xaxis()
            axis.invert_yaxis()
    axes_list = axes if len(metrics) > 1 else [axes]
    axes_list[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
