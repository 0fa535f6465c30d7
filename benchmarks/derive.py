"""What follows from the measured seconds and bytes of a workload's phases."""

from typing import Any

from benchmarks.floor import Cost, floor_seconds
from benchmarks.harness import program_bytes
from benchmarks.workloads import STEPS

UNIT = "gradient"
_CALIBRATION = ("calibration_forward", "factor_sweep")
_COMPRESSION = (*_CALIBRATION, "decomposition", "selection")

Record = dict[str, Any]


def derive(phases: dict[str, Record], rates: dict[str, float]) -> dict[str, Record]:
    """Adds to each phase its time in gradients, its speed, and its fraction of the floor.

    Args:
        phases: records of `harness.measure_phase`, `gradient` among them; those with `failed`
            stay as they are.
        rates: see `harness.measure_rates`.

    Returns:
        The records with `gradients`, the time that all of a compression's runs of the phase take
        over that of one gradient on each batch that it reads (on one batch where it reads none);
        `tokens_per_second`, None where it reads none; `floor_seconds` and
        `symmetric_floor_seconds`, and the fractions that they are of the median; and
        `utilisation`, the share of the published peak, None where there is none.
    """
    unit, peak = phases[UNIT].get("median_seconds"), rates.get("peak_flops_per_second")

    def derived(record: Record) -> Record:
        if "failed" in record:
            return record
        seconds, cost = record["median_seconds"], Cost(**record["cost"])
        floor, symmetric = (floor_seconds(cost, rates, symmetric=half) for half in (False, True))
        whole = seconds * record["times"] / max(record["batches"], 1)
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
    if phases.keys() >= set(_CALIBRATION):
        seconds, floor, symmetric = (
            sum(_whole(phases[name], key) for name in _CALIBRATION)
            for key in ("median_seconds", "floor_seconds", "symmetric_floor_seconds")
        )
        over = {"over_floor": seconds / floor, "over_symmetric_floor": seconds / symmetric}
        result["calibration"] = {"seconds": seconds, **over}
    if phases.keys() >= set(_COMPRESSION):
        parts = {name: _whole(phases[name], "median_seconds") for name in _COMPRESSION}
        share = parts["decomposition"] / sum(parts.values())
        result["compression"] = {"parts_seconds": sum(parts.values()), "decomposition": share}
    if phases.keys() & set(STEPS):
        every = phases.get("step_all")
        result["tuning"] = {name: _step(phases[name], every) for name in STEPS if name in phases}
    return result


def _whole(record: Record, key: str) -> float:
    return record[key] * record["times"]


def _step(record: Record, every: Record | None) -> Record:
    step = {
        "tokens_per_second": record["tokens_per_second"],
        "program_bytes": program_bytes(record["program"]),
        "peak_bytes": record["peak_bytes"],
    }
    if every is not None:
        step["speedup"] = record["tokens_per_second"] / every["tokens_per_second"]
        step["memory_reduction"] = program_bytes(every["program"]) / step["program_bytes"]
    return step
