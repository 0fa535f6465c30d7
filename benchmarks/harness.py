"""The one way in which anything is timed.

Lowering, compiling and running are timed apart, the first run is left out, and a run ends when
its results are there. On CPU memory is that of the process, so each phase is measured in its own;
an accelerator's own peak is read before and after.
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.floor import Cost
from benchmarks.workloads import Workload

Prepare = Callable[[], tuple[Any, ...]]
Advance = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

MIN_RUNS = 5
_MAX_RUNS = 50
_ENOUGH_SECONDS = 1.0
_PATIENCE_SECONDS = 40.0
"""After these a phase is not run again, were it only once besides the first time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What is measured.

    Attributes:
        run: one jitted function, or a function that calls several.
        prepare: arguments for one run, not timed; what a run consumes is made anew here.
        advance: the next run's arguments from those of a run and its results, where a run donates
            its state; `prepare` then makes those of the first run only.
        program: where `run` is not itself jitted, lowers the program that does most of its work.
        cost: what one run must cost at least.
        batches: batches of text that one run reads.
        tokens: in those batches.
        times: how often the work of one run is done in the whole of a compression; a phase that
            is the same for each layer is measured on a few of them.
    """

    run: Callable[..., Any]
    prepare: Prepare
    advance: Advance | None = None
    program: Callable[[], jax.stages.Lowered] | None = None
    cost: Cost
    batches: int
    tokens: int
    times: float = 1


def text_phase(
    workload: Workload, cost: Cost, batches: int, run, prepare: Prepare, **more: Any
) -> Phase:
    """A phase that reads some batches of a workload's text; `more` are fields of `Phase`."""
    tokens = batches * workload.tokens
    return Phase(run=run, prepare=prepare, cost=cost, batches=batches, tokens=tokens, **more)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until the function's results are there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def run_times(
    run: Callable[..., Any], prepare: Prepare, advance: Advance | None = None
) -> list[float]:
    """Seconds of a first run, which warms up, and of `MIN_RUNS` more.

    There are more of them if they are short, and fewer but at least one if they are very long.
    """
    seconds: list[float] = []
    arguments, result = (), None
    while len(seconds) < 2 or _goes_on(seconds[1:]):
        arguments = advance(arguments, result) if advance and seconds else prepare()
        # What a run no longer needs must not lie beside what it makes.
        result = None
        took, result = timed(run, *jax.block_until_ready(arguments))
        seconds.append(took)
    return seconds


def _goes_on(seconds: list[float]) -> bool:
    if len(seconds) < MIN_RUNS:
        return sum(seconds) < _PATIENCE_SECONDS
    return sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MAX_RUNS


def measure(phase: Phase) -> dict[str, Any]:
    """Seconds, bytes and FLOPs of a phase.

    Returns:
        `lower_seconds` (None unless one jitted function), `compile_seconds`, `runs`,
        `min_seconds`, `median_seconds`; `peak_bytes` of this process on CPU, of the accelerator
        elsewhere, and `before_bytes`, the same before the first run; `program`, what XLA says of
        the compiled program; and what the phase says of itself.
    """
    before = peak_bytes()
    if isinstance(phase.run, jax.stages.Wrapped):
        record, compiled = _measure_program(phase)
    else:
        record, compiled = _measure_function(phase), None
    record |= {"peak_bytes": peak_bytes(), "before_bytes": before}
    if compiled is None and phase.program is not None:
        compiled = phase.program().compile()
    return record | {
        "program": None if compiled is None else analysis(compiled),
        **{name: getattr(phase, name) for name in ("batches", "tokens", "times")},
        "cost": dataclasses.asdict(phase.cost),
    }


def _measure_program(phase: Phase) -> tuple[dict[str, Any], jax.stages.Compiled]:
    arguments = phase.prepare()
    lowering, lowered = timed(phase.run.lower, *arguments)
    compiling, compiled = timed(lowered.compile)
    _, *times = run_times(compiled, phase.prepare, phase.advance)
    return {"lower_seconds": lowering, "compile_seconds": compiling, **_summary(times)}, compiled


def _measure_function(phase: Phase) -> dict[str, Any]:
    first, *times = run_times(phase.run, phase.prepare, phase.advance)
    summary = _summary(times)
    compiling = max(first - summary["median_seconds"], 0.0)
    return {"lower_seconds": None, "compile_seconds": compiling, **summary}


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "runs": len(seconds),
        "min_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
    }


def analysis(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What XLA says of a program: bytes of temporaries, outputs and arguments, and FLOPs."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "output_bytes": getattr(memory, "output_size_in_bytes", None),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "alias_bytes": getattr(memory, "alias_size_in_bytes", None),
        "flops": cost.get("flops"),
    }


def peak_bytes() -> int:
    """The most memory held so far: by this process on CPU, on the accelerator elsewhere."""
    held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak_rss_bytes() if held is None else held


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
