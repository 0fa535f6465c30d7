"""Compression of every middle layer in width: the part that the scoring methods share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import (
    Pool,
    channel_pool,
    global_counts,
    rank_pool,
    uniform_counts,
)
from gradot_jax.compression.layer import (
    Candidate,
    LayerTerms,
    ScoringRule,
    component_order,
    cut_attention,
    cut_mlp,
    propose,
)
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import LayerPlan
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import combine
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import ATTENTION_SITES, Block, depth, get_block
from gradot_jax.offsite.calibrate import (
    attention_and_mlp,
    layer_factors,
    run_forward,
    sweep_middle,
)
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.split import split_blocks
from gradot_jax.progress import track


def shrink_layers(problem: Problem, rule_of: Callable[[int], ScoringRule]) -> Outcome:
    """Sweeps, scores and cuts every middle layer; uniform allocation cuts as it goes.

    Args:
        problem: what to compress.
        rule_of: the rule for a layer, by its index in the middle.

    Raises:
        InputError: for a split that is no sandwich, unfit calibration, or scores not finite.
    """
    config, params, split, batches, options, mesh, _, progress = problem
    split.check_sandwich(options.method)
    _, middle = split_blocks(params, split)
    num_layers = depth(middle)
    pools = _pools(config, options)
    uniform = None
    if options.allocation == "uniform":
        uniform = [
            uniform_counts(group, b) for group, b in zip(pools, options.budgets, strict=True)
        ]
    _check_affordable(pools, options)
    calibration: dict[str, Any] = {}
    sweep = ((layer, None) for layer in reversed(range(num_layers)))
    if options.reads_factors:
        gradient = options.reads_gradient
        forward_pass = run_forward(
            config,
            params,
            split,
            track(batches, "calibration forward", enabled=progress),
            fisher=options.fisher,
            with_gradient=gradient,
            seed=options.seed,
            mesh=mesh,
        )
        calibration = {
            "loss": forward_pass.loss,
            "tokens": forward_pass.num_tokens,
            "sequences": forward_pass.num_sequences,
        }
        sweep = sweep_middle(
            config,
            params,
            split,
            forward_pass,
            with_gradient=gradient,
            with_removals=options.channel_score == "token-fisher",
        )
    candidates: dict[int, Candidate] = {}
    terms: dict[int, LayerTerms] = {}
    cut: dict[int, tuple[LayerPlan, Block]] = {}
    for layer, sites in track(sweep, "layers", total=num_layers, enabled=progress):
        block = get_block(middle, layer)
        factors = None if sites is None else layer_factors(sites)
        number = split.num_bottom + layer
        try:
            candidate = propose(attention_and_mlp(block), factors, rule_of(layer))
        except ValueError as error:
            raise InputError(f"layer {number}: {error}") from None
        if not options.compensates:
            candidate = candidate._replace(factors=None)
        terms[layer] = jax.device_get(candidate.terms)
        _check_finite(number, terms[layer])
        if uniform is None:
            candidates[layer] = candidate
        else:
            orders = _orders(candidate.terms, options, within_layer=True)
            cut[layer] = _cut(split, layer, block, candidate, orders, uniform, options)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(terms[i] for i in range(num_layers)))
    if uniform is None:
        orders = _orders(stacked, options, within_layer=False)
        counts = _global_counts(stacked, orders, pools, options)
        for layer, candidate in candidates.items():
            layer_orders = tuple(order[layer] for order in orders)
            layer_counts = [counts[0][layer], counts[1][layer]]
            block = get_block(middle, layer)
            cut[layer] = _cut(split, layer, block, candidate, layer_orders, layer_counts, options)
    scores = {
        f"{kind}_{term}": getattr(getattr(stacked, kind), term)
        for kind in ("components", "channels")
        for term in ("hessian", "gradient")
    }
    layers, blocks = zip(*(cut[i] for i in range(num_layers)), strict=True)
    return Outcome(layers, blocks, scores=scores, calibration=calibration)


def _check_finite(layer: int, terms: LayerTerms) -> None:
    # A NaN would sort somewhere and pass for a choice.
    if not all(np.isfinite(term).all() for term in jax.tree.leaves(terms)):
        raise InputError(
            f"layer {layer}: the scores are not finite; squares of its weights, of its activations "
            "on the calibration text or of their gradients overflow"
        )


def _check_affordable(pools: tuple[list[Pool], list[Pool]], options: CompressionOptions) -> None:
    """Raises InputError where even the least that may be kept is more than the budget."""
    multiples = options.rank_multiple, options.channel_multiple
    kinds = zip(("attention", "MLP"), pools, options.budgets, multiples, strict=True)
    for kind, group, budget, multiple in kinds:
        least = sum(pool.round_down(0) for pool in group) / sum(pool.cap for pool in group)
        if least > budget + 1e-9:
            raise InputError(
                f"budget {budget:g} of the {kind}: with 5 % of the candidates always kept, in "
                f"multiples of {multiple}, the least is {least:.3g}"
            )


def _pools(config: OPTConfig, options: CompressionOptions) -> tuple[list[Pool], list[Pool]]:
    """Pools of one layer: its attention matrices, and its MLP."""
    matrix = rank_pool(config.hidden_size, config.hidden_size, options.rank_multiple)
    return [matrix] * len(ATTENTION_SITES), [channel_pool(config.ffn_dim, options.channel_multiple)]


def _scores(terms: LayerTerms, options: CompressionOptions, *, within_layer: bool):
    """Scores of components and channels; terms are scaled within a matrix, or over all layers."""
    components, channels = terms
    if within_layer:
        scored = jax.vmap(lambda t: combine(t, options.lambda_attention))(components)
    else:
        scored = combine(jax.tree.map(jnp.asarray, components), options.lambda_attention)
    return scored, combine(jax.tree.map(jnp.asarray, channels), options.lambda_mlp)


def _orders(terms: LayerTerms, options: CompressionOptions, *, within_layer: bool):
    """Order of keeping: components `[..., 4, K]` and channels `[..., F]`."""
    components, channels = _scores(terms, options, within_layer=within_layer)
    size = components.shape[-1]
    floor = rank_pool(size, size).floor
    rows = component_order(components.reshape(-1, size), floor).reshape(components.shape)
    flat = channels.reshape(-1, channels.shape[-1])
    ranked = jax.vmap(lambda row: keep_order(row, 0))(flat).reshape(channels.shape)
    return np.asarray(rows), np.asarray(ranked)


def _global_counts(terms, orders, pools, options):
    """Counts per layer from one threshold over all layers: `[M][4]` and `[M][1]`."""
    num_layers = orders[0].shape[0]
    counts = []
    for score, order, group, budget in zip(
        _scores(terms, options, within_layer=False), orders, pools, options.budgets, strict=True
    ):
        ranked = np.take_along_axis(np.asarray(score), order, axis=-1)
        rows = list(ranked.reshape(num_layers * len(group), -1))
        flat = global_counts(group * num_layers, budget, rows)
        counts.append(np.reshape(flat, (num_layers, len(group))).tolist())
    return counts


def _cut(split, layer, block, candidate, orders, counts, options) -> tuple[LayerPlan, Block]:
    component_orders, channel_order = orders
    ranks, (channels,) = counts
    sites, kept = {}, []
    for index, site in enumerate(ATTENTION_SITES):
        sites[site], indices = cut_attention(
            candidate,
            index,
            component_orders[index],
            ranks[index],
            options.compensate_attention,
            options.damping,
        )
        kept.append((site, indices))
    fc1, fc2, kept_channels = cut_mlp(
        candidate, channel_order, channels, options.compensate_mlp, options.damping
    )
    plan = LayerPlan(layer=split.num_bottom + layer, components=tuple(kept), channels=kept_channels)
    return plan, block.replace(**sites, fc1=fc1, fc2=fc2)
