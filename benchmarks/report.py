"""Writes the README's tables of speed, and the plots, from the committed results.

python -m benchmarks.report
python -m benchmarks.report --check    # fails where the README says anything else
"""

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plots import draw_growth
from benchmarks.targets import TARGETS, find, load_results
from gradot_jax.errors import InputError

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

_PHASE_COLUMNS = ("time", "gradients", "of the floor", "compile", "memory")
_STEPS = {
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
            kinds.append(_kind(folder, found))
    if not kinds:
        raise InputError(f"{results}: no results; make some with python -m benchmarks.run")
    kinds.sort(key=lambda kind: kind.suite != "cpu")
    if all(kind.suite == "cpu" for kind in kinds):
        kinds.append(Kind("GPU", "device", None, {}))
    return kinds


def _kind(folder: Path, results: dict[str, dict[str, Any]]) -> Kind:
    first = next(iter(results.values()))
    title = "CPU" if first["suite"] == "cpu" else first["environment"]["device_kind"]
    return Kind(title, first["suite"], folder, results)


def section(kinds: Sequence[Kind]) -> str:
    """The README's text between the markers."""
    parts = [_machines(kinds), targets_table(kinds), _reasons(kinds)]
    names = dict.fromkeys(itertools.chain.from_iterable(kind.results for kind in kinds))
    for name in names:
        if any("phases" in kind.results.get(name, {}) for kind in kinds):
            parts.append(phases_table(name, kinds))
    for kind in kinds:
        parts += [_tuning(kind), _decomposition(kind), _growth(kind)]
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


def targets_table(kinds: Sequence[Kind]) -> str:
    """Every target, what is demanded, what each kind of device measured, and where it stands."""
    titles = [kind.title for kind in kinds]
    rows: list[Sequence[str]] = [("target", "demanded", *titles, "reached", "where")]
    for target in TARGETS:
        values = [find(kind.results, target.where(kind.suite)) for kind in kinds]
        verdicts = [
            "yes" if target.reached(value) else "no"
            for value in values
            if value is not None and target.limit is not None
        ]
        where = dict.fromkeys(filter(None, (target.where(kind.suite) for kind in kinds)))
        cells = ["" if value is None else target.unit.format(value) for value in values]
        places = " ".join(f"`{place}`" for place in where)
        rows.append((target.name, target.demanded, *cells, ", ".join(verdicts), places))
    return _table(rows, left=(0, 1, len(titles) + 2, len(titles) + 3))


def _reasons(kinds: Sequence[Kind]) -> str:
    lines = []
    for target in TARGETS:
        values = [find(kind.results, target.where(kind.suite)) for kind in kinds]
        missed = any(value is not None and target.reached(value) is False for value in values)
        if missed and target.reason:
            lines.append(f"- {target.name}: {target.reason}")
    return "\n".join(lines)


def phases_table(name: str, kinds: Sequence[Kind]) -> str:
    """The phases of one workload on every kind of device, under a line with its shapes."""
    measured = [kind.results.get(name, {}) for kind in kinds]
    phases = dict.fromkeys(itertools.chain(*(result.get("phases", {}) for result in measured)))
    titles = [f"{kind.title}: {c}" if not i else c for kind in kinds for i, c in _numbered()]
    rows: list[Sequence[str]] = [("phase", *titles)]
    for phase in phases:
        records = [result.get("phases", {}).get(phase) for result in measured]
        cells = itertools.chain.from_iterable(map(_phase_cells, records))
        rows.append((_label(phase, records), *cells))
    shapes = [f"{k.title} {_shape(r)}" for k, r in zip(kinds, measured, strict=True) if r]
    return f"**{name}**, {'; '.join(shapes)}\n\n{_table(rows, left=(0,))}"


def _numbered() -> Iterable[tuple[int, str]]:
    return enumerate(_PHASE_COLUMNS)


def _shape(result: Mapping[str, Any]) -> str:
    shape = result["workload"]
    blocks = " + ".join(str(shape[f"num_{part}"]) for part in ("bottom", "middle", "top"))
    left_out = f", left out: {', '.join(result['left_out'])}" if result.get("left_out") else ""
    return (
        f"{blocks} blocks, D {shape['width']}, F {shape['ffn']}, V {shape['vocabulary']}, "
        f"{shape['num_batches']} batches of {shape['batch_size']} x {shape['length']} tokens, "
        f"{shape['dtype']}{left_out}"
    )


def _label(phase: str, records: Iterable[Mapping[str, Any] | None]) -> str:
    times = {record["times"] for record in records if record and record.get("times", 1) != 1}
    return phase.replace("_", " ") + "".join(f" (of {count:g})" for count in sorted(times))


def _phase_cells(record: Mapping[str, Any] | None) -> tuple[str, ...]:
    if record is None:
        return ("",) * len(_PHASE_COLUMNS)
    if "failed" in record:
        return ("failed", *[""] * (len(_PHASE_COLUMNS) - 1))
    rose = record["peak_bytes"] > record["before_bytes"]
    return (
        _seconds(record["median_seconds"]),
        f"{record['gradients']:.2f}",
        f"{record['fraction_of_floor']:.0%}",
        _seconds(record["compile_seconds"]),
        _bytes(record["peak_bytes"]) if rose else "",
    )


def _tuning(kind: Kind) -> str:
    rows: list[Sequence[str]] = [
        (
            "trained",
            "shape",
            "tokens/s",
            "over all weights",
            "memory as compiled",
            "below all weights",
            "peak memory",
        ),
    ]
    for name, result in kind.results.items():
        found = result.get("totals", {}).get("tuning", {})
        for step, record in found.items():
            shape = result["workload"]
            rows.append(
                (
                    _STEPS[step],
                    f"{name}, {shape['batch_size']} x {shape['length']}",
                    f"{record['tokens_per_second']:,.0f}",
                    _times(record.get("speedup")),
                    _bytes(record["program_bytes"]),
                    _times(record.get("memory_reduction")),
                    _bytes(record["peak_bytes"]),
                )
            )
    if len(rows) == 1:
        return ""
    return f"Fine-tuning, {kind.title}\n\n{_table(rows, left=(0, 1))}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x"


def _decomposition(kind: Kind) -> str:
    points = kind.results.get("decomposition", {}).get("points", [])
    if not points:
        return ""
    sizes = sorted({point["size"] for point in points})
    rows: list[Sequence[str]] = [("algorithm", *(f"D {size}" for size in sizes), "residual")]
    for algorithm in dict.fromkeys(point["algorithm"] for point in points):
        own = [point for point in points if point["algorithm"] == algorithm]
        slowest = {
            size: max((p["median_seconds"] for p in own if p["size"] == size), default=None)
            for size in sizes
        }
        cells = ("" if slowest[size] is None else _seconds(slowest[size]) for size in sizes)
        rows.append((algorithm, *cells, f"{max(point['residual'] for point in own):.1e}"))
    table = _table(rows, left=(0,))
    return f"Decomposition of the four maps of a layer, {kind.title}\n\n{table}"


def _growth(kind: Kind) -> str:
    growth = kind.results.get("growth")
    if kind.folder is None or growth is None or "exponents" not in growth:
        return ""
    folder = kind.folder.relative_to(_ROOT) if kind.folder.is_relative_to(_ROOT) else kind.folder
    return "\n".join(
        f"![{kind.title}: seconds over {quantity}]({folder.as_posix()}/growth-{quantity}.png)"
        for quantity in growth["exponents"]
    )


def _table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    rule = ["---" if i in set(left) else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _rate(value: float) -> str:
    return f"{value / 1e9:.3g} G" if value < 1e12 else f"{value / 1e12:.3g} T"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def replace_section(text: str, new: str) -> str:
    """A README with the text between its markers replaced.

    Raises:
        InputError: when it has not each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"the README must have {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    kinds = load_kinds(options.results)
    text = options.readme.read_text("utf-8")
    new = replace_section(text, section(kinds))
    if options.check:
        if new != text:
            raise SystemExit(
                f"{options.readme} and results differ; run python -m benchmarks.report"
            )
        return
    options.readme.write_text(new, "utf-8")
    for kind in kinds:
        if kind.folder is not None and "exponents" in kind.results.get("growth", {}):
            draw_growth(kind.folder, kind.results["growth"])


if __name__ == "__main__":
    main()
