"""Writes the tables of speed and the plots from the committed results.

    python -m benchmarks.report            # into docs/SPEED.md
    python -m benchmarks.report --check    # fails where the page says anything else

The results of each kind of device lie in a folder of their own.
"""

import argparse
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.targets import RESULTS, TARGETS, Target, find, load_results
from gradot_jax.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "SPEED.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

Record = Mapping[str, Any]

_PHASE_COLUMNS = ("time", "gradients", "of the floor", "compile", "memory")
_TUNING_COLUMNS = (
    "trained",
    "shape",
    "tokens/s",
    "over all weights",
    "memory as compiled",
    "below all weights",
    "peak memory",
)
_TORCH_COLUMNS = ("model", "threads", "ours", "PyTorch's", "over it", "of the floor", "PyTorch's")
_MEMORY_COLUMNS = ("checkpoint", "predicted", "at rest", "at the peak", "beyond it, over predicted")
_STEP_TITLES = {
    "step_emulator": "adapter in the emulator",
    "step_full": "adapter in the full model",
    "step_all": "all weights",
}


class Kind(NamedTuple):
    """The results of one kind of device.

    Attributes:
        title: of its columns.
        suite: that measured it.
        folder: of the files; None where nothing was measured.
        results: contents of the files, by name.
    """

    title: str
    suite: str
    folder: Path | None
    results: dict[str, dict[str, Any]]

    def value(self, target: Target) -> float | None:
        """What was measured of a target."""
        return find(self.results, target.where(self.suite))


def load_kinds(results: Path) -> list[Kind]:
    """CPU, and each accelerator that was measured, or a GPU without results.

    Raises:
        InputError: when there are no results at all.
    """
    kinds = []
    for folder in sorted(results.iterdir()) if results.is_dir() else ():
        found = load_results(folder) if folder.is_dir() else {}
        found = {name: result for name, result in found.items() if "suite" in result}
        if found:
            first = next(iter(found.values()))
            suite, device = first["suite"], first["environment"]["device_kind"]
            kinds.append(Kind("CPU" if suite == "cpu" else device, suite, folder, found))
    if not kinds:
        raise InputError(f"{results}: no results; make some with python -m benchmarks.run")
    kinds.sort(key=lambda kind: kind.suite != "cpu")
    if all(kind.suite == "cpu" for kind in kinds):
        kinds.append(Kind("GPU", "device", None, {}))
    return kinds


def section(kinds: Sequence[Kind], page: Path = PAGE) -> str:
    """The text between the markers.

    Args:
        kinds: of devices.
        page: the file that the text is for, from which its links to plots lead.
    """
    parts = [_machines(kinds), _targets(kinds), _reasons(kinds)]
    names = dict.fromkeys(itertools.chain.from_iterable(kind.results for kind in kinds))
    for name in names:
        if any("phases" in kind.results.get(name, {}) for kind in kinds):
            parts.append(_phases(name, kinds))
    for kind in kinds:
        parts += [_tuning(kind), _torch(kind), _memory(kind)]
        parts += [_decomposition(kind), _growth(kind, page)]
    return "\n\n".join(filter(None, parts))


def _machines(kinds: Sequence[Kind]) -> str:
    lines = []
    for kind in kinds:
        timed = [result for result in kind.results.values() if "rates" in result]
        if timed:
            environment, rates = timed[0]["environment"], timed[0]["rates"]
            dtype = timed[0]["workload"]["dtype"]
            lines.append(
                f"{kind.title}: {environment['num_devices']} x {environment['device_kind']}, "
                f"{environment['num_cores']} cores, JAX {environment['jax']}; products at "
                f"{_rate(rates['flops_per_second'])}FLOP/s in {dtype} and "
                f"{_rate(rates['exact_flops_per_second'])}FLOP/s in exact float32, copies at "
                f"{_rate(rates['bytes_per_second'])}B/s."
            )
    return "\n".join(lines)


