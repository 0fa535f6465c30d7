"""Measures one phase of a workload or one study, in this process or in one of its own.

    python -m benchmarks.measure cpu small gradient    # prints lines of JSON
    python -m benchmarks.measure cpu growth

A study yields its record again and again as it grows; the last one has `complete`.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any, NamedTuple

import jax

from benchmarks.harness import ROOT, measure_phase, measure_rates
from benchmarks.phases import PHASES
from benchmarks.workloads import SUITES, WORKLOADS, Suite
from gradot_jax.evaluation.record import environment

RATES = "rates"
"""The pseudo-phase that measures the machine."""

STUDIES = {
    "memory": "memory:study",
    "memory-llama-1b": "memory:study_llama",
    "torch-step": "torch_step:study",
    "torch-step-smollm2-135m": "torch_step:study_smollm2",
    "growth": "growth:study",
    "decomposition": "decomposition:study",
}
"""What is measured beside the phases of a workload: module and function, from a suite to the
growing record. They are loaded when they run, since one needs torch."""

STUDY_SECONDS: dict[Suite, dict[str, float]] = {
    "cpu": {
        "memory": 300.0,
        "memory-llama-1b": 900.0,
        "torch-step": 300.0,
        "torch-step-smollm2-135m": 900.0,
        "growth": 240.0,
        "decomposition": 120.0,
    },
    "device": {"growth": 120.0, "decomposition": 120.0},
}
"""The studies of a suite, and the seconds that each may take."""

Result = dict[str, Any]


class Task(NamedTuple):
    """What is measured.

    Attributes:
        suite: which of the suites.
        name: of the workload or study.
        phase: of the workload, or `rates`; empty for a study.
    """

    suite: Suite
    name: str
    phase: str = ""


Measure = Callable[[Task, float], Iterator[Result]]
"""Yields `environment` and `record`, growing where the task is a study, until the seconds are up;
raises `Failed`."""


class Failed(Exception):
    """Something could not be measured."""


def records(task: Task) -> Iterator[Result]:
    """Measures: `environment` and `record`, once for a phase, growing for a study."""
    for record in _records(task):
        yield {"environment": environment(), "record": record}


def _records(task: Task) -> Iterator[dict[str, Any]]:
    if not task.phase:
        yield from resolve_name(f"benchmarks.{STUDIES[task.name]}")(task.suite)
    elif task.phase == RATES:
        yield measure_rates(WORKLOADS[task.suite][task.name])
    else:
        yield measure_phase(PHASES[task.phase](WORKLOADS[task.suite][task.name]))


def in_process(task: Task, seconds: float) -> Iterator[Result]:
    """Measures in this process, where a phase that has begun is not stopped."""
    deadline = time.monotonic() + seconds
    try:
        found = records(task)
        while time.monotonic() < deadline and (result := next(found, None)) is not None:
            yield result
    except Exception as error:
        # Out of memory or a mistake: what the machine can still measure is measured.
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")
        raise Failed(f"{type(error).__name__}: {first[:200]}") from error
    finally:
        # Else the arrays and programs of a phase would lie beside those of the next.
        gc.collect()
        jax.clear_caches()


def in_subprocess(task: Task, seconds: float) -> Iterator[Result]:
    """Measures on CPU in a process of its own, stopped when the time is up.

    On Linux a process inherits the peak of the one that starts it, so this one must stay small:
    it imports JAX, as all of them do, and allocates nothing.
    """
    if seconds <= 0:
        return
    process = subprocess.Popen(
        _command(task),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    overdue = threading.Event()
    timer = threading.Timer(seconds, lambda: (overdue.set(), _end(process)))
    timer.start()
    with process:
        try:
            # A line without an end is one that was being written when the time was up.
            lines = (line for line in process.stdout or () if line.endswith("}\n"))
            yield from (json.loads(line) for line in lines if line.startswith("{"))
            process.wait()
        finally:
            timer.cancel()
            _end(process)
    if process.returncode and not overdue.is_set():
        raise Failed(f"ended with code {process.returncode}")


def _command(task: Task) -> list[str]:
    return [sys.executable, "-m", "benchmarks.measure", *filter(None, task)]


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def without_cache() -> None:
    """Switches off the cache of compiled programs: one found there would pass for a fast one."""
    jax.config.update("jax_enable_compilation_cache", False)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("name", help="of a workload or study")
    parser.add_argument("phase", nargs="?", default="", choices=["", RATES, *PHASES])
    task = Task(**vars(parser.parse_args()))
    without_cache()
    for result in records(task):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
