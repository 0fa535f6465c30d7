"""Floors: the least time that a phase could take on this machine, from formulas and rates.

    floor = max(FLOPs / rate + exact FLOPs / exact rate, bytes / rate of copying)

FLOPs count matrix products only, without recomputation that the method does not need. *Exact*
ones are those that the method does in float32 at the highest precision whatever the dtype of the
rest: Kronecker factors, decompositions, scores. Bytes count each array that a program must take
in or hand out once; what lies between may stay in cache, and biases and norms are left out. The
rates are measured in the same run (`harness.measure_rates`).

With N = B T tokens in a batch, S batches, L blocks of which M are the middle, P the top adapter
and A the adapter, W weights in the linear maps of a block, Q the width of all queries, E entries
of a block's factors and e rows, and c bytes a number of the workload's dtype (2 in bfloat16):

    products                          FLOPs
    block, forward                    2 N W + 4 N T Q
    block, gradient of inputs         2 N W + 8 N T Q
    block, gradient of weights        2 N W
    block, Kronecker factors          2 N E                              exact
    the same, each pair once          N (E + e)                          exact
    head, each of the three           2 N D V
    decomposition of [m, n], m >= n   min(8 m n^2 - 4/3 n^3,
                                          6 m n^2 + 4 n^3)               exact
    scores of components, [m, n]      2 n (m^2 + n^2)                    exact
    scores of channels                2 F D^2 for each map               exact

    phase                FLOPs                               bytes
    gradient             L blocks and head, all three        2 c (L W + D V)
    calibration forward  S (L blocks, forward; P blocks and  c (L W + D V + 2 S L N D)
                         head, inputs)
    factor sweep         S M (block but the map out of the   M (c W + 3 c S N D + 4 E)
                         channels, forward; block, inputs;
                         factors)
    decomposition        low-rank maps                       4 (2 m n + n^2) of each
    selection            scores of a block                   4 (W + E + W') and
                                                             4 n (m + n) of each
    compress             those four, the last two M times    the same
    packaging            none                                2 c (all weights of the bundle)
    step, emulator       L blocks, head: forward, inputs;    c (frozen weights) + 4 * 6 A W
                         A blocks: weights
    step, full           the same around M original blocks   the same
    step, all            gradient                            4 * 6 (L W + D V)

Sites that read one input share its factor: with G K the width of keys and values,

    OPT                  W = 4 D^2 + 2 D F                   E = 8 D^2 + 2 F^2
    Llama                W = 2 D Q + 2 D G K + 3 D F         E = 4 D^2 + 2 Q^2 + 2 (G K)^2 + 3 F^2

All T^2 pairs of attention count. The steps' bytes are those of AdamW: a weight and two moments in
and out, in float32. A map of the emulator with rank R has R (m + n) weights; W' is the weights of
a compressed block. The decomposition counts what any algorithm by bidiagonalisation pays (Golub
and Van Loan, sections 5.4 and 8.6), of the matrix itself or of the triangle of its QR: for the
bidiagonal form 4 m n^2 - 4/3 n^3, for the orthogonal factors applied back 4 m n^2 - 2 n^3 and
2 n^3.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from benchmarks.workloads import Workload
from gradot_jax.models.family import channel_count
from gradot_jax.models.tensors import layer_shapes
from gradot_jax.nn.layout import Block, maps

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
    return _weights(_block(workload))


def emulator_block_weights(workload: Workload) -> int:
    """W', weights of the linear maps of one compressed block."""
    return _weights(layer_shapes(workload.config, workload.layer_shape))


def factor_entries(workload: Workload) -> int:
    """E, entries of a block's A and G."""
    return sum(width**2 for width in _factor_widths(workload))


def _factor_widths(workload: Workload) -> list[int]:
    """Of each A, one for all sites that read one input, and of each G."""
    block = _block(workload)
    sites = maps(block)
    inputs = {site.reads: sites[site.name].shape[0] for site in block.layout.sites}
    return [*inputs.values(), *(weights.shape[1] for weights in sites.values())]


def low_rank_shapes(workload: Workload) -> list[tuple[int, int]]:
    """`(m, n)`, m at least n, of the kernels of a block that are decomposed."""
    block = _block(workload)
    shapes = (maps(block)[site].shape for site in block.layout.low_rank)
    return [(max(shape), min(shape)) for shape in shapes]


def _block(workload: Workload) -> Block:
    return workload.config.family.block_shapes(workload.config)


def _weights(block: Block) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(maps(block)) if leaf.ndim == 2)


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

    The block's own output is not needed, so the forward product out of the channels does not
    count.

    Args:
        workload: the shapes.
        num_layers: middle layers swept; None for all.
    """
    weights, tokens, batches = block_weights(workload), workload.tokens, workload.num_batches
    entries, block = factor_entries(workload), _block(workload)
    out = math.prod(maps(block)[block.layout.channels.out].shape)
    stream = 3 * batches * tokens * workload.config.hidden_size
    layer = Cost(
        flops=batches * (2 * tokens * (2 * weights - out) + 3 * _mixing(workload)),
        exact_flops=batches * 2 * tokens * entries,
        symmetric_flops=batches * tokens * (entries + sum(_factor_widths(workload))),
        bytes=_itemsize(workload) * (weights + stream) + _EXACT * entries,
    )
    return layer * (workload.num_middle if num_layers is None else num_layers)


def decomposition_cost(workload: Workload) -> Cost:
    """Decomposition of the low-rank maps of one middle block."""
    shapes = low_rank_shapes(workload)
    thirds = sum(min(24 * m - 4 * n, 18 * m + 12 * n) * n * n for m, n in shapes)
    return exact(thirds // 3, _EXACT * sum(2 * m * n + n * n for m, n in shapes))


def selection_cost(workload: Workload) -> Cost:
    """Scores of one middle block, its orders of keeping and the block cut to size."""
    shapes, config = low_rank_shapes(workload), workload.config
    num_maps = len(config.family.layout.channels.into) + 1
    flops = sum(2 * n * (m * m + n * n) for m, n in shapes)
    flops += 2 * num_maps * channel_count(config) * config.hidden_size**2
    moved = block_weights(workload) + factor_entries(workload) + sum(n * (m + n) for m, n in shapes)
    return exact(flops, _EXACT * (moved + emulator_block_weights(workload)))


def compression_cost(workload: Workload) -> Cost:
    """A compression from end to end."""
    layer = decomposition_cost(workload) + selection_cost(workload)
    return forward_cost(workload) + sweep_cost(workload) + layer * workload.num_middle


def packaging_cost(workload: Workload) -> Cost:
    """Writing the bundle: everything in it is read and written."""
    config = workload.config
    shell = jax.tree.leaves(config.family.shell_shapes(config))
    weights = workload.num_middle * emulator_block_weights(workload)
    weights += workload.num_outer * block_weights(workload)
    weights += sum(leaf.size for leaf in shell if leaf.ndim == 2)
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
    block = _block(workload)
    # Outside the MLP a map that is split by rows reads what attention mixed.
    rows = {site.name for site in block.layout.sites if site.split == "row"}
    (out,) = rows & {*block.layout.low_rank}
    return 4 * workload.tokens * workload.length * maps(block)[out].shape[0]


def _all_weights(workload: Workload) -> int:
    return workload.config.num_hidden_layers * block_weights(workload) + _head(workload)


def _head(workload: Workload) -> int:
    return workload.config.hidden_size * workload.config.vocab_size


def _itemsize(workload: Workload) -> int:
    return jnp.dtype(workload.dtype).itemsize
