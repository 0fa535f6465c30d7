"""The one way in which anything is timed, and the rates of the machine.

Lowering, compiling and running are timed one by one, the first run is left out, and a run ends
when its results are there. On CPU memory is that of the process, so each phase is measured in its
own; an accelerator's own peak is read before and after.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floor import Cost
from benchmarks.workloads import Workload
from gradot_jax.memory.process import peak_device_bytes, peak_rss_bytes
from gradot_jax.models.family import channel_count

ROOT = Path(__file__).parents[1]
"""Where commands are run, so that Python finds both packages."""

Prepare = Callable[[], tuple[Any, ...]]
Advance = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

MIN_RUNS = 5
_MAX_RUNS = 50
_ENOUGH_SECONDS = 1.0
_PATIENCE_SECONDS = 40.0
"""After these a phase is not run again, were it only once besides the first time."""

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOPs per second by device kind, from the makers' data sheets."""


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
    prepare: Prepare = tuple
    advance: Advance | None = None
    program: Callable[[], jax.stages.Lowered] | None = None
    cost: Cost
    batches: int = 0
    tokens: int = 0
    times: float = 1


def text_phase(workload: Workload, batches: int, **fields: Any) -> Phase:
    """A phase that reads some batches of a workload's text; `fields` are the others of `Phase`."""
    return Phase(batches=batches, tokens=batches * workload.tokens, **fields)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until the function's results are there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def run_times(
    run: Callable[..., Any], prepare: Prepare = tuple, advance: Advance | None = None
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


def summary(seconds: list[float]) -> dict[str, Any]:
    """What to report of `run_times`: all but the first run."""
    _, *others = seconds
    return {
        "runs": len(others),
        "min_seconds": min(others),
        "median_seconds": statistics.median(others),
    }


def measure_phase(phase: Phase) -> dict[str, Any]:
    """Seconds, bytes and FLOPs of a phase.

    Returns:
        `lower_seconds` (None unless one jitted function), `compile_seconds`, `runs`,
        `min_seconds`, `median_seconds`; `peak_bytes` of this process on CPU, of the accelerator
        elsewhere, and `before_bytes`, the same before the first run; `program`, what XLA says of
        the compiled program; and what the phase says of itself.
    """
    before = peak_bytes()
    run, lowering, compiling, program = phase.run, None, None, None
    if isinstance(run, jax.stages.Wrapped):
        lowering, lowered = timed(run.lower, *phase.prepare())
        compiling, program = timed(lowered.compile)
        run = program
    seconds = run_times(run, phase.prepare, phase.advance)
    found = summary(seconds)
    if compiling is None:
        compiling = max(seconds[0] - found["median_seconds"], 0.0)
    peak = peak_bytes()
    # Only now: what compiling takes is no part of the peak of what does not compile it.
    if program is None and phase.program is not None:
        program = phase.program().compile()
    return {
        "lower_seconds": lowering,
        "compile_seconds": compiling,
        **found,
        "peak_bytes": peak,
        "before_bytes": before,
        "program": None if program is None else analysis(program),
        **{name: getattr(phase, name) for name in ("batches", "tokens", "times")},
        "cost": dataclasses.asdict(phase.cost),
    }


def analysis(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What XLA says of a program: bytes of temporaries, outputs and arguments, and FLOPs."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    kinds = ("temp", "output", "argument", "alias")
    sizes = {f"{kind}_bytes": getattr(memory, f"{kind}_size_in_bytes", None) for kind in kinds}
    return {**sizes, "flops": cost.get("flops")}


def program_bytes(program: dict[str, Any]) -> int:
    """Bytes that a program needs: arguments, results that lie nowhere in them, temporaries.

    Args:
        program: the `analysis` of it.
    """
    names = ("argument_bytes", "output_bytes", "temp_bytes")
    return sum(program[name] or 0 for name in names) - (program["alias_bytes"] or 0)


def peak_bytes() -> int:
    """The most memory held so far: by this process on CPU, on the accelerator elsewhere."""
    held = peak_device_bytes()
    return peak_rss_bytes() if held is None else held


def new_process(start: Callable[..., Any] | None = None, *args: Any) -> ProcessPoolExecutor:
    """An executor of one process of its own, for what is fixed or first once for a process.

    Args:
        start: called there before anything else.
        *args: of `start`.
    """
    return ProcessPoolExecutor(1, get_context("spawn"), start, args)


def measure_rates(workload: Workload) -> dict[str, Any]:
    """Rates of the default device for the products of a workload.

    Returns:
        `flops_per_second` of products in the workload's dtype, `exact_flops_per_second` of those
        in float32 at the highest precision, each the best of `products` and `exact_products`, by
        `n x k x m`; `bytes_per_second`, read plus written; `peak_flops_per_second` as published
        for bfloat16, None where unknown or another dtype.
    """
    dtype = jnp.dtype(workload.dtype).name
    half = dtype != "float32"
    exact = _product_rates(workload, "float32", highest=True)
    products = _product_rates(workload, dtype) if half else exact
    return {
        "flops_per_second": max(products.values()),
        "exact_flops_per_second": max(exact.values()),
        "bytes_per_second": copy_rate(),
        "peak_flops_per_second": PEAK_FLOPS.get(jax.devices()[0].device_kind) if half else None,
        "products": products,
        "exact_products": exact,
    }


def product_shapes(workload: Workload) -> list[tuple[int, int, int]]:
    """`(n, k, m)` of the workload's largest products, and a square that suits any machine."""
    config, tokens = workload.config, workload.tokens
    width, ffn = config.hidden_size, channel_count(config)
    square = 2048 if jax.default_backend() == "cpu" else 8192
    return [(square, square, square), (tokens, width, ffn), (ffn, tokens, ffn)]


def _product_rates(workload: Workload, dtype: str, *, highest: bool = False) -> dict[str, float]:
    return {
        " x ".join(map(str, shape)): product_rate(shape, dtype, highest=highest)
        for shape in product_shapes(workload)
    }


@cache
def product_rate(shape: tuple[int, int, int], dtype: str, *, highest: bool = False) -> float:
    """FLOPs per second of a product `[n, k] x [k, m]`, at its best; measured once."""
    n, k, m = shape
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.random(s, np.float32), dtype) for s in ((n, k), (k, m)))
    precision = jax.lax.Precision.HIGHEST if highest else None
    multiply = jax.jit(partial(jnp.dot, precision=precision))
    return 2 * n * k * m / min(run_times(multiply, lambda: (left, right)))


@cache
def copy_rate(size: int = 2**26) -> float:
    """Bytes per second, read plus written, of scaling a float32 array of `size` entries."""
    array = jnp.ones(size, jnp.float32)
    # A plain copy is one thread's memcpy, slower than what a fused loop reaches.
    return 2 * 4 * size / min(run_times(jax.jit(lambda x: 2 * x), lambda: (array,)))
