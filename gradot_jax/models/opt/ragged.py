"""Layers of different ranks and channels in few stacks: zeros for fewer programs to compile.

Every stack is one scan, to be compiled once; filled up with zeros to the largest of them, layers
of different sizes share a stack and compute the same. Padding exists in memory only.

Zeros are paid for in each step, a compilation once or, from a cache, never. By
`benchmarks.ragged`, for the sizes that global allocation chooses, on a CPU: the twelve or twenty-
four different layers of a middle, each by itself, compile about as fast as in a few loops, a loop
being as dear as several layers; all in one loop compile in 0.1 to 0.8 s less and, with 40 to 110 %
of zeros, run a quarter to a half longer. That is repaid within tens of steps. So `WASTE` is zero;
sizes rounded up to multiples of 32 or 64 leave most layers different, and of 128 cost a seventh to a third.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.models.opt.params import Segment, Shared, num_stored
from gradot_jax.parallel import to_host

WASTE = 0.0
"""Zeros that training accepts, as a share of the weights; what an accelerator wants, whose
compiler is slower, is for `benchmarks.ragged` to say."""


def merge_segments(segments: Sequence[Segment], *, waste: float = WASTE) -> tuple[Segment, ...]:
    """The same layers in the fewest stacks with at most so many zeros.

    Stacks of other kinds or dtypes, and shared blocks, stay apart; a stack that is joined with no
    other is taken as it is.

    Args:
        segments: in depth order; those that differ in ranks and channels alone can be joined.
        waste: zeros, as a share of the weights of a run of such; 0 joins equal shapes alone.
    """
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and _kind(segment) == _kind(runs[-1][-1]) and not isinstance(segment, Shared):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return tuple(_join(run[part]) for run in runs for part in _fewest_stacks(run, waste))


def _kind(segment: Segment):
    leaves, structure = jax.tree.flatten(segment)
    return structure, [leaf.dtype for leaf in leaves]


def _fewest_stacks(run: Sequence[Segment], waste: float) -> list[slice]:
    """Where to cut a run of segments; of equally many stacks those with the fewest zeros."""
    shapes = np.array([[_matrix(leaf.shape) for leaf in jax.tree.leaves(s)] for s in run])
    count, layers = len(run), np.array([num_stored(segment) for segment in run])
    # Entries of one stack of the segments from row to column - 1.
    cost = np.full((count + 1, count + 1), np.inf)
    for start in range(count):
        largest = np.maximum.accumulate(shapes[start:]).prod(-1).sum(-1)
        cost[start, start + 1 :] = largest * np.cumsum(layers[start:])
    limit = (1 + waste) * (shapes.prod(-1).sum(-1) * layers).sum()
    least, last_cuts = cost[0], []
    while least[count] > limit:
        through = least[:, None] + cost
        last_cuts.append(through.argmin(0))
        least = through.min(0)
    bounds = [count]
    for cuts in reversed(last_cuts):
        bounds.insert(0, int(cuts[bounds[0]]))
    return [slice(*pair) for pair in pairwise((0, *bounds))]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a leaf of one layer, one row for a vector."""
    *rows, columns = shape[1:]
    return math.prod(rows), columns


def _join(segments: Sequence[Segment]) -> Segment:
    if len(segments) == 1:
        return segments[0]

    def join(*leaves):
        # On the host: on a device every shape would be a new program to compile.
        shape = np.max([leaf.shape[1:] for leaf in leaves], axis=0)
        joined = np.concatenate([_pad(np.asarray(to_host(leaf)), shape) for leaf in leaves])
        return jnp.asarray(joined) if isinstance(leaves[0], jax.Array) else joined

    return jax.tree.map(join, *segments)


def _pad(stack: np.ndarray, shape: np.ndarray) -> np.ndarray:
    missing = shape - stack.shape[1:]
    return np.pad(stack, [(0, 0), *((0, n) for n in missing)]) if missing.any() else stack
