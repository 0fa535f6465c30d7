"""The demo: a comparison on the bundled model in its quickest setting, shown as one table.

Per seed the full model is tuned once; per method, draw of calibration text and seed the emulator
is tuned and its adapter plugged in, each at the task's own learning rate.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.run import Grid, run_comparison
from gradot_jax.comparison.variants import FLOOR, FULL
from gradot_jax.demo.report import QUANTITIES, bench_validity, draw_plot, summarise, table
from gradot_jax.demo.tasks import FINE_TUNING
from gradot_jax.demo.testbed import bundled_testbed
from gradot_jax.evaluation.record import write_result
from gradot_jax.files.folder import output_folder

VARIANTS = {
    "gradot": "gradot-global",
    "gradot-uniform": "gradot",
    "magnitude": "magnitude",
    "layer-drop": "layer-drop",
    "empty": FLOOR,
}
"""What the demo compares, and its name in a comparison. Global allocation helps GradOT and harms
magnitude selection, so each has the one that suits it."""

_SHARED = ("share_shipped", "gradient_cosine", "gradient_relative_error", "loss_gap")
_PREFIXES = {"top": "", "api": "", "syn": "syn_"}
"""What tells the metrics of one task from those of another in a row that holds all."""


def run_demo(
    out: Path,
    *,
    budget: float = 0.3,
    methods: Sequence[str] = ("gradot", "gradot-uniform", "magnitude", "layer-drop"),
    tasks: Sequence[str] = ("top", "api"),
    seeds: Sequence[int] = (0,),
    draws: Sequence[int] = (0,),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs the comparison and writes `result.json`, `table.md` and `plot.png`.

    Args:
        out: folder to make.
        budget: share of the middle's parameters to keep.
        methods: of `VARIANTS`, to compare.
        tasks: of `top`, `api` and `syn`; `top` is always measured.
        seeds: of fine-tuning.
        draws: of calibration text.
        overwrite: replace an existing folder.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: when `out` may not be written.
    """
    names = {VARIANTS[method]: method for method in dict.fromkeys((*methods, FLOOR))}
    grid = Grid(
        methods=(FULL, *names),
        budgets=(budget,),
        seeds=tuple(seeds),
        draws=tuple(draws),
        rates=(1.0,),
    )
    with output_folder(out, overwrite=overwrite) as folder:
        bed = bundled_testbed(tuple(dict.fromkeys(("top", *tasks))), tuning=FINE_TUNING)
        with tempfile.TemporaryDirectory() as cells:
            comparison = run_comparison(bed, grid, Path(cells))
        result = _result(comparison, names)
        write_result(folder / "result.json", result)
        text = table(summarise(result["rows"]), result["bench"])
        (folder / "table.md").write_text(text)
        draw_plot(folder / "plot.png", result["rows"])
    print(text)
    print(f"{out}: result.json, table.md, plot.png")
    return result


def _result(comparison: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A comparison as the demo shows it: one row for all tasks, under the demo's names."""
    rows = [
        _merged(comparison, compression, names[compression["method"]], seed)
        for compression in comparison["compressions"]
        for seed in comparison["settings"]["seeds"]
    ]
    return {
        "rows": rows,
        "bench": bench_validity(rows),
        "units": {
            "perplexity": "per token, reference prose",
            "exact_match": "percent, API facts",
            "syn_exact_match": "percent, made-up people",
            "delta": "positive where the plug-in is better than the tuned emulator",
        },
        "environment": comparison["environment"],
        "seconds": comparison["seconds"],
    }


def _merged(
    comparison: Mapping[str, Any], compression: Mapping[str, Any], name: str, seed: int
) -> dict[str, Any]:
    same = {field: compression[field] for field in ("method", "budget", "draw")} | {"seed": seed}
    rows = [r for r in comparison["rows"] if all(r[f] == value for f, value in same.items())]
    return {
        "method": name,
        "budget": compression["budget"] or 0.0,
        **{field: compression[field] for field in _SHARED},
        "seed": seed,
        "calibration_draw": compression["draw"],
        **{
            quantity: {
                _PREFIXES[row["task"]] + metric: value
                for row in rows
                for metric, value in row[quantity].items()
            }
            for quantity in QUANTITIES
        },
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
    }