def _targets(kinds: Sequence[Kind]) -> str:
    """Every target, what is demanded, what each kind of device measured, and where it stands."""
    titles = [kind.title for kind in kinds]
    rows = [("target", "demanded", *titles, "reached", "where")]
    for target in TARGETS:
        values = [kind.value(target) for kind in kinds]
        verdicts = [target.reached(value) for value in values if value is not None]
        reached = ", ".join(
            "yes" if verdict else "no" for verdict in verdicts if verdict is not None
        )
        where = dict.fromkeys(filter(None, (target.where(kind.suite) for kind in kinds)))
        cells = ["" if value is None else target.unit.format(value) for value in values]
        places = " ".join(f"`{place}`" for place in where)
        rows.append((target.name, target.demanded, *cells, reached, places))
    return _table(rows, left=(0, 1, len(titles) + 2, len(titles) + 3))


def _reasons(kinds: Sequence[Kind]) -> str:
    lines = []
    for target in TARGETS:
        values = [value for kind in kinds if (value := kind.value(target)) is not None]
        if target.reason and any(target.reached(value) is False for value in values):
            lines.append(f"- {target.name}: {target.reason}")
    return "\n".join(lines)


def _phases(name: str, kinds: Sequence[Kind]) -> str:
    """The phases of one workload on every kind of device, under a line with its shapes."""
    measured = [kind.results.get(name, {}) for kind in kinds]
    phases = dict.fromkeys(itertools.chain(*(result.get("phases", {}) for result in measured)))
    first, *others = _PHASE_COLUMNS
    rows = [("phase", *(c for kind in kinds for c in (f"{kind.title}: {first}", *others)))]
    for phase in phases:
        records = [result.get("phases", {}).get(phase) for result in measured]
        cells = itertools.chain.from_iterable(map(_phase_cells, records))
        rows.append((_label(phase, records), *cells))
    shapes = [f"{k.title} {_shape(r)}" for k, r in zip(kinds, measured, strict=True) if r]
    return f"**{name}**, {'; '.join(shapes)}\n\n{_table(rows, left=(0,))}"


def _shape(result: Record) -> str:
    shape = result["workload"]
    blocks = " + ".join(str(shape[f"num_{part}"]) for part in ("bottom", "middle", "top"))
    left_out = f", left out: {', '.join(result['left_out'])}" if result.get("left_out") else ""
    return (
        f"{blocks} blocks, D {shape['width']}, F {shape['ffn']}, V {shape['vocabulary']}, "
        f"{shape['num_batches']} batches of {shape['batch_size']} x {shape['length']} tokens, "
        f"{shape['dtype']}{left_out}"
    )


def _label(phase: str, records: Iterable[Record | None]) -> str:
    times = {record["times"] for record in records if record and record.get("times", 1) != 1}
    return phase.replace("_", " ") + "".join(f" (of {count:g})" for count in sorted(times))


def _phase_cells(record: Record | None) -> tuple[str, ...]:
    if record is None or "failed" in record:
        return ("failed" if record else "", *[""] * (len(_PHASE_COLUMNS) - 1))
    rose = record["peak_bytes"] > record["before_bytes"]
    return (
        _seconds(record["median_seconds"]),
        f"{record['gradients']:.2f}",
        f"{record['fraction_of_floor']:.0%}",
        _seconds(record["compile_seconds"]),
        _bytes(record["peak_bytes"]) if rose else "",
    )


def _tuning(kind: Kind) -> str:
    rows = [_TUNING_COLUMNS]
    for name, result in kind.results.items():
        for step, record in result.get("totals", {}).get("tuning", {}).items():
            shape = result["workload"]
            rows.append(
                (
                    _STEP_TITLES[step],
                    f"{name}, {shape['batch_size']} x {shape['length']}",
                    f"{record['tokens_per_second']:,.0f}",
                    _times(record.get("speedup")),
                    _bytes(record["program_bytes"]),
                    _times(record.get("memory_reduction")),
                    _bytes(record["peak_bytes"]),
                )
            )
    return f"Fine-tuning, {kind.title}\n\n{_table(rows, left=(0, 1))}" if rows[1:] else ""


