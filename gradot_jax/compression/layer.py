"""Compression of one layer: decompose, score, order, and cut to size.

A layer is its attention kernels, stacked, and its MLP. Methods differ in how they score; all
share what is here. The rules are in `compression.rule`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from gradot_jax.compression.budget import rank_pool
from gradot_jax.compression.channel import prune_channels
from gradot_jax.compression.compensation import refit_channels, refit_low_rank, shift_bias
from gradot_jax.compression.options import AttentionCompensation, MLPCompensation
from gradot_jax.compression.rank import factorise, keep_order
from gradot_jax.compression.score import ScoreTerms
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.parallel import DeviceMesh


class LayerWeights(NamedTuple):
    """The compressible maps of one layer.

    Attributes:
        attention: kernels `[S, D_in, D_out]` and biases `[S, D_out]` (or None) of S sites.
        fc1: `D -> F`.
        fc2: `F -> D`.
    """

    attention: Dense
    fc1: Dense
    fc2: Dense


class LayerFactors(NamedTuple):
    """Kronecker factors of the same maps; those of attention with a leading site axis."""

    attention: KroneckerFactors
    fc1: KroneckerFactors
    fc2: KroneckerFactors


class LayerTerms(NamedTuple):
    """Score terms of a layer: components `[S, K]` and channels `[F]`."""

    components: ScoreTerms
    channels: ScoreTerms


class ScoringRule(NamedTuple):
    """How a method scores a layer.

    Attributes:
        decompose: of attention kernels `[S, D_in, D_out]`, the factors and a mesh or None, over
            whose devices the sites are spread; components, most important first.
        terms: score terms of the components and of the channels.
        decomposes_alone: whether `decompose` looks at kernels alone, so that those of several
            layers can be decomposed at once.
    """

    decompose: Callable[..., SVD]
    terms: Callable[[LayerWeights, SVD, LayerFactors | None], LayerTerms]
    decomposes_alone: bool = False


class Candidate(NamedTuple):
    """A layer ready to be cut: all that is needed once its counts are known.

    Attributes:
        weights: the original maps.
        decomposition: components of the attention kernels, leading site axis.
        terms: score terms.
        factors: kept only where a compensation will read them.
    """

    weights: LayerWeights
    decomposition: SVD
    terms: LayerTerms
    factors: LayerFactors | None


def propose(
    weights: LayerWeights,
    factors: LayerFactors | None,
    rule: ScoringRule,
    mesh: DeviceMesh | None = None,
    decomposition: SVD | None = None,
) -> Candidate:
    """Decomposes and scores one layer.

    Args:
        weights: the layer, in the dtype in which it is stored; on a mesh whole on each device.
        factors: of the same layer, likewise; None for a rule that reads none.
        rule: see `compression.rule`.
        mesh: devices to spread the decompositions over.
        decomposition: where it is known already.

    Raises:
        ValueError: when the rule needs factors and there are none, or for a kernel or a factor
            that is not finite.
    """
    if decomposition is None:
        decomposition = rule.decompose(weights.attention.kernel, factors, mesh)
    return Candidate(weights, decomposition, rule.terms(weights, decomposition, factors), factors)


@partial(jax.jit, static_argnames=("floor",))
def component_order(scores: jax.Array, floor: int) -> jax.Array:
    """Order in which each site keeps its components, `[S, K]` to `[S, K]`."""
    return jax.vmap(partial(keep_order, floor=floor))(scores)


def cut_attention(
    candidate: Candidate,
    site: int,
    order: np.ndarray,
    rank: int,
    compensation: AttentionCompensation,
    damping: float,
) -> tuple[Dense | LowRank, tuple[int, ...] | None]:
    """One attention map at its rank, and the components that it keeps.

    A cut is made on the host: on a device each new rank would be a new program to compile.

    Args:
        candidate: the layer.
        site: index of the map.
        order: its `component_order`, `[K]`.
        rank: components to keep; from the rank where two factors save nothing the original
            matrix is kept.
        compensation: see `compression.compensation`.
        damping: of the refit.

    Returns:
        The map, and ascending indices or None for the original.
    """
    original = jax.tree.map(lambda leaf: leaf[site], candidate.weights.attention)
    if rank >= rank_pool(*original.shape).cap:
        return original, None
    kept = np.sort(order[:rank])
    decomposition = jax.tree.map(lambda leaf: leaf[site], candidate.decomposition)
    left, right = factorise(decomposition, kept)
    reduced = LowRank(left, right, original.bias)
    if compensation != "none":
        assert candidate.factors is not None
        factors = jax.tree.map(lambda leaf: leaf[site], candidate.factors.attention)
        if compensation == "bias":
            reduced = shift_bias(original, reduced, factors)
        else:
            reduced = refit_low_rank(original, reduced, factors, damping)
    dtype = original.kernel.dtype
    return jax.tree.map(lambda leaf: leaf.astype(dtype), reduced), tuple(map(int, kept))


def cut_mlp(
    candidate: Candidate,
    order: np.ndarray,
    count: int,
    compensation: MLPCompensation,
    damping: float,
) -> tuple[Dense, Dense, tuple[int, ...]]:
    """The MLP at its number of channels, and the channels that it keeps, ascending."""
    fc1, fc2 = candidate.weights.fc1, candidate.weights.fc2
    if count >= fc1.shape[1]:
        return fc1, fc2, tuple(range(fc1.shape[1]))
    kept = np.sort(order[:count])
    small1, small2 = prune_channels(fc1, fc2, kept)
    if compensation == "refit":
        assert candidate.factors is not None
        kernel = refit_channels(fc2, kept, candidate.factors.fc2, damping)
        small2 = small2.replace(kernel=kernel)
    return small1, small2, tuple(map(int, kept))
