"""The demo: a comparison on the bundled model in its quickest setting.

The full model is tuned once a seed; per method, draw of calibration text and seed the emulator is
tuned and its adapter plugged in, each at the task's own learning rate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradot_jax.comparison.run import Grid, run_comparison
from gradot_jax.comparison.variants import FLOOR, FULL
from gradot_jax.demo.tasks import FINE_TUNING
from gradot_jax.demo.testbed import bundled_testbed


def run_demo(
    out: Path,
    *,
    budget: float,
    methods: Sequence[str],
    tasks: Sequence[str],
    seeds: int = 1,
    draws: int = 1,
) -> dict[str, Any]:
    """Runs the comparison, with the upper bound and the floor, and writes its report.

    Args:
        out: folder to make, or to go on with.
        budget: share of the middle's parameters to keep.
        methods: of `comparison.variants.VARIANTS`.
        tasks: of `top`, `api` and `syn`.
        seeds: fine-tuning runs of each method and task.
        draws: draws of calibration text.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: for an unknown method, or a budget out of range.
    """
    grid = Grid(
        methods=tuple(dict.fromkeys((FULL, *methods, FLOOR))),
        budgets=(budget,),
        seeds=tuple(range(seeds)),
        draws=tuple(range(draws)),
        rates=(1.0,),
    )
    return run_comparison(bundled_testbed(tasks, tuning=FINE_TUNING), grid, out)