def _torch(kind: Kind) -> str:
    sides, rows = ("step_emulator", "torch"), [_TORCH_COLUMNS]
    for result in kind.results.values():
        for threads, record in result.get("threads", {}).items():
            if "fraction_of_floor" in record:
                times = (_seconds(record["median_seconds"][side]) for side in sides)
                floor = (f"{record['fraction_of_floor'][side]:.0%}" for side in sides)
                over = f"{record['over_torch']:.2f} x"
                rows.append((result["workload"]["model"], threads, *times, over, *floor))
    title = f"Fine-tuning step in the emulator beside PyTorch's, {kind.title}"
    return f"{title}\n\n{_table(rows, left=(0,))}" if rows[1:] else ""


def _memory(kind: Kind) -> str:
    rows = [_MEMORY_COLUMNS]
    for record in (result.get("compress", {}) for result in kind.results.values()):
        if "predicted_bytes" in record:
            keys = ("checkpoint", "predicted", "rest", "peak_anonymous")
            size, *held = (_bytes(record[f"{key}_bytes"]) for key in keys)
            name = f"{record['model']}: {size} in {record['dtype']}"
            rows.append((name, *held, f"{record['over_predicted']:.2f} x"))
    title = f"Memory of `gradot compress` beside mapped files, {kind.title}"
    return f"{title}\n\n{_table(rows, left=(0,))}" if rows[1:] else ""


def _decomposition(kind: Kind) -> str:
    points = kind.results.get("decomposition", {}).get("points", [])
    if not points:
        return ""
    sizes = sorted({point["size"] for point in points})
    rows = [("algorithm", *(f"D {size}" for size in sizes), "residual")]
    for algorithm in dict.fromkeys(point["algorithm"] for point in points):
        own = [point for point in points if point["algorithm"] == algorithm]
        times = [[p["median_seconds"] for p in own if p["size"] == size] for size in sizes]
        cells = (_seconds(max(seconds)) if seconds else "" for seconds in times)
        rows.append((algorithm, *cells, f"{max(point['residual'] for point in own):.1e}"))
    table = _table(rows, left=(0,))
    return f"Decomposition of the four maps of a layer, {kind.title}\n\n{table}"


def _growth(kind: Kind, page: Path) -> str:
    lines = []
    for quantity, path in _growth_plots(kind).items():
        link = Path(os.path.relpath(path, page.parent)).as_posix()
        lines.append(f"![{kind.title}: seconds over {quantity}]({link})")
    return "\n".join(lines)


def _growth_plots(kind: Kind) -> dict[str, Path]:
    """The file of each quantity whose growth was measured."""
    quantities = kind.results.get("growth", {}).get("exponents", {})
    return {q: kind.folder / f"growth-{q}.png" for q in quantities} if kind.folder else {}


def draw_growth(kind: Kind) -> None:
    """Draws seconds over each quantity that was varied, a file for each beside the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for quantity, path in _growth_plots(kind).items():
        growth = kind.results["growth"]
        points = [point for point in growth["points"] if point["quantity"] == quantity]
        values = [point["value"] for point in points]
        figure, axis = pyplot.subplots(figsize=(4.2, 3.4))
        for phase, slope in growth["exponents"][quantity].items():
            seconds = [point["seconds"][phase] for point in points]
            axis.loglog(values, seconds, "o-", label=f"{phase.replace('_', ' ')}: {slope:.2f}")
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axis.minorticks_off()
        axis.set_xlabel(quantity)
        axis.set_ylabel("seconds")
        axis.legend(fontsize=7, title="exponents", title_fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=90, metadata={"Software": None})
        pyplot.close(figure)


def _table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    rule = ["---" if i in set(left) else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x"


def _rate(value: float) -> str:
    return f"{value / 1e9:.3g} G" if value < 1e12 else f"{value / 1e12:.3g} T"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def replace_section(text: str, new: str) -> str:
    """A page with the text between its markers replaced.

    Raises:
        InputError: when it has not each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"the page must have {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    kinds, text = load_kinds(options.results), options.page.read_text("utf-8")
    new = replace_section(text, section(kinds, options.page))
    if options.check:
        if new != text:
            raise SystemExit(f"{options.page} and results differ; run python -m benchmarks.report")
        return
    options.page.write_text(new, "utf-8")
    for kind in kinds:
        draw_growth(kind)


if __name__ == "__main__":
    main()
