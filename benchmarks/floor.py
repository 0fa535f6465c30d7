"""Floors: the least time that a phase could take on this machine, from formulas and rates.

    floor = max(FLOPs / rate + exact FLOPs / exact rate, bytes / rate of copying)

FLOPs count matrix products only, without recomputation that the method does not need. *Exact*
ones are those that the method does in float32 at the highest precision whatever the dtype of the
rest: Kronecker factors, decompositions, scores. Bytes count each array that a program must take
in or hand out once; what lies between may stay in cache, and biases and norms are left out. The
rates are measured in the same run (`harness.measure_rates`).

With N = B T tokens in a batch, S batches, L blocks of which M are the middle, P the top adapter
and A the adapter, W = 4 D^2 + 2 D F weights in a block, E its entries of factors, and c bytes a
number of the workload's dtype (2 in bfloat16):

    products                        FLOPs
    block, forward                  2 N W + 4 N T D
    block, gradient of inputs       2 N W + 8 N T D
    block, gradient of weights      2 N W
    block, Kronecker factors        2 N E             exact, E = 8 D^2 + 2 F^2
    the same, each pair once        N (E + 8 D + 2 F) exact
    head, each of the three         2 N D V
    decomposition of a matrix       20/3 D^3          exact
    scores of a block               16 D^3 + 4 D^2 F  exact

    phase                FLOPs                               bytes
    gradient             L blocks and head, all three        2 c (L W + D V)
    calibration forward  S (L blocks, forward; P blocks and  c (L W + D V + 2 S L N D)
                         head, inputs)
    factor sweep         S M (block but fc2, forward;        M (c W + 3 c S N D + 4 E)
                         block, inputs; factors)
    decomposition        4 matrices                          4 * 12 D^2
    selection            scores of a block                   4 (W + E + 8 D^2) + 4 W'
    compress             those four, the last two M times    the same
    packaging            none                                2 c (all weights of the bundle)
    step, emulator       L blocks, head: forward, inputs;    c (frozen weights) + 4 * 6 A W
                         A blocks: weights
    step, full           the same around M original blocks   the same
    step, all            gradient                            4 * 6 (L W + D V)

All T^2 pairs of attention count. The steps' bytes are those of AdamW: a weight and two moments in
and out, in float32. A map of the emulator with rank R has 2 D R weights, an MLP with C channels
2 D C; W' is the weights of a compressed block. The decomposition counts what any algorithm by
bidiagonalisation pays: 8/3 D^3 for the bidiagonal form and 2 D^3 for each orthogonal factor
applied back (Golub and Van Loan, sections 5.4 and 8.6).
"""

import dataclasses

import jax.numpy as jnp

from benchmarks.workloads import Workload
from gradot_jax.compression.budget import rank_pool

_EXACT = 4
"""Bytes of a float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Least arithmetic and memory traffic of a phase.

    Attributes:
        flops: in the dtype of the workload.
        exact_flops: in float32 at the highest precision.
        symmetric_flops: the same where a symmetric product is done once for each pair; equal
            where there is none.
        bytes: read and written.
    """

    flops: int = 0
    exact_flops: int = 0
    symmetric_flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both, one after the other."""
        return Cost(**{k: v + getattr(other, k) for k, v in dataclasses.asdict(self).items()})

    def __mul__(self, times: int) -> "Cost":
        """The cost of doing it several times."""
        return Cost(**{name: times * value for name, value in dataclasses.asdict(self).items()})


def exact(flops: int, moved: int) -> Cost:
    """The cost of products in float32 none of which is symmetric."""
    return Cost(exact_flops=flops, symmetric_flops=flops, bytes=moved)


def floor_seconds(cost: Cost, rates: dict[str, float], *, symmetric: bool = False) -> float:
    """The floor of a phase.

    Args:
        cost: of the phase.
        rates: `flops_per_second`, `exact_flops_per_second`, `bytes_per_second`.
        symmetric: count each pair of a symmetric product once.
    """
    slow = cost.symmetric_flops if symmetric else cost.exact_flops
    products = cost.flops / rates["flops_per_second"] + slow / rates["exact_flops_per_second"]
    return max(products, cost.bytes / rates["bytes_per_second"])


def block_weights(workload: Workload) -> int:
    """W, weights of the linear maps of one original block."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    return 4 * width * width + 2 * width * ffn


def emulator_block_weights(workload: Workload) -> int:
    """W', weights of the linear maps of one compressed block."""
    width = workload.config.hidden_size
    dense = workload.rank >= rank_pool(width, width).cap
    attention = width * width if dense else 2 * width * workload.rank
    return 4 * attention + 2 * width * workload.num_channels


