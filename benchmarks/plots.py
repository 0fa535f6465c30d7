"""Plots of how costs grow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_growth(folder: Path, growth: Mapping[str, Any]) -> list[Path]:
    """Seconds over each quantity that was varied, a file for each.

    Args:
        folder: of the files, `growth-<quantity>.png`.
        growth: the study's record.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for quantity, slopes in growth["exponents"].items():
        points = [point for point in growth["points"] if point["quantity"] == quantity]
        values = [point["value"] for point in points]
        figure, axis = pyplot.subplots(figsize=(4.2, 3.4))
        for phase, slope in slopes.items():
            seconds = [point["seconds"][phase] for point in points]
            axis.loglog(values, seconds, "o-", label=f"{phase.replace('_', ' ')}: {slope:.2f}")
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axis.minorticks_off()
        axis.set_xlabel(quantity)
        axis.set_ylabel("seconds")
        axis.legend(fontsize=7, title="exponents", title_fontsize=7)
        figure.tight_layout()
        path = folder / f"growth-{quantity}.png"
        figure.savefig(path, dpi=90, metadata={"Software": None})
        pyplot.close(figure)
        paths.append(path)
    return paths
