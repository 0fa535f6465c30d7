"""Floors: the least time that a phase could take on this machine, from formulas and two rates.

    floor = max(FLOPs / rate of matrix products, bytes / rate of copying)

FLOPs count matrix products only, dense (all T^2 pairs of attention, both halves of a Gram
matrix), without recomputation that the method does not need. Bytes count each array that a
program must take in or hand out once, in float32; what lies between may stay in cache, and biases
and norms are left out. With N = B T tokens in a batch, S batches, W = 4 D^2 + 2 D F weights in a
block:

    block, forward               2 N W + 4 N T D
    block, gradient of inputs    2 N W + 8 N T D
    block, gradient of weights   2 N W
    block, Kronecker factors     2 N (8 D^2 + 2 F^2)
    head, each of the three      2 N D V
    decomposition of a matrix    20/3 D^3
    scores of a block            16 D^3 + 4 D^2 F

The decomposition counts what any algorithm by bidiagonalisation pays: 8/3 D^3 for the bidiagonal
form and 2 D^3 for each orthogonal factor applied back (Golub and Van Loan, sections 5.4 and 8.6).
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import run_times
from benchmarks.workloads import Workload

_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """Least arithmetic and memory traffic of a phase."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both, one after the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, gemm_rate: float, copy_rate: float) -> float:
        """The floor, given FLOPs and bytes per second."""
        return max(self.flops / gemm_rate, self.bytes / copy_rate)


def block_weights(workload: Workload) -> int:
    """W, weights of the linear maps of one original block."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    return 4 * width * width + 2 * width * ffn


def gradient_cost(workload: Workload) -> Cost:
    """One gradient of the loss of one batch with respect to all weights."""
    layers, weights, head = (
        workload.config.num_hidden_layers,
        block_weights(workload),
        _head(workload),
    )
    flops = layers * (6 * workload.tokens * weights + 3 * _mixing(workload))
    total = layers * weights + head
    return Cost(flops + 6 * workload.tokens * head, _BYTES * 2 * total)


def forward_cost(workload: Workload) -> Cost:
    """Calibration, forward: all blocks, and back through the head and the top adapter."""
    layers, top = workload.config.num_hidden_layers, workload.split.num_top
    weights, head, mixing = block_weights(workload), _head(workload), _mixing(workload)
    flops = layers * (2 * workload.tokens * weights + mixing)
    flops += top * (2 * workload.tokens * weights + 2 * mixing)
    flops += 4 * workload.tokens * head
    kept = (workload.num_middle + 1) * workload.tokens * workload.config.hidden_size
    moved = layers * weights + head + kept
    return Cost(workload.num_batches * flops, workload.num_batches * _BYTES * moved)


def sweep_cost(workload: Workload) -> Cost:
    """Calibration, backward: each middle block's inside, its input's gradient and its factors.

    The block's own output is not needed, so the forward product of fc2 does not count.
    """
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    weights, tokens = block_weights(workload), workload.tokens
    flops = 2 * tokens * (2 * weights - width * ffn) + 3 * _mixing(workload)
    flops += 2 * tokens * _factor_entries(workload)
    stream = workload.num_batches * 3 * tokens * width
    moved = weights + stream + _factor_entries(workload)
    middle = workload.num_middle
    return Cost(middle * workload.num_batches * flops, middle * _BYTES * moved)


def scoring_cost(workload: Workload) -> Cost:
    """Decomposition and scores of every middle block."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    flops = 4 * 20 * width**3 // 3 + 16 * width**3 + 4 * width**2 * ffn
    moved = block_weights(workload) + _factor_entries(workload) + 8 * width**2
    return Cost(workload.num_middle * flops, workload.num_middle * _BYTES * moved)


def compression_cost(workload: Workload) -> Cost:
    """A compression from end to end."""
    return forward_cost(workload) + sweep_cost(workload) + scoring_cost(workload)


def step_cost(workload: Workload, middle_weights: int) -> Cost:
    """One fine-tuning step of the adapter, with Adam's two moments.

    Args:
        workload: the shapes.
        middle_weights: weights of the linear maps of the whole middle, original or compressed.
    """
    adapter, head = workload.num_outer * block_weights(workload), _head(workload)
    layers, tokens = workload.config.num_hidden_layers, workload.tokens
    flops = layers * 3 * _mixing(workload) + 6 * tokens * adapter
    flops += 4 * tokens * (middle_weights + head)
    return Cost(flops, _BYTES * (middle_weights + head + 6 * adapter))


def product_shapes(workload: Workload) -> list[tuple[int, int, int]]:
    """`(n, k, m)` of the workload's largest products, and a square that suits any machine."""
    width, ffn, tokens = workload.config.hidden_size, workload.config.ffn_dim, workload.tokens
    own = [(tokens, width, ffn), (tokens, ffn, width), (ffn, tokens, ffn)]
    return [(2048, 2048, 2048), *own, (tokens, width, workload.config.vocab_size)]


def product_rates(shapes: Iterable[tuple[int, int, int]]) -> dict[str, float]:
    """FLOPs per second of float32 products `[n, k] x [k, m]`, at their best, by `n x k x m`."""
    rates = {}
    rng = np.random.default_rng(0)
    multiply = jax.jit(jnp.dot)
    for n, k, m in shapes:
        left, right = (jnp.asarray(rng.random(s, np.float32)) for s in ((n, k), (k, m)))
        seconds = min(run_times(multiply, lambda pair=(left, right): pair))
        rates[f"{n} x {k} x {m}"] = 2 * n * k * m / seconds
    return rates


def copy_rate(size: int = 2**26) -> float:
    """Bytes per second, read plus written, of scaling a float32 array of `size` entries."""
    array = jnp.ones(size, jnp.float32)
    # A plain copy is one thread's memcpy, slower than what a fused loop reaches.
    return 2 * _BYTES * size / min(run_times(jax.jit(lambda x: 2 * x), lambda: (array,)))


def _mixing(workload: Workload) -> int:
    """Products of attention between queries, keys and values; going back costs twice as much."""
    return 4 * workload.tokens * workload.length * workload.config.hidden_size


def _head(workload: Workload) -> int:
    return workload.config.hidden_size * workload.config.vocab_size


def _factor_entries(workload: Workload) -> int:
    """Entries of a block's A and G; q, k and v share an A."""
    return 8 * workload.config.hidden_size**2 + 2 * workload.config.ffn_dim**2
