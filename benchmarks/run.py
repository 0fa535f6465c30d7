"""Measures every phase of some workloads and writes one JSON per workload.

    python -m benchmarks.run --suite cpu --workloads tiny small

Each phase runs in a process of its own; a workload's file is written anew after each of them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.floor import Cost
from benchmarks.measure import RATES
from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS, Workload
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import write_result

UNIT = "gradient"
_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of a run.

    Attributes:
        suite: the platform to measure; results go to `benchmarks/results/<suite>`.
        workloads: names of shapes, see `benchmarks/workloads.py`.
        phases: names of phases; `gradient`, the unit, is measured in any case.
        out: folder of the results, another than that of the suite.
        time_limit: seconds for all; what is not measured by then is listed under `left_out`.
    """

    suite: Literal["cpu", "gpu", "tpu"] = "cpu"
    workloads: tuple[str, ...] = ("tiny", "small")
    phases: tuple[str, ...] = tuple(PHASES)
    out: Path | None = None
    time_limit: float = 900.0


def main(options: Benchmark) -> None:
    """Runs the benchmark.

    Raises:
        InputError: for an unknown workload or phase.
    """
    _check("workload", options.workloads, WORKLOADS)
    _check("phase", options.phases, PHASES)
    folder = options.out or _ROOT / "benchmarks" / "results" / options.suite
    deadline = time.monotonic() + options.time_limit
    for name in options.workloads:
        run_workload(options.suite, name, options.phases, folder / f"{name}.json", deadline)


def run_workload(
    suite: str, name: str, phases: Iterable[str], path: Path, deadline: float
) -> dict[str, Any]:
    """Measures one workload into one file.

    Args:
        suite: platform.
        name: of the workload.
        phases: names of phases.
        path: the file, replaced after each phase; not made when not even the rates were measured.
        deadline: on the monotonic clock; a phase that runs into it is stopped.

    Returns:
        The contents of the file.
    """
    names = [RATES, UNIT, *(phase for phase in phases if phase != UNIT)]
    result: dict[str, Any] = {"suite": suite, "workload": describe(name), "phases": {}}
    result["num_cores"] = os.cpu_count()
    for index, phase in enumerate(names):
        started = time.monotonic()
        record = _measure_apart(suite, name, phase, deadline - started)
        if record is None:
            result["left_out"] = names[index:]
            print(f"{name}: out of time; left out: {', '.join(names[index:])}")
            break
        if phase == RATES:
            result |= record
        else:
            result["phases"][phase] = record
            result["phases"] = derive(result["phases"], result["rates"])
        write_result(path, result)
        print(f"{name}: {phase} measured in {time.monotonic() - started:.0f} s", flush=True)
    if RATES in result:
        write_result(path, result)
    return result


def describe(name: str) -> dict[str, Any]:
    """The shapes of a workload, for its file."""
    workload: Workload = WORKLOADS[name]
    config = workload.config
    return {
        "name": name,
        "num_bottom": workload.split.num_bottom,
        "num_middle": workload.num_middle,
        "num_top": workload.split.num_top,
        "width": config.hidden_size,
        "ffn": config.ffn_dim,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "length": workload.length,
        "batch_size": workload.batch_size,
        "num_batches": workload.num_batches,
        "budget": workload.budget,
    }


def derive(phases: dict[str, dict[str, Any]], rates: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Adds to each phase its time in gradients, its speed, and its fraction of the floor.

    The unit is one gradient of the same model on each batch of text that the phase reads; on one
    batch where it reads none.
    """
    unit = phases[UNIT]["median_seconds"]

    def derived(record: dict[str, Any]) -> dict[str, Any]:
        seconds = record["median_seconds"]
        floor = Cost(record["flops"], record["bytes"]).seconds(
            rates["flops_per_second"], rates["bytes_per_second"]
        )
        return {
            "gradients": seconds / (unit * max(record["batches"], 1)),
            "tokens_per_second": record["tokens"] / seconds if record["tokens"] else None,
            "floor_seconds": floor,
            "fraction_of_floor": floor / seconds,
        }

    return {name: record | derived(record) for name, record in phases.items()}


def _measure_apart(suite: str, workload: str, phase: str, seconds: float) -> dict[str, Any] | None:
    """A record from a process of its own, or None when the time is up.

    On Linux a process inherits the peak of the one that starts it, so this one must stay small:
    it imports JAX, as all of them do, and allocates nothing.
    """
    command = [sys.executable, "-m", "benchmarks.measure", "--platform", suite]
    command += ["--workload", workload, "--phase", phase]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, stdout=subprocess.PIPE, check=True, timeout=max(seconds, 0.0)
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