def factor_entries(workload: Workload) -> int:
    """E, entries of a block's A and G; q, k and v share an A."""
    return 8 * workload.config.hidden_size**2 + 2 * workload.config.ffn_dim**2


def gradient_cost(workload: Workload) -> Cost:
    """One gradient of the loss of one batch with respect to all weights."""
    return Cost(
        flops=_gradient_flops(workload), bytes=2 * _itemsize(workload) * _all_weights(workload)
    )


def forward_cost(workload: Workload) -> Cost:
    """Calibration, forward: all blocks, and back through the head and the top adapter."""
    layers, tokens = workload.config.num_hidden_layers, workload.tokens
    products, mixing = 2 * tokens * block_weights(workload), _mixing(workload)
    flops = layers * (products + mixing) + workload.split.num_top * (products + 2 * mixing)
    flops += 4 * tokens * _head(workload)
    stream = 2 * workload.num_batches * layers * tokens * workload.config.hidden_size
    moved = _itemsize(workload) * (_all_weights(workload) + stream)
    return Cost(flops=workload.num_batches * flops, bytes=moved)


def sweep_cost(workload: Workload, num_layers: int | None = None) -> Cost:
    """Calibration, backward: a block's inside, its input's gradient and its factors.

    The block's own output is not needed, so the forward product of fc2 does not count.

    Args:
        workload: the shapes.
        num_layers: middle layers swept; None for all.
    """
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    weights, tokens, batches = block_weights(workload), workload.tokens, workload.num_batches
    entries = factor_entries(workload)
    stream = 3 * batches * tokens * width
    layer = Cost(
        flops=batches * (2 * tokens * (2 * weights - width * ffn) + 3 * _mixing(workload)),
        exact_flops=batches * 2 * tokens * entries,
        symmetric_flops=batches * tokens * (entries + 8 * width + 2 * ffn),
        bytes=_itemsize(workload) * (weights + stream) + _EXACT * entries,
    )
    return layer * (workload.num_middle if num_layers is None else num_layers)


def decomposition_cost(workload: Workload) -> Cost:
    """Decomposition of the attention of one middle block."""
    width = workload.config.hidden_size
    return exact(4 * 20 * width**3 // 3, _EXACT * 4 * 3 * width**2)


def selection_cost(workload: Workload) -> Cost:
    """Scores of one middle block, its orders of keeping and the block cut to size."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim
    flops = 16 * width**3 + 4 * width**2 * ffn
    moved = block_weights(workload) + factor_entries(workload) + 8 * width**2
    return exact(flops, _EXACT * (moved + emulator_block_weights(workload)))


def compression_cost(workload: Workload) -> Cost:
    """A compression from end to end."""
    layer = decomposition_cost(workload) + selection_cost(workload)
    return forward_cost(workload) + sweep_cost(workload) + layer * workload.num_middle


def packaging_cost(workload: Workload) -> Cost:
    """Writing the bundle: everything in it is read and written."""
    config = workload.config
    middle = workload.num_middle * emulator_block_weights(workload)
    shell = _head(workload) + (config.max_position_embeddings + 2) * config.hidden_size
    weights = middle + workload.num_outer * block_weights(workload) + shell
    return Cost(bytes=2 * _itemsize(workload) * weights)


def step_cost(workload: Workload, middle_block: int) -> Cost:
    """One fine-tuning step of the adapter, with Adam's two moments.

    Args:
        workload: the shapes.
        middle_block: weights of the linear maps of one block of the middle.
    """
    adapter = workload.num_outer * block_weights(workload)
    frozen = workload.num_middle * middle_block + _head(workload)
    layers, tokens = workload.config.num_hidden_layers, workload.tokens
    flops = layers * 3 * _mixing(workload) + 6 * tokens * adapter + 4 * tokens * frozen
    return Cost(flops=flops, bytes=_itemsize(workload) * frozen + _EXACT * 6 * adapter)


def step_all_cost(workload: Workload) -> Cost:
    """One fine-tuning step of all weights."""
    return Cost(flops=_gradient_flops(workload), bytes=_EXACT * 6 * _all_weights(workload))


def _gradient_flops(workload: Workload) -> int:
    layers, mixing = workload.config.num_hidden_layers, _mixing(workload)
    return layers * 3 * mixing + 6 * workload.tokens * _all_weights(workload)


def _mixing(workload: Workload) -> int:
    """Products of attention between queries, keys and values; going back costs twice as much."""
    return 4 * workload.tokens * workload.length * workload.config.hidden_size


def _all_weights(workload: Workload) -> int:
    return workload.config.num_hidden_layers * block_weights(workload) + _head(workload)


def _head(workload: Workload) -> int:
    return workload.config.hidden_size * workload.config.vocab_size


def _itemsize(workload: Workload) -> int:
    return jnp.dtype(workload.dtype).itemsize
