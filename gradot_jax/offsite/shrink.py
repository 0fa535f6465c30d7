"""Compression of every middle layer in width: the part that the scoring methods share."""

import dataclasses
from collections.abc import Callable, Iterator
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
    LayerFactors,
    LayerTerms,
    ScoringRule,
    component_order,
    cut_attention,
    cut_mlp,
    propose,
)
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import LayerPlan, layer_values, read_layer
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import combine
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.files.mapped import release_pages
from gradot_jax.linalg.svd import SVD
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import ATTENTION_SITES, Block, layers_at
from gradot_jax.offsite.calibrate import (
    attention_and_mlp,
    layer_factors,
    run_forward,
    sweep_inputs,
    sweep_middle,
)
from gradot_jax.offsite.layer_store import LayerStore, StoredLayer, pack, unpack, weights_digest
from gradot_jax.offsite.method import Outcome, Problem
from gradot_jax.offsite.names import middle_layer_from_tensors, middle_to_tensors
from gradot_jax.parallel import put, to_host
from gradot_jax.progress import track

Counts = tuple[list[int], list[int]]
"""Ranks of the attention sites, and the number of channels."""


def shrink_layers(problem: Problem, rule_of: Callable[[int], ScoringRule]) -> Outcome:
    """Sweeps, scores and cuts every middle layer; uniform allocation cuts as it goes.

    A layer that is done leaves the devices. In `problem.checkpoints` it outlives the process; a
    compression that goes on only passes through it.

    Args:
        problem: what to compress.
        rule_of: the rule for a layer, by its index in the middle.

    Raises:
        InputError: for a split that is no sandwich, unfit calibration, scores not finite, or
            checkpoints of another compression.
    """
    config, split, options = problem.config, problem.split, problem.options
    split.check_sandwich(options.method)
    num_layers = problem.params.num_layers - split.num_blocks
    pools = _pools(config, options)
    _check_affordable(pools, options)
    store = _open_store(problem)
    finished = store.finished
    calibration, sweep = _sweep(problem, finished, num_layers)
    counts = _uniform_counts(pools, options)
    ahead = _Ahead(problem, [i for i in reversed(range(num_layers)) if i not in finished])
    remaining = num_layers - len(finished)
    for layer, sites in track(sweep, "layers", total=remaining, enabled=problem.progress):
        candidate = _propose(problem, layer, sites, rule_of(layer), ahead)
        if sites is not None:
            # Whoever still holds the dictionary must not hold the factors while the next are made.
            sites.clear()
        arrays, values = pack("terms", candidate.terms), {"calibration": calibration}
        if counts is None:
            arrays |= pack("decomposition", candidate.decomposition)
            arrays |= pack("factors", candidate.factors)
        else:
            orders = _orders(candidate.terms, options, within_layer=True)
            plan, block = _cut(problem, layer, candidate, orders, counts)
            arrays |= middle_to_tensors([block], [plan.shape])
            values["plan"] = layer_values(plan)
        store.save(layer, arrays, values)
        del candidate, arrays
        if isinstance(problem.params.shell.embed_tokens, np.ndarray):
            release_pages(jax.tree.leaves(_original(problem, layer)))
    terms = [unpack(LayerTerms, "terms", store.load(i).arrays) for i in range(num_layers)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *terms)
    if counts is None:
        done = _cut_globally(problem, store, stacked, pools)
    else:
        done = [_read_layer(problem, store.load(layer)) for layer in range(num_layers)]
    scores = {
        f"{kind}_{term}": getattr(getattr(stacked, kind), term)
        for kind in ("components", "channels")
        for term in ("hessian", "gradient")
    }
    plans, blocks = zip(*done, strict=True)
    return Outcome(plans, blocks, scores=scores, calibration=store.load(0).values["calibration"])


def _open_store(problem: Problem) -> LayerStore:
    if problem.checkpoints is None:
        return LayerStore(None, {})
    from gradot_jax.offsite.checkpoint import tree_digest

    return LayerStore(
        problem.checkpoints,
        {
            "options": dataclasses.asdict(problem.options),
            "split": dataclasses.asdict(problem.split),
            "config": dataclasses.asdict(problem.config),
            "weights": weights_digest(problem.params),
            "calibration text": tree_digest(problem.batches),
            "dtype": str(problem.dtype),
        },
    )


