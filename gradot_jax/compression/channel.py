"""SCP, selective channel pruning: an MLP on the hidden channels that are kept.

GradOT, section 3.3. Cuts are made on the host, as in `compression.rank`. The refit, which lets what
is kept stand in for what was removed, is not in the paper. On calibration inputs it lowers the
gradient error of MLPs markedly; it also makes the emulator a better model, and can lose what
calibration never shows.
"""

from collections.abc import Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.least_squares import refit_rows
from gradot_jax.nn.layout import Channels
from gradot_jax.nn.linear import Dense

ChannelCompensation = Literal["none", "refit"]


def cut_channels(
    channels: Channels,
    layer: Mapping[str, Dense],
    order: np.ndarray,
    count: int,
    *,
    compensation: ChannelCompensation = "none",
    factors: KroneckerFactors | None = None,
    damping: float = 0.0,
) -> tuple[dict[str, Dense], tuple[int, ...]]:
    """The maps of an MLP at its number of channels, and the channels that it keeps, ascending.

    Args:
        channels: which maps those are.
        layer: them, dense.
        order: of keeping, `[F]`.
        count: channels to keep.
        compensation: `refit` fits the map out of the channels on the calibration activations.
        factors: of that map; read by a compensation only.
        damping: of the refit.

    Raises:
        ValueError: for a compensation without factors.
    """
    sites, size = (*channels.into, channels.out), layer[channels.out].shape[0]
    if count >= size:
        return {site: layer[site] for site in sites}, tuple(range(size))
    kept = np.sort(order[:count])
    small = prune_channels(channels, layer, kept)
    if compensation == "refit":
        if factors is None:
            raise ValueError("compensation 'refit' needs Kronecker factors")
        kernel = refit_channels(layer[channels.out], kept, factors, damping)
        small[channels.out] = small[channels.out].replace(kernel=kernel)
    return small, tuple(map(int, kept))


def prune_channels(
    channels: Channels, layer: Mapping[str, Dense], kept: np.ndarray
) -> dict[str, Dense]:
    """The maps of an MLP on the kept channels alone.

    Args:
        channels: which maps those are.
        layer: kernels `[D, F]` into the channels, `[F, D]` out of them; the latter's bias is
            untouched.
        kept: indices of channels, `[C]`, ascending.

    Returns:
        Maps `D -> C` and `C -> D` by site.
    """
    pruned = {}
    for site in channels.into:
        kernel, bias = np.asarray(layer[site].kernel), layer[site].bias
        pruned[site] = Dense(kernel[:, kept], None if bias is None else np.asarray(bias)[kept])
    out = jax.tree.map(np.asarray, layer[channels.out])
    return pruned | {channels.out: Dense(out.kernel[kept], out.bias)}


def refit_channels(
    original: Dense, kept: np.ndarray, factors: KroneckerFactors, damping: float
) -> np.ndarray:
    """Least-squares refit of the kept rows on the calibration activations, `refit_rows`.

    Args:
        original: the map out of the channels, kernel `[F, D]`.
        kept: indices of channels, `[C]`.
        factors: of that map.
        damping: ridge towards the original weights, relative to the mean diagonal.

    Returns:
        Kernel `[C, D]`.
    """
    moment, kernel = np.asarray(factors.input_covariance), np.asarray(original.kernel)
    return refit_rows(moment, kernel, kept, damping).astype(original.kernel.dtype)


def elimination_costs(fisher: jax.Array) -> jax.Array:
    """What each channel costs when channels are eliminated greedily, one by one, as a set.

    With M the Fisher of removals, removing the set S costs `1_S^T M 1_S`. Each step removes the
    channel j that adds least, `M_jj + 2 sum_{i in S} M_ij`; of equals, the one of highest index.

    Args:
        fisher: M, `[F, F]`, see `KroneckerFactors.removal_fisher`.

    Returns:
        `[F]`: the added cost at the channel's elimination, raised where it would fall from one
        step to the next, so that falling costs are the order of elimination backwards.
    """
    size = fisher.shape[0]
    chex.assert_shape(fisher, (size, size))
    # Wide enough to survive a change of scale: equal costs would lose the order.
    gap = 1 + 4 * jnp.finfo(fisher.dtype).eps

    def eliminate(_, state):
        added, costs, last = state
        channel = size - 1 - jnp.argmin(added[::-1])
        last = jnp.maximum(added[channel], last * gap)
        added = (added + 2 * fisher[channel]).at[channel].set(jnp.inf)
        return added, costs.at[channel].set(last), last

    start = jnp.diagonal(fisher), jnp.zeros_like(fisher[0]), jnp.zeros_like(fisher[0, 0])
    return jax.lax.fori_loop(0, size, eliminate, start)[1]
