"""The owner's step: a model, a split and calibration text in; a plan and an emulator out."""

from collections.abc import Iterable
from typing import Any, NamedTuple

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
    component_order,
    cut_attention,
    cut_mlp,
    gradot_terms,
    magnitude_terms,
    propose,
)
from gradot_jax.compression.layer_drop import kept_layers
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import LayerPlan, Plan
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import combine
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    Block,
    Params,
    depth,
    get_block,
    segment_blocks,
)
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.calibrate import (
    attention_and_mlp,
    layer_factors,
    run_forward,
    sweep_middle,
)
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.split import AdapterSpec, split_blocks
from gradot_jax.parallel import DeviceMesh
from gradot_jax.progress import track

_TERMS = {"gradot": gradot_terms, "magnitude": magnitude_terms}


class Compression(NamedTuple):
    """All that a compression yields.

    Attributes:
        plan: stays with the owner.
        emulator: to ship.
        scores: score terms by name, `[M, 4, K]` and `[M, F]`; stay with the owner.
        calibration: record of the calibration (loss, tokens); stays with the owner.
    """

    plan: Plan
    emulator: Emulator
    scores: dict[str, np.ndarray]
    calibration: dict[str, Any]


def compress(
    config: OPTConfig,
    params: Params,
    split: AdapterSpec,
    calibration_batches: Iterable[Batch],
    **options: Any,
) -> tuple[Plan, Emulator]:
    """Compresses the middle of a model into an emulator.

    Args:
        config: the model's configuration.
        params: the full original model.
        split: which blocks are the adapter.
        calibration_batches: text of the owner's, of one shape; read by methods that score with it.
        **options: fields of `CompressionOptions`, such as `method` and `budget`.

    Returns:
        The plan, to keep, and the emulator, to ship.

    Raises:
        InputError: for an option out of range, a split without a middle or unfit calibration.
    """
    result = run_compression(
        config, params, split, calibration_batches, CompressionOptions(**options)
    )
    return result.plan, result.emulator


def run_compression(
    config: OPTConfig,
    params: Params,
    split: AdapterSpec,
    calibration_batches: Iterable[Batch],
    options: CompressionOptions,
    *,
    mesh: DeviceMesh | None = None,
    progress: bool = False,
) -> Compression:
    """`compress`, returning scores and the calibration record as well."""
    if options.compensate_attention == "bias" and not config.enable_bias:
        raise InputError("compensate_attention = 'bias' needs a model with biases")
    adapter, middle = split_blocks(params, split)
    scores: dict[str, np.ndarray] = {}
    calibration: dict[str, Any] = {}
    if options.method in _TERMS:
        layers, blocks, scores, calibration = _shrink_layers(
            config, params, split, calibration_batches, options, mesh, progress
        )
    else:
        count = _layers_to_keep(depth(middle), options)
        kept = kept_layers(depth(middle), count)
        layers = [_whole_layer(config, split.num_bottom + layer) for layer in kept]
        blocks = [get_block(middle, layer) for layer in kept]
    attention_budget, mlp_budget = options.budgets
    plan = Plan(
        method=options.method,
        attention_budget=attention_budget,
        mlp_budget=mlp_budget,
        num_bottom=split.num_bottom,
        num_top=split.num_top,
        layers=tuple(layers),
    )
    emulator = Emulator(params.shell, adapter, segment_blocks(blocks))
    return Compression(plan, emulator, scores, calibration)


def _layers_to_keep(num_layers: int, options: CompressionOptions) -> int:
    if options.method == "empty":
        return 0
    if options.attention_budget is not None or options.mlp_budget is not None:
        raise InputError("layer-drop keeps whole layers: give budget alone")
    return max(int(options.budget * num_layers + 0.5), 1)


def _whole_layer(config: OPTConfig, layer: int) -> LayerPlan:
    components = tuple((site, None) for site in ATTENTION_SITES)
    return LayerPlan(layer=layer, components=components, channels=tuple(range(config.ffn_dim)))


def _shrink_layers(config, params, split, batches, options, mesh, progress):
    """Sweeps, scores and cuts every middle layer; uniform allocation cuts as it goes."""
    _, middle = split_blocks(params, split)
    num_layers = depth(middle)
    pools = _pools(config, options)
    uniform = None
    if options.allocation == "uniform":
        uniform = [
            uniform_counts(group, b) for group, b in zip(pools, options.budgets, strict=True)
        ]
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
        sweep = sweep_middle(config, params, split, forward_pass, with_gradient=gradient)
    candidates: dict[int, Candidate] = {}
    terms: dict[int, LayerTerms] = {}
    cut: dict[int, tuple[LayerPlan, Block]] = {}
    for layer, sites in track(sweep, "layers", total=num_layers, enabled=progress):
        block = get_block(middle, layer)
        factors = None if sites is None else layer_factors(sites)
        candidate = propose(attention_and_mlp(block), factors, _TERMS[options.method])
        if not options.compensates:
            candidate = candidate._replace(factors=None)
        terms[layer] = jax.device_get(candidate.terms)
        _check_finite(split.num_bottom + layer, terms[layer])
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
    return layers, blocks, scores, calibration


def _check_finite(layer: int, terms: LayerTerms) -> None:
    # A NaN would sort somewhere and pass for a choice.
    if not all(np.isfinite(term).all() for term in jax.tree.leaves(terms)):
        raise InputError(
            f"layer {layer}: the scores are not finite; squares of its weights, of its activations "
            "on the calibration text or of their gradients overflow"
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
