"""How long each algorithm takes for the decompositions of a layer, and how good they are.

What `linalg.decomposition.default_algorithm` should be on a platform is read off here. A batch
is four `[D, D]` matrices, as many as a layer has for its attention, of two kinds: `random`, with
entries of a normal distribution, whose values are all of a size, and `decaying`, whose values
fall to a thousandth and below as those of trained maps do.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from benchmarks.harness import run_times, summary, timed
from benchmarks.workloads import Suite
from gradot_jax.linalg.decomposition import Algorithm, decompose
from gradot_jax.linalg.svd import SVD, quality

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
CUSOLVER = {
    "cusolver-gesvd": jax.lax.linalg.SvdAlgorithm.QR,
    "cusolver-gesvdj": jax.lax.linalg.SvdAlgorithm.JACOBI,
    "cusolver-gesvdp": jax.lax.linalg.SvdAlgorithm.POLAR,
}
"""What a GPU's own library has beside them."""
KINDS = ("random", "decaying")
BATCH = 4
_SIZES: dict[Suite, tuple[int, ...]] = {"cpu": (256, 512), "device": (512, 1024, 2048, 4096)}
_SECONDS = 100.0
"""Less than the study has, so that it ends by itself and says what it left out."""


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record of all algorithms at the sizes of a suite."""
    algorithms = ALGORITHMS + (tuple(CUSOLVER) if jax.default_backend() == "gpu" else ())
    yield from grow(_SIZES[suite], algorithms, _SECONDS)


def grow(
    sizes: Sequence[int], algorithms: Sequence[str], time_limit: float
) -> Iterator[dict[str, Any]]:
    """The growing record of some algorithms at some sizes.

    Args:
        sizes: D, rising.
        algorithms: of `ALGORITHMS` or `CUSOLVER`.
        time_limit: seconds; what would not be done by then is listed under `left_out`.
    """
    record: dict[str, Any] = {"batch": BATCH, "points": [], "left_out": [], "complete": False}
    deadline = time.monotonic() + time_limit
    # Seconds per D^3 of the size before.
    took: dict[str, float] = {}
    for size in sizes:
        for algorithm in algorithms:
            started = time.monotonic()
            if started + took.get(algorithm, 0.0) * size**3 > deadline:
                record["left_out"].append({"algorithm": algorithm, "size": size})
                continue
            record["points"] += [point(algorithm, size, kind) for kind in KINDS]
            took[algorithm] = (time.monotonic() - started) / size**3
            yield record
    yield record | {"complete": not record["left_out"]}


def point(algorithm: str, size: int, kind: str) -> dict[str, Any]:
    """Seconds and errors of one algorithm on one batch.

    Returns:
        `compile_seconds`, `runs`, `min_seconds`, `median_seconds`; `gigaflops`, per second, of
        the `20/3 D^3` that a matrix costs at least (`benchmarks.floor`), whatever the algorithm
        spends; `residual` and `orthogonality`, the worst of the batch, see `linalg.svd.Quality`.
    """
    batch = jax.block_until_ready(matrices(size, kind))
    compiling, run = timed(jax.jit(program(algorithm)).lower(batch).compile)
    found = summary(run_times(run, lambda: (batch,)))
    errors = jax.jit(quality)(batch, run(batch))
    return {
        "algorithm": algorithm,
        "size": size,
        "kind": kind,
        "compile_seconds": compiling,
        **found,
        "gigaflops": BATCH * 20 / 3 * size**3 / found["median_seconds"] / 1e9,
        "residual": float(errors.residual.max()),
        "orthogonality": float(errors.orthogonality.max()),
    }


def program(algorithm: str) -> Callable[[jax.Array], SVD]:
    """Decomposes a batch `[N, D, D]`."""
    if algorithm in ALGORITHMS:
        return lambda batch: SVD(*decompose(batch, algorithm))

    def library(batch: jax.Array) -> SVD:
        solver = CUSOLVER[algorithm]
        u, s, vt = jax.lax.linalg.svd(batch, full_matrices=False, algorithm=solver)
        return SVD(u, s, jnp.swapaxes(vt, -1, -2))

    return library


def matrices(size: int, kind: str) -> jax.Array:
    """Four matrices `[4, D, D]` of `KINDS`."""
    first, second = jax.random.normal(jax.random.key(size), (2, BATCH, size, size))
    if kind == "random":
        return first
    falling = jnp.logspace(0, -3, size)[None, None] / size
    return jnp.matmul(first * falling, second, precision=jax.lax.Precision.HIGHEST)
