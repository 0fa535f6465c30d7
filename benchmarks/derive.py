"""What follows from the measured seconds and bytes of a workload's phases."""

from typing import Any

from benchmarks.floor import Cost, floor_seconds

UNIT = "gradient"
CALIBRATION = ("calibration_forward", "factor_sweep")
_COMPRESSION = (*CALIBRATION, "decomposition", "selection")
_STEPS = ("step_emulator", "step_full", "step_all")

Record = dict[str, Any]


def derive(phases: dict[str, Record], rates: dict[str, float]) -> dict[str, Record]:
    """Adds to each phase its time in gradients, its speed, and its fraction of the floor.

    Args:
        phases: records of `harness.measure`, `gradient` among them; those with `failed` stay as
            they are.
        rates: see `rates.measure_rates`.

    Returns:
        The records with `gradients`, the time that all of a compression's runs of the phase take
        over that of one gradient on each batch that it reads (on one batch where it reads none);
        `tokens_per_second`, None where it reads none; `floor_seconds` and
        `symmetric_floor_seconds`, and the fractions that they are of the median; and
        `utilisation`, the share of the published peak, None where there is none.
    """
    unit = phases[UNIT].get("median_seconds")

    def derived(record: Record) -> Record:
        if "failed" in record:
            return record
        seconds, cost = record["median_seconds"], Cost(**record["cost"])
        floor, symmetric = (floor_seconds(cost, rates, symmetric=half) for half in (False, True))
        whole = seconds * record["times"] / max(record["batches"], 1)
        peak = rates.get("peak_flops_per_second")
        return record | {
            "gradients": None if unit is None else whole / unit,
            "tokens_per_second": record["tokens"] / seconds if record["tokens"] else None,
            "floor_seconds": floor,
            "fraction_of_floor": floor / seconds,
            "symmetric_floor_seconds": symmetric,
            "fraction_of_symmetric_floor": symmetric / seconds,
            "utilisation": cost.flops / seconds / peak if peak and cost.flops else None,
        }

    return {name: derived(record) for name, record in phases.items()}


def totals(phases: dict[str, Record]) -> Record:
    """What follows from several derived phases together, as far as they were measured.

    Returns:
        `calibration`: its seconds and how many times each floor they are; `compression`: the sum
        of its parts, and the share of the decompositions in it; `tuning`: tokens per second and
        bytes of each kind of step, and how many times better than a step of all weights.
    """
    phases = {name: record for name, record in phases.items() if "failed" not in record}
    result: Record = {}
    if phases.keys() >= set(CALIBRATION):
        result["calibration"] = _calibration([phases[name] for name in CALIBRATION])
    if phases.keys() >= set(_COMPRESSION):
        parts = {name: _whole(phases[name], "median_seconds") for name in _COMPRESSION}
        share = parts["decomposition"] / sum(parts.values())
        result["compression"] = {"parts_seconds": sum(parts.values()), "decomposition": share}
    if phases.keys() & set(_STEPS):
        result["tuning"] = {name: _step(phases, name) for name in _STEPS if name in phases}
    return result


def _calibration(parts: list[Record]) -> Record:
    seconds, floor, symmetric = (
        sum(_whole(record, name) for record in parts)
        for name in ("median_seconds", "floor_seconds", "symmetric_floor_seconds")
    )
    return {
        "seconds": seconds,
        "over_floor": seconds / floor,
        "over_symmetric_floor": seconds / symmetric,
    }


def _whole(record: Record, name: str) -> float:
    return record[name] * record["times"]


def _step(phases: dict[str, Record], name: str) -> Record:
    record, every = phases[name], phases.get("step_all")
    step = {
        "tokens_per_second": record["tokens_per_second"],
        "program_bytes": program_bytes(record["program"]),
        "peak_bytes": record["peak_bytes"],
    }
    if every is not None:
        step["speedup"] = record["tokens_per_second"] / every["tokens_per_second"]
        step["memory_reduction"] = program_bytes(every["program"]) / step["program_bytes"]
        # The peak of an accelerator is that of all phases so far.
        step["peak_reduction"] = every["peak_bytes"] / record["peak_bytes"]
    return step


def program_bytes(program: Record) -> int:
    """Bytes that a program needs: arguments, results that lie nowhere in them, temporaries."""
    names = ("argument_bytes", "output_bytes", "temp_bytes")
    return sum(program[name] or 0 for name in names) - (program["alias_bytes"] or 0)
