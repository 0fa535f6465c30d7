"""Studies: what is measured beside the phases of a workload, by name.

A study yields its record again and again as it grows; the last one has `complete`.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.workloads import Suite

Study = Callable[[Suite], Iterator[dict[str, Any]]]


def _study(module: str) -> Study:
    """The function `study` of a module, which is loaded when it runs: one needs torch."""
    return lambda suite: import_module(f"benchmarks.{module}").study(suite)


STUDIES: dict[str, Study] = {
    "memory": _study("memory"),
    "torch-step": _study("torch_step"),
    "growth": _study("growth"),
    "decomposition": _study("decomposition"),
    "ragged": _study("ragged"),
}

STUDY_SECONDS: dict[Suite, dict[str, float]] = {
    "cpu": {
        "memory": 300.0,
        "torch-step": 240.0,
        "growth": 240.0,
        "decomposition": 120.0,
        "ragged": 240.0,
    },
    "device": {"growth": 120.0, "decomposition": 120.0, "ragged": 120.0},
}
"""The studies of a suite, and the seconds that each may take."""

ORDER: dict[Suite, tuple[str, ...]] = {
    "cpu": (
        "small",
        "opt-125m",
        "memory",
        "torch-step",
        "growth",
        "decomposition",
        "ragged",
    ),
    "device": (
        "opt-1.3b",
        "opt-1.3b-512",
        "decomposition",
        "opt-125m",
        "growth",
        "small",
        "opt-6.7b",
        "ragged",
    ),
}
"""What a suite measures where nothing is asked for, most valuable first."""
