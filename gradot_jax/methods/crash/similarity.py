"""Similarity of layers and the clusters that it makes: the CR of CRaSh (Zhang et al. 2023).

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))
    HSIC(X, Y) = sum(H X X^T H * H Y Y^T H) = || (H Y)^T (H X) ||_F^2      H = 1 - 1/n

X and Y `[n, D]` are what two layers make of the same n sequences; H takes the mean of each feature
out. Merging the most similar neighbours until K clusters remain, where two clusters are as similar
as the layers that meet, is cutting at the K - 1 smallest similarities: merging changes none of
them.
"""

from collections.abc import Sequence
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def adjacent_cka(representations: jax.Array) -> jax.Array:
    """Linear CKA of each layer with the next.

    Args:
        representations: `[L, n, D]`, of L layers for the same n inputs.

    Returns:
        `[L - 1]` in [0, 1], float32; NaN next to a layer that tells no input from another.
    """
    chex.assert_rank(representations, 3)
    features = representations.astype(jnp.float32)
    features = features - features.mean(1, keepdims=True)
    # CKA does not see the scale, and its fourth power could leave the range.
    features = features / jnp.sqrt(jnp.square(features).sum((1, 2), keepdims=True))
    own = jax.vmap(_hsic)(features, features)
    cross = jax.vmap(_hsic)(features[:-1], features[1:])
    return cross / jnp.sqrt(own[:-1] * own[1:])


def _hsic(x: jax.Array, y: jax.Array) -> jax.Array:
    # Two forms of one number; the smaller of [n, n] and [D, D] is all that is held.
    highest = jax.lax.Precision.HIGHEST
    if x.shape[0] < x.shape[1]:
        grams = jnp.dot(x, x.T, precision=highest) * jnp.dot(y, y.T, precision=highest)
        return grams.sum()
    return jnp.square(jnp.dot(y.T, x, precision=highest)).sum()


def contiguous_clusters(adjacent: np.ndarray, count: int) -> tuple[tuple[int, ...], ...]:
    """Cuts layers in depth order where neighbours are least alike.

    Args:
        adjacent: `[L - 1]`, similarity of each layer with the next.
        count: K, clusters, 1 to L.

    Returns:
        Layers 0..L-1 by cluster; of equal similarities the lower one is cut.

    Raises:
        ValueError: for a count out of range.
    """
    num_layers = len(adjacent) + 1
    if not 1 <= count <= num_layers:
        raise ValueError(f"count must lie in [1, {num_layers}], got {count}")
    cuts = np.sort(np.argsort(adjacent, kind="stable")[: count - 1]) + 1
    bounds = (0, *cuts.tolist(), num_layers)
    return tuple(tuple(range(start, stop)) for start, stop in pairwise(bounds))


def representatives(clusters: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The layer that stands for each cluster: its middle one, the upper of two."""
    return tuple(cluster[len(cluster) // 2] for cluster in clusters)


def spread_positions(num_kept: int, count: int) -> tuple[int, ...]:
    """Positions of the trained layers among the kept ones.

    The rule is read off the layer lists that were published with CRaSh.

    Args:
        num_kept: K, kept layers.
        count: n <= K, layers to train.

    Returns:
        `ceil(i (K - 1) / (n - 1))` for i = 0..n-1; the first for n = 1.
    """
    if count == 1:
        return (0,)
    return tuple(-(-i * (num_kept - 1) // (count - 1)) for i in range(count))


def nearest_kept(kept: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The kept layer nearest to each of layers 0..L-1, of two the one to the right."""
    return tuple(
        min(kept, key=lambda layer: (abs(layer - place), -layer)) for place in range(num_layers)
    )