def _sweep(
    problem: Problem, finished: set[int], num_layers: int
) -> tuple[dict[str, Any], Iterator[tuple[int, dict[str, KroneckerFactors] | None]]]:
    """A record of the calibration; and the layers that are left with their factors."""
    config, params, split, batches, options, mesh, _, _, dtype, offload = problem
    left = [layer for layer in reversed(range(num_layers)) if layer not in finished]
    if options.reads == "weights" or not left:
        return {}, ((layer, None) for layer in left)
    if options.reads == "inputs":
        record = {"sequences": sum(batch.input_ids.shape[0] for batch in batches)}
        return record, sweep_inputs(
            config, params, split, batches, mesh=mesh, dtype=dtype, finished=finished
        )
    forward_pass = run_forward(
        config,
        params,
        split,
        batches,
        fisher=options.fisher,
        with_gradient=options.reads_gradient,
        seed=options.seed,
        mesh=mesh,
        dtype=dtype,
        offload=offload,
        progress=problem.progress,
    )
    record = {
        "loss": forward_pass.loss,
        "tokens": forward_pass.num_tokens,
        "sequences": forward_pass.num_sequences,
    }
    return record, sweep_middle(
        config,
        params,
        split,
        forward_pass,
        with_gradient=options.reads_gradient,
        with_removals=options.channel_score == "token-fisher",
        finished=finished,
    )


def _original(problem: Problem, layer: int) -> Block:
    """A layer of the middle; on the host where it lies there, or on several devices."""
    (block,) = layers_at(problem.params, [problem.split.num_bottom + layer])
    return block if problem.mesh is None else to_host(block)


class _Ahead:
    """Decompositions that need no factors, of as many layers at once as a mesh has devices for."""

    def __init__(self, problem: Problem, layers: list[int]):
        self._problem, self._layers = problem, layers
        self._known: dict[int, SVD] = {}

    def take(self, layer: int, rule: ScoringRule) -> SVD | None:
        """That of a layer, once; None where it is to be made with the layer's factors."""
        mesh = self._problem.mesh
        if mesh is None or not rule.decomposes_alone:
            return None
        if layer not in self._known:
            sites = len(ATTENTION_SITES)
            start = self._layers.index(layer)
            group = self._layers[start : start + max(mesh.mesh.size // sites, 1)]
            blocks = (attention_and_mlp(_original(self._problem, i)) for i in group)
            kernels = np.concatenate([block.attention.kernel for block in blocks])
            together = rule.decompose(kernels, None, mesh)
            for place, member in enumerate(group):
                rows = slice(sites * place, sites * (place + 1))
                self._known[member] = jax.tree.map(lambda leaf, rows=rows: leaf[rows], together)
        return self._known.pop(layer)


def _propose(
    problem: Problem,
    layer: int,
    sites: dict[str, KroneckerFactors] | None,
    rule: ScoringRule,
    ahead: _Ahead,
) -> Candidate:
    """A layer's candidate, with what the cut will read and on a device that it can read."""
    weights = attention_and_mlp(_original(problem, layer))
    if problem.mesh is not None:
        weights = put(weights, problem.mesh.replicated)
    number = problem.split.num_bottom + layer
    try:
        factors = None if sites is None else layer_factors(sites)
        candidate = propose(weights, factors, rule, problem.mesh, ahead.take(layer, rule))
    except ValueError as error:
        raise InputError(f"layer {number}: {error}") from None
    if not problem.options.compensates:
        candidate = candidate._replace(factors=None)
    candidate = candidate._replace(terms=to_host(candidate.terms))
    _check_finite(number, candidate.terms)
    return candidate if problem.mesh is None else to_host(candidate)


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


def _uniform_counts(pools: tuple[list[Pool], list[Pool]], options) -> Counts | None:
    if options.allocation != "uniform":
        return None
    ranks, channels = (
        list(uniform_counts(group, budget))
        for group, budget in zip(pools, options.budgets, strict=True)
    )
    return ranks, channels


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


def _cut(
    problem: Problem, layer: int, candidate: Candidate, orders, counts: Counts
) -> tuple[LayerPlan, Block]:
    options = problem.options
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
    number = problem.split.num_bottom + layer
    plan = LayerPlan(layer=number, components=tuple(kept), channels=kept_channels)
    block = _original(problem, layer).replace(**sites, fc1=fc1, fc2=fc2)
    return plan, block


def _cut_globally(
    problem: Problem, store: LayerStore, terms: LayerTerms, pools
) -> list[tuple[LayerPlan, Block]]:
    orders = _orders(terms, problem.options, within_layer=False)
    counts = _global_counts(terms, orders, pools, problem.options)

    def cut(layer: int) -> tuple[LayerPlan, Block]:
        arrays = store.load(layer).arrays
        candidate = Candidate(
            weights=attention_and_mlp(_original(problem, layer)),
            decomposition=unpack(SVD, "decomposition", arrays),
            terms=unpack(LayerTerms, "terms", arrays),
            factors=unpack(LayerFactors, "factors", arrays),
        )
        of_layer = tuple(order[layer] for order in orders)
        plan, block = _cut(problem, layer, candidate, of_layer, [c[layer] for c in counts])
        return plan, jax.device_get(block)

    return [cut(layer) for layer in range(len(counts[0]))]


def _read_layer(problem: Problem, stored: StoredLayer) -> tuple[LayerPlan, Block]:
    plan = read_layer(stored.values["plan"])
    return plan, middle_layer_from_tensors(problem.config, plan.shape, stored.arrays, "middle.0.")
