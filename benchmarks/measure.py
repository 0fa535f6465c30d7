"""Measures one thing in this process and prints its records as lines of JSON.

    python -m benchmarks.measure --suite cpu --workload small --phase gradient
    python -m benchmarks.measure --suite cpu --study growth

On CPU `benchmarks.run` starts one such process per phase, because peak memory is that of a
process.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from benchmarks.harness import measure
from benchmarks.phases import PHASES
from benchmarks.rates import measure_rates
from benchmarks.studies import STUDIES
from benchmarks.workloads import SUITES, WORKLOADS, Suite
from gradot_jax.evaluation.record import environment

RATES = "rates"
"""The pseudo-phase that measures the machine."""


class Task(NamedTuple):
    """A phase of a workload, or a study.

    Attributes:
        name: of the workload or study.
        phase: None for a study.
    """

    name: str
    phase: str | None = None

    def arguments(self) -> list[str]:
        """The same on the command line."""
        if self.phase is None:
            return ["--study", self.name]
        return ["--workload", self.name, "--phase", self.phase]


def records(suite: Suite, task: Task) -> Iterator[dict[str, Any]]:
    """Measures: one record for a phase, a growing one for a study."""
    if task.phase is None:
        yield from STUDIES[task.name](suite)
    elif task.phase == RATES:
        yield measure_rates(WORKLOADS[suite][task.name])
    else:
        yield measure(PHASES[task.phase](WORKLOADS[suite][task.name]))


def without_cache() -> None:
    """Switches off the cache of compiled programs: one found there would pass for a fast one."""
    jax.config.update("jax_enable_compilation_cache", False)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--workload", default="")
    parser.add_argument("--phase", choices=[RATES, *PHASES])
    parser.add_argument("--study", default="", choices=["", *STUDIES])
    arguments = parser.parse_args()
    without_cache()
    task = Task(arguments.study or arguments.workload, arguments.phase)
    for record in records(arguments.suite, task):
        print(json.dumps({"environment": environment(), "record": record}), flush=True)


if __name__ == "__main__":
    main()
