"""SCP, selective channel pruning: removing hidden channels from fc1 and fc2 together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.nn.linear import Dense


def prune_channels(fc1: Dense, fc2: Dense, kept: np.ndarray) -> tuple[Dense, Dense]:
    """The MLP on the kept channels alone, on the host as `rank.factorise`.

    Args:
        fc1: kernel `[D, F]`, bias `[F]` or None.
        fc2: kernel `[F, D]`, bias `[D]` or None; the bias is untouched.
        kept: indices of channels, `[C]`, ascending.

    Returns:
        Maps `D -> C` and `C -> D`.
    """
    fc1, fc2 = jax.tree.map(np.asarray, (fc1, fc2))
    bias = None if fc1.bias is None else fc1.bias[kept]
    return Dense(fc1.kernel[:, kept], bias), Dense(fc2.kernel[kept], fc2.bias)


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
