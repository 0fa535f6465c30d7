"""What this machine can do: rates of matrix products and of copying, and published peaks."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import run_times
from benchmarks.workloads import Workload

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


def measure_rates(workload: Workload) -> dict[str, object]:
    """Rates of the default device for the products of a workload.

    Returns:
        `flops_per_second` of products in the workload's dtype, `exact_flops_per_second` of those
        in float32 at the highest precision, each the best of `products` and `exact_products`, by
        `n x k x m`; `bytes_per_second`, read plus written; `peak_flops_per_second` as published
        for bfloat16, None where unknown or another dtype.
    """
    shapes = product_shapes(workload)
    exact = {name(*shape): product_rate(*shape, "float32", highest=True) for shape in shapes}
    dtype = jnp.dtype(workload.dtype).name
    half = dtype != "float32"
    products = {name(*shape): product_rate(*shape, dtype) for shape in shapes} if half else exact
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind) if half else None
    return {
        "flops_per_second": max(products.values()),
        "exact_flops_per_second": max(exact.values()),
        "bytes_per_second": copy_rate(),
        "peak_flops_per_second": peak,
        "products": products,
        "exact_products": exact,
    }


def product_shapes(workload: Workload) -> list[tuple[int, int, int]]:
    """`(n, k, m)` of the workload's largest products, and a square that suits any machine."""
    width, ffn, tokens = workload.config.hidden_size, workload.config.ffn_dim, workload.tokens
    square = 2048 if jax.default_backend() == "cpu" else 8192
    return [(square, square, square), (tokens, width, ffn), (ffn, tokens, ffn)]


def name(n: int, k: int, m: int) -> str:
    """How a product `[n, k] x [k, m]` is written."""
    return f"{n} x {k} x {m}"


@cache
def product_rate(n: int, k: int, m: int, dtype: str, *, highest: bool = False) -> float:
    """FLOPs per second of a product `[n, k] x [k, m]`, at its best; measured once."""
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
