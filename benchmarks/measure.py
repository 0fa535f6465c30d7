"""Measures one phase of one workload in this process and prints the record as JSON.

    python -m benchmarks.measure --platform cpu --workload tiny --phase gradient

`benchmarks.run` starts one such process per phase, because peak memory is that of a process.
"""

import argparse
import json
from typing import Any

import jax

from benchmarks.floor import copy_rate, product_rates, product_shapes
from benchmarks.harness import measure
from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment

RATES = "rates"
"""The pseudo-phase that measures the machine: its record holds rates and the environment."""


def record(platform: str, workload: str, phase: str) -> dict[str, Any]:
    """Measures one phase, or the machine.

    Raises:
        InputError: when the default device is not of the platform.
    """
    if jax.default_backend() != platform:
        raise InputError(f"suite {platform}: the default device is a {jax.default_backend()}")
    if phase != RATES:
        return measure(PHASES[phase](WORKLOADS[workload]))
    products = product_rates(product_shapes(WORKLOADS[workload]))
    rates = {"flops_per_second": max(products.values()), "bytes_per_second": copy_rate()}
    return {"environment": environment(), "rates": {**rates, "products": products}}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", required=True)
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--phase", required=True, choices=[RATES, *PHASES])
    arguments = parser.parse_args()
    # A compilation found in a cache would pass for a fast one.
    jax.config.update("jax_enable_compilation_cache", False)
    print(json.dumps(record(arguments.platform, arguments.workload, arguments.phase)))


if __name__ == "__main__":
    main()
