"""The one way in which anything is timed.

Lowering, compiling and running are timed apart, the first run is left out, and a run ends when
its results are there. Memory is that of the process, so each phase is measured in its own.
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

MIN_RUNS = 5
_MAX_RUNS = 50
_ENOUGH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What is measured.

    Attributes:
        run: one jitted function, or a function that calls several.
        prepare: fresh arguments for one run, not timed; what a run donates or consumes is made
            anew here.
        program: where `run` is not itself jitted, lowers the program that does most of its work.
        batches: batches of text that one run reads.
        tokens: in those batches.
        flops: least arithmetic, see `benchmarks.floor`.
        bytes: least memory traffic.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]]
    program: Callable[[], jax.stages.Lowered] | None = None
    batches: int
    tokens: int
    flops: int
    bytes: int


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until the function's results are there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def run_times(run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]]) -> list[float]:
    """Seconds of a first run, which warms up, and of at least `MIN_RUNS` more; more if short."""
    first, *seconds = (_run_time(run, prepare) for _ in range(1 + MIN_RUNS))
    while sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MAX_RUNS:
        seconds.append(_run_time(run, prepare))
    return [first, *seconds]


def _run_time(run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]]) -> float:
    arguments = jax.block_until_ready(prepare())
    return timed(run, *arguments)[0]


def measure(phase: Phase) -> dict[str, Any]:
    """Seconds, bytes and FLOPs of a phase.

    Returns:
        `lower_seconds` (None unless one jitted function), `compile_seconds`, `runs`,
        `min_seconds`, `median_seconds`; `peak_rss_bytes` of this process, and before the first
        run; `program`, what XLA says of the compiled program; and what the phase says of itself.
    """
    before = peak_rss_bytes()
    if isinstance(phase.run, jax.stages.Wrapped):
        record, compiled = _measure_program(phase)
    else:
        record, compiled = _measure_function(phase), None
    record |= {"peak_rss_bytes": peak_rss_bytes(), "rss_before_bytes": before}
    if compiled is None and phase.program is not None:
        compiled = phase.program().compile()
    return record | {
        "program": None if compiled is None else _analysis(compiled),
        **{name: getattr(phase, name) for name in ("batches", "tokens", "flops", "bytes")},
    }


def _measure_program(phase: Phase) -> tuple[dict[str, Any], jax.stages.Compiled]:
    arguments = phase.prepare()
    lowering, lowered = timed(phase.run.lower, *arguments)
    compiling, compiled = timed(lowered.compile)
    _, *times = run_times(compiled, phase.prepare)
    return {"lower_seconds": lowering, "compile_seconds": compiling, **_summary(times)}, compiled


def _measure_function(phase: Phase) -> dict[str, Any]:
    first, *times = run_times(phase.run, phase.prepare)
    summary = _summary(times)
    compiling = max(first - summary["median_seconds"], 0.0)
    return {"lower_seconds": None, "compile_seconds": compiling, **summary}


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "runs": len(seconds),
        "min_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
    }


def _analysis(compiled: jax.stages.Compiled) -> dict[str, Any]:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "output_bytes": getattr(memory, "output_size_in_bytes", None),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "flops": cost.get("flops"),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
