"""Measures the workloads and studies of a suite and writes one JSON for each.

    python -m benchmarks.run --suite cpu
    python -m benchmarks.run --suite device --workloads opt-1.3b opt-125m --time-limit 420

On CPU each phase runs in a process of its own; on an accelerator, whose memory one process
takes, all run in this one. A file is written anew after each phase, and only those of the
workloads asked for.
"""

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from benchmarks.derive import UNIT, derive, totals
from benchmarks.measure import (
    RATES,
    STUDY_SECONDS,
    Failed,
    Measure,
    Result,
    Task,
    in_process,
    in_subprocess,
    without_cache,
)
from benchmarks.phases import PHASES
from benchmarks.targets import RESULTS, TARGETS_FILE, load_results, measured
from benchmarks.workloads import SUITES, WORKLOADS, Suite
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import write_result

ORDER: dict[Suite, list[str]] = {
    "cpu": "small opt-125m smollm2-135m memory memory-llama-1b torch-step "
    "torch-step-smollm2-135m growth decomposition".split(),
    "device": "opt-1.3b opt-1.3b-512 llama-1b decomposition opt-125m growth small opt-6.7b".split(),
}
"""What a suite measures where nothing is asked for, most valuable first."""

TIME_LIMITS: dict[Suite, float] = {"cpu": 2700.0, "device": 420.0}
"""Seconds."""


def run_suite(
    suite: Suite, names: Sequence[str], phases: Sequence[str], folder: Path, time_limit: float
) -> list[str]:
    """Measures some workloads and studies.

    Args:
        suite: which of the suites.
        names: of workloads and studies, in the order in which they are to be measured; those of
            `ORDER` where empty.
        phases: names of phases; those of each workload where empty. The unit is measured in any
            case.
        folder: of the results.
        time_limit: seconds for all; what is not measured by then is listed under `left_out`.

    Returns:
        What failed, by name; empty when nothing did.

    Raises:
        InputError: for an unknown name, or without a device to measure.
    """
    names = names or ORDER[suite]
    _check("workload", names, [*WORKLOADS[suite], *STUDY_SECONDS[suite]])
    _check("phase", phases, PHASES)
    large = [name for name in names if not name.startswith("smoke")]
    if suite == "device" and jax.default_backend() == "cpu" and large:
        raise InputError("suite device: there is no accelerator; only smoke runs without one")
    measure = in_subprocess if suite == "cpu" else in_process
    deadline = time.monotonic() + time_limit
    failures = []
    for name in names:
        path = folder / f"{name}.json"
        if name in WORKLOADS[suite]:
            result = run_workload(suite, name, phases, path, deadline, measure)
            failures += [f"{name}: {phase}" for phase in _failed(result)]
        else:
            own = time.monotonic() + STUDY_SECONDS[suite][name]
            if not run_study(suite, name, path, min(own, deadline), measure):
                failures.append(name)
        write_result(folder / TARGETS_FILE, {"targets": measured(suite, load_results(folder))})
    return failures


def run_workload(
    suite: Suite, name: str, phases: Sequence[str], path: Path, deadline: float, measure: Measure
) -> Result:
    """Measures one workload into one file.

    Args:
        suite: which of the suites.
        name: of the workload.
        phases: names of phases; those of the workload where empty.
        path: the file, replaced after each phase; not made when not even the rates were measured.
        deadline: on the monotonic clock.
        measure: how.

    Returns:
        The contents of the file.
    """
    workload = WORKLOADS[suite][name]
    wanted = phases or workload.phases or tuple(PHASES)
    todo = [RATES, UNIT, *(phase for phase in wanted if phase != UNIT)]
    result: Result = {"suite": suite, "name": name, "workload": workload.describe()}
    result["phases"] = {}
    for index, phase in enumerate(todo):
        try:
            *_, last = None, *measure(Task(suite, name, phase), deadline - time.monotonic())
        except Failed as error:
            last = {"record": {"failed": str(error)}}
        if last is None:
            result["left_out"] = todo[index:]
            _say(f"{name}: out of time; left out: {', '.join(todo[index:])}")
            break
        if phase == RATES:
            if "failed" in last["record"]:
                result["phases"][RATES] = last["record"]
                break
            result |= {"environment": last["environment"], RATES: last["record"]}
        else:
            result["phases"][phase] = last["record"]
            result["phases"] = derive(result["phases"], result[RATES])
            result["totals"] = totals(result["phases"])
        write_result(path, result)
        _say(f"{name}: {phase} {last['record'].get('failed', 'measured')}")
    if RATES in result:
        write_result(path, result)
    return result


def run_study(suite: Suite, name: str, path: Path, deadline: float, measure: Measure) -> bool:
    """Measures one study into one file, replaced as it grows.

    Returns:
        Whether nothing failed; a study that the time cut short says so by `complete`.
    """
    complete = False
    try:
        for last in measure(Task(suite, name), deadline - time.monotonic()):
            own = {"suite": suite, "name": name, "environment": last["environment"]}
            write_result(path, last["record"] | own)
            complete = bool(last["record"].get("complete"))
    except Failed as error:
        _say(f"{name}: {error}")
        return False
    _say(f"{name}: {'measured' if complete else 'out of time'}")
    return True


def device_folder(suite: Suite) -> Path:
    """Where results of a suite go: `results/cpu`, or the accelerator's kind."""
    if suite == "cpu":
        return RESULTS / "cpu"
    return RESULTS / re.sub(r"[^a-z0-9.]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def _failed(result: Result) -> list[str]:
    return [name for name, record in result["phases"].items() if "failed" in record]


def _say(line: str) -> None:
    print(line, flush=True)


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--workloads", nargs="+", default=(), help="workloads and studies")
    parser.add_argument("--phases", nargs="+", default=(), help="instead of the workloads' own")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--time-limit", type=float, help="seconds: 2700 on CPU, 420 on devices")
    options = parser.parse_args()
    without_cache()
    limit = TIME_LIMITS[options.suite] if options.time_limit is None else options.time_limit
    try:
        folder = options.out or device_folder(options.suite)
        failures = run_suite(options.suite, options.workloads, options.phases, folder, limit)
    except InputError as error:
        parser.error(str(error))
    if failures:
        raise SystemExit(f"could not be measured: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
