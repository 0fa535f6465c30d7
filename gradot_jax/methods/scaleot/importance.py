"""Layer importance learned by trial: Dynamic LayerReplace and the choice from it (ScaleOT).

Each layer i has an importance s_i. Networks are sampled in which some layers run raw and the rest
are replaced; what the validation loss l_j of network j says is credited to its raw layers:

    p_i ~ U(0, sigmoid(s_i)),  layer i is raw where p_i is above the median of its group
    r_j = exp(-l_j) - mean_j exp(-l_j)
    s_i <- s_i + rate * sigma'(s_i) * sum over networks j with i raw of r_j

The accounts of the method leave open, and here it is settled, that all terms of the sum take the
slope sigma' = sigmoid (1 - sigmoid) before the update, and that a last group of one joins the
group before it: its layer is never above the median and would never be tried.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def layer_groups(num_layers: int, group_size: int) -> np.ndarray:
    """The group of each layer, `[L]`: consecutive layers, `group_size` to a group.

    The last group holds what is left, from two layers to `group_size + 1`.
    """
    groups = np.arange(num_layers) // group_size
    if num_layers > 1 and num_layers % group_size == 1:
        groups[-1] -= 1
    return groups


def sample_network(key: jax.Array, importance: jax.Array, group_size: int) -> jax.Array:
    """Which layers run raw in a network drawn by importance; in each group half do, rounded down.

    Booleans `[L]`, true where raw, from importance `[L]`.
    """
    chex.assert_rank(importance, 1)
    draws = jax.random.uniform(key, importance.shape) * jax.nn.sigmoid(importance)
    groups = layer_groups(importance.shape[0], group_size)
    # Above the median is to be among the larger half; counting needs no sort.
    same = groups[:, None] == groups[None]
    larger = (same & (draws[None] > draws[:, None])).sum(1)
    return larger < same.sum(1) // 2


def update_importance(
    importance: jax.Array, raw: jax.Array, losses: jax.Array, rate: float
) -> jax.Array:
    """Importance after the networks of one step were tried.

    Args:
        importance: `[L]`.
        raw: `[C, L]` booleans, which layers ran raw in each of C networks.
        losses: `[C]`, validation losses in nats per token.
        rate: factor on the update.

    Returns:
        `[L]`.
    """
    chex.assert_shape(raw, (losses.shape[0], importance.shape[0]))
    likelihoods = jnp.exp(-losses)
    rewards = likelihoods - likelihoods.mean()
    probability = jax.nn.sigmoid(importance)
    credit = jnp.where(raw, rewards[:, None], 0).sum(0)
    return importance + rate * probability * (1 - probability) * credit


def layers_to_replace(importance: np.ndarray, count: int, group_size: int) -> tuple[int, ...]:
    """The layers to replace: least important first in each group, evenly over the groups.

    Args:
        importance: `[M]`, of the layers that may be replaced, in depth order.
        count: number to replace, at most M.
        group_size: layers of a group.

    Returns:
        Ascending indices. The shares of any two groups differ by at most one layer of the
        smaller; an odd layer is taken from the group that holds the least important one.
    """
    groups = layer_groups(len(importance), group_size)
    same = groups[:, None] == groups[None]
    before = np.argsort(importance, kind="stable").argsort()
    rank = (same & (before[None] < before[:, None])).sum(1)
    # Webster's apportionment: the n-th of a group of size G is due at (n + 1/2) / G.
    due = (rank + 0.5) / same.sum(1)
    order = np.lexsort((before, due))
    return tuple(sorted(order[:count].tolist()))
