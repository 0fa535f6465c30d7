"""Table and plot of `scripts/real_model.sh`, from what `gradot evaluate` wrote.

python scripts/real_model_table.py OUT BUDGET METHOD...
"""

import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure


def measured(path: Path) -> tuple[float, float, float]:
    """Exact match and its 95 % half-width in percent, and nats of the right answer."""
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    share, count = metrics["exact_match"], metrics["num_examples"]
    # Half the width of Wilson's interval, which is not nothing where nothing matches.
    z = 1.96
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return 100 * share, 100 * reach, metrics["log_likelihood"]


def main(out: Path, budget: str, methods: list[str]) -> None:
    """Writes `table.md` and `result.png`, and prints the table."""
    untuned, _, likelihood = measured(out / "untuned.json")
    lines = [
        "| method | emulator tuned | plug-in | Delta | plug-in, nats |",
        "|---|---:|---:|---:|---:|",
    ]
    figure = Figure(figsize=(5, 4), layout="tight")
    axis = figure.subplots()
    for place, method in enumerate(methods):
        tuned, plugged = (
            measured(out / f"{method}-{part}.json") for part in ("emulator", "plug-in")
        )
        lines.append(
            f"| `{method}` | {tuned[0]:.1f} ± {tuned[1]:.1f} | {plugged[0]:.1f} ± {plugged[1]:.1f} "
            f"| {plugged[0] - tuned[0]:+.1f} | {plugged[2]:.2f} |"
        )
        for shift, colour, label, (value, reach, _) in (
            (-0.2, "lightgrey", "emulator tuned", tuned),
            (0.2, "tab:blue", "plug-in", plugged),
        ):
            shown = label if place == 0 else None
            axis.bar(place + shift, value, 0.38, yerr=reach, color=colour, label=shown, capsize=3)
    lines += [
        "",
        "Exact match in percent with the 95 % interval of the test items, one run, budget "
        f"{budget}; the untuned model: {untuned:.1f}, {likelihood:.2f} nats.",
    ]
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("city: exact match, %")
    axis.legend()
    figure.savefig(out / "result.png", dpi=120)
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
