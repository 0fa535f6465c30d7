"""Prints the committed results as Markdown tables.

python -m benchmarks.report
"""

import argparse
from pathlib import Path
from typing import Any

from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json

_RESULTS = Path(__file__).with_name("results")
_COLUMNS = (
    "phase",
    "median",
    "min",
    "compile",
    "gradients",
    "tokens/s",
    "program temp",
    "peak RSS",
    "of the floor",
)


def table(result: dict[str, Any]) -> str:
    """The table of one result, under a line that says what and where was measured."""
    rows = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1))]
    rows += [_row(name, record) for name, record in result["phases"].items()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if left_out := result.get("left_out"):
        lines += ["", f"Left out for want of time: {', '.join(left_out)}."]
    return "\n".join([_heading(result), "", *lines])


def _heading(result: dict[str, Any]) -> str:
    shape, environment, rates = result["workload"], result["environment"], result["rates"]
    blocks = " + ".join(str(shape[f"num_{part}"]) for part in ("bottom", "middle", "top"))
    return (
        f"**{shape['name']}**: {blocks} blocks, D {shape['width']}, F {shape['ffn']}, "
        f"V {shape['vocabulary']}, batches of {shape['batch_size']} x {shape['length']} tokens, "
        f"{shape['num_batches']} for calibration, budget {shape['budget']}. "
        f"{environment['device_kind']}, {result['num_cores']} cores, JAX {environment['jax']}; "
        f"products at {rates['flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"copies at {rates['bytes_per_second'] / 1e9:.1f} GB/s."
    )


def _row(name: str, record: dict[str, Any]) -> tuple[str, ...]:
    program, speed = record["program"] or {}, record["tokens_per_second"]
    return (
        name.replace("_", " "),
        _seconds(record["median_seconds"]),
        _seconds(record["min_seconds"]),
        _seconds(record["compile_seconds"]),
        f"{record['gradients']:.2f}",
        "" if speed is None else f"{speed:,.0f}",
        _mebibytes(program.get("temp_bytes")),
        _mebibytes(record["peak_rss_bytes"]),
        f"{record['fraction_of_floor']:.0%}",
    )


def _seconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f} MiB"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=_RESULTS, help="folder, read recursively")
    folder = parser.parse_args().results
    results = [read_json(path) for path in sorted(folder.rglob("*.json"))]
    timed = [result for result in results if "phases" in result]
    if not timed:
        raise InputError(f"{folder}: no results; make some with python -m benchmarks.run")
    print("\n\n".join(map(table, timed)))


if __name__ == "__main__":
    main()
