"""How much each layer keeps, and what: from budgets and scores to counts and orders.

A pool of candidates is the components of one low-rank site, or the channels of one layer. Attention
and MLPs have budgets of their own.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import (
    Pool,
    channel_pool,
    check_least,
    global_counts,
    least_budget,
    rank_pool,
    rounded_up,
    uniform_counts,
)
from gradot_jax.compression.plan import LayerShape
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import LayerTerms, ScoreTerms, combine
from gradot_jax.errors import InputError
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.table import Stored
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import maps

_CHANNELS = "channels"


class LayerCounts(NamedTuple):
    """How much a layer keeps: the rank of each low-rank site, and channels."""

    ranks: dict[str, int]
    channels: int


class LayerOrders(NamedTuple):
    """Orders of keeping: components `[K]` of each low-rank site, and channels `[F]`."""

    components: dict[str, np.ndarray]
    channels: np.ndarray


class LayerPools(NamedTuple):
    """Candidates of a layer: the components of each low-rank site, and its channels."""

    ranks: dict[str, Pool]
    channels: Pool


def forecast(config: ModelConfig, split: AdapterSpec, options: CompressionOptions) -> Stored:
    """What `shrink_layers` will store, see `methods.table.Stored`."""
    pools, layers = layer_pools(config, options), config.num_hidden_layers - split.num_blocks
    counts = uniform_layer_counts(pools, options, layers)
    if counts is None:
        shares = [
            {key: pool.within(budget * pool.whole) or pool.least for key, pool in group.items()}
            for group, budget in zip(
                _kinds(pools).values(), kind_budgets(pools, options), strict=True
            )
        ]
        counts = LayerCounts(shares[0], shares[1][_CHANNELS])
    ranks = ((site, r if r < pools.ranks[site].cap else None) for site, r in counts.ranks.items())
    return Stored((LayerShape(ranks=tuple(ranks), num_channels=counts.channels),) * layers)


def layer_pools(config: ModelConfig, options: CompressionOptions) -> LayerPools:
    """What there is to choose from in each layer."""
    block = config.family.block_shapes(config)
    layout, sites = block.layout, maps(block)
    ranks = {s: rank_pool(*sites[s].shape, options.rank_multiple) for s in layout.low_rank}
    number, d_out = sites[layout.channels.out].shape
    cost = d_out + sum(sites[site].shape[0] for site in layout.channels.into)
    return LayerPools(ranks, channel_pool(number, cost, options.channel_multiple))


def kind_budgets(pools: LayerPools, options: CompressionOptions) -> tuple[float, float]:
    """Budgets of attention and MLPs.

    Where one of them alone is asked for and is above the whole budget, the other has what is left.

    Raises:
        InputError: where both are asked for and exceed the whole budget, or one of them leaves
            the other less than its least.
    """
    kinds, whole = _kinds(pools), options.budget
    weights = [sum(pool.whole for pool in group.values()) for group in kinds.values()]
    shares = [weight / sum(weights) for weight in weights]
    asked = options.attention_budget, options.mlp_budget
    budgets = [whole if budget is None else budget for budget in asked]
    together = float(np.dot(shares, budgets))
    if together <= whole + 1e-9:
        return budgets[0], budgets[1]
    if None not in asked:
        raise InputError(
            f"attention_budget {asked[0]:g} and mlp_budget {asked[1]:g} are together "
            f"{rounded_up(together):g} of the middle's kernels, above budget {whole:g}"
        )
    other = asked.index(None)
    one = 1 - other
    group = list(list(kinds.values())[other].values())
    least = least_budget(group, each=options.allocation == "uniform")
    budgets[other] = round((whole - shares[one] * budgets[one]) / shares[other], 12)
    if budgets[other] < least - 1e-9:
        enough = shares[one] * budgets[one] + shares[other] * least
        raise InputError(
            f"budget {whole:g}: with {budgets[one]:g} of the {list(kinds)[one]}, and 5 % of the "
            f"candidates of the {list(kinds)[other]} always kept, the least is "
            f"{rounded_up(enough):g}"
        )
    return budgets[0], budgets[1]


def _kinds(pools: LayerPools) -> dict[str, dict[str, Pool]]:
    """Pools by what shares a budget."""
    return {"attention": pools.ranks, "MLPs": {_CHANNELS: pools.channels}}


def uniform_layer_counts(
    pools: LayerPools, options: CompressionOptions, num_layers: int
) -> LayerCounts | None:
    """What every layer keeps; None where scores decide, if the budget can be met at all."""
    uniform, found = options.allocation == "uniform", dict[str, int]()
    budgets = dict(zip(_kinds(pools), kind_budgets(pools, options), strict=True))

    def least(kind: str) -> float:
        return least_budget(list(_kinds(pools)[kind].values()), each=uniform)

    # A refusal names the least that both can do with.
    for kind in sorted(budgets, key=least, reverse=True):
        group = _kinds(pools)[kind]
        if uniform:
            counts = uniform_counts(list(group.values()), budgets[kind], kind)
            found |= zip(group, counts, strict=True)
        else:
            check_least(list(group.values()) * num_layers, budgets[kind], kind)
    if not uniform:
        return None
    return LayerCounts({site: found[site] for site in pools.ranks}, found[_CHANNELS])


@partial(jax.jit, static_argnames=("attention", "mlp"))
def layer_orders(terms: LayerTerms, attention: float, mlp: float) -> LayerOrders:
    """Orders of keeping within a layer, by scores whose terms are scaled within each matrix.

    `attention` and `mlp` are the lambdas of components and of channels.
    """
    orders = {
        site: keep_order(combine(own, attention), _floor(own.hessian.shape[-1]))
        for site, own in terms.components.items()
    }
    return LayerOrders(orders, keep_order(combine(terms.channels, mlp), 0))


def lambdas(options: CompressionOptions) -> tuple[float, float]:
    """Lambda of attention and MLPs; 0 where the method knows no gradient."""
    return options.lambda_attention or 0.0, options.lambda_mlp or 0.0


def _floor(size: int) -> int:
    return rank_pool(size, size).floor


def global_orders_and_counts(
    terms: LayerTerms, pools: LayerPools, options: CompressionOptions
) -> tuple[list[LayerOrders], list[LayerCounts]]:
    """Of each layer, by one threshold over all layers; `terms` have a leading layer axis."""
    of_components = {site: terms.components[site] for site in pools.ranks}
    kinds = (of_components, {_CHANNELS: terms.channels})
    num_layers = len(terms.channels.hessian)
    orders: list[dict[str, np.ndarray]] = [{} for _ in range(num_layers)]
    counts: list[dict[str, int]] = [{} for _ in range(num_layers)]
    grouped = zip(
        _kinds(pools).items(), kinds, lambdas(options), kind_budgets(pools, options), strict=True
    )
    for (kind, group), of_kind, weight, budget in grouped:
        scores = _combined(of_kind, weight)
        places = [(layer, key) for layer in range(num_layers) for key in group]
        ranked = []
        for layer, key in places:
            floor = 0 if key == _CHANNELS else _floor(scores[key].shape[-1])
            orders[layer][key] = np.asarray(keep_order(jnp.asarray(scores[key][layer]), floor))
            ranked.append(scores[key][layer][orders[layer][key]])
        flat = global_counts([group[key] for _, key in places], budget, ranked, kind)
        for (layer, key), count in zip(places, flat, strict=True):
            counts[layer][key] = count
    return (
        [LayerOrders(own, own.pop(_CHANNELS)) for own in orders],
        [LayerCounts(own, own.pop(_CHANNELS)) for own in counts],
    )


def _combined(terms: Mapping[str, ScoreTerms], weight: float) -> dict[str, np.ndarray]:
    """Scores `[M, K]` by key, their terms scaled over everything that is ranked together."""
    flat = jax.tree.map(
        lambda *leaves: jnp.asarray(np.concatenate(leaves, axis=1)), *terms.values()
    )
    ends = np.cumsum([own.hessian.shape[1] for own in terms.values()])[:-1]
    return dict(zip(terms, np.split(np.asarray(combine(flat, weight)), ends, axis=1), strict=True))
