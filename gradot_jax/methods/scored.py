"""Methods that score: every middle layer is swept, scored and cut in width, one after the other.

A layer is a dictionary of maps by site. Kernels of equal shape are decomposed and scored together.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gradot_jax.calibration.sweep import run_forward, sweep_inputs, sweep_middle
from gradot_jax.compression.channel import cut_channels
from gradot_jax.compression.plan import LayerPlan, layer_values, read_layer
from gradot_jax.compression.rank import cut_rank
from gradot_jax.compression.score import LayerTerms, ScoreTerms, by_shape, stack, unstack
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.files.digest import tree_digest
from gradot_jax.files.pages import release_pages
from gradot_jax.linalg.spread import num_workers
from gradot_jax.linalg.svd import SVD, svd
from gradot_jax.methods.allocation import (
    LayerCounts,
    LayerOrders,
    LayerPools,
    global_orders_and_counts,
    lambdas,
    layer_orders,
    layer_pools,
    uniform_layer_counts,
)
from gradot_jax.methods.layer_store import LayerStore, StoredLayer, pack, unpack
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.models.family import config_identity
from gradot_jax.models.params import layers_at
from gradot_jax.models.tensors import layer_to_tensors, middle_layer_from_tensors
from gradot_jax.nn.layout import Block, Layout, maps
from gradot_jax.nn.linear import Dense
from gradot_jax.parallel import DeviceMesh, put, to_host
from gradot_jax.progress import track

Maps = dict[str, Dense]
Factors = dict[str, KroneckerFactors]
Parts = dict[str, SVD]


WHITENING_DAMPING = 1e-4
"""Ridge on the factors that whiten a kernel, relative to their mean diagonal."""


class ScoringRule(NamedTuple):
    """How a method scores a layer.

    Attributes:
        decompose: of kernels `[S, D_in, D_out]`, their factors with a leading site axis (None for a
            rule that reads none) and a mesh or None, over whose devices the sites are spread;
            components, most important first.
        terms: of layout, maps, components and factors by site: the score terms of the layer.
        decomposes_alone: whether `decompose` looks at kernels alone, so that those of several
            layers can be decomposed at once.
    """

    decompose: Callable[[Any, KroneckerFactors | None, DeviceMesh | None], SVD]
    terms: Callable[[Layout, Maps, Parts, Factors | None], LayerTerms]
    decomposes_alone: bool = False


class Candidate(NamedTuple):
    """A layer ready to be cut: all that is needed once its counts are known.

    Attributes:
        parts: components of each low-rank site.
        terms: score terms.
        factors: kept only where a compensation will read them.
    """

    parts: Parts
    terms: LayerTerms
    factors: Factors | None


def required(factors: Factors | None, why: str) -> Factors:
    """The factors; ValueError where there are none."""
    if factors is None:
        raise ValueError(f"{why} needs Kronecker factors")
    return factors


def plain_svd(
    kernels: jax.Array, factors: KroneckerFactors | None, mesh: DeviceMesh | None = None
) -> SVD:
    """Singular components `[S, ...]` of kernels `[S, D_in, D_out]`, whatever their factors."""
    del factors
    return svd(kernels, mesh=mesh)


stack_on_device = jax.jit(stack, static_argnames=("keys",))
unstack_on_device = jax.jit(unstack, static_argnames=("keys",))


def decompose_layers(
    blocks: Sequence[Block],
    factors: Sequence[Factors | None],
    rule: ScoringRule,
    mesh: DeviceMesh | None = None,
) -> list[Parts]:
    """Components of each low-rank site of some layers, all kernels of equal shape in one batch.

    Blocks are of equal shapes; their factors are None for a rule that reads none.

    Raises:
        ValueError: as `ScoringRule.decompose`.
    """
    low_rank = blocks[0].layout.low_rank
    places = [(layer, site) for layer in range(len(blocks)) for site in low_rank]
    kernels = {(layer, site): getattr(blocks[layer], site).kernel for layer, site in places}
    found: dict[tuple[int, str], SVD] = {}
    for group in by_shape({place: kernel.shape for place, kernel in kernels.items()}):
        together = None
        if factors[0] is not None:
            known = {(i, site): required(factors[i], "a group")[site] for i, site in group}
            together = stack_on_device(known, group)
        svds = rule.decompose(stack(kernels, group), together, mesh)
        found |= unstack_on_device(svds, group)
    return [{site: found[layer, site] for site in low_rank} for layer in range(len(blocks))]


def propose(
    block: Block,
    factors: Factors | None,
    rule: ScoringRule,
    mesh: DeviceMesh | None = None,
    parts: Parts | None = None,
) -> Candidate:
    """Decomposes and scores one layer.

    Args:
        block: dense, in the dtype in which it is stored; on a mesh whole on each device.
        factors: of the same layer, likewise; None for a rule that reads none.
        rule: how.
        mesh: devices to spread the decompositions over.
        parts: decompositions, where they are known already.

    Raises:
        ValueError: when the rule needs factors and there are none, or for a kernel or a factor
            that is not finite.
    """
    if parts is None:
        (parts,) = decompose_layers([block], [factors], rule, mesh)
    return Candidate(parts, rule.terms(block.layout, maps(block), parts, factors), factors)


def shrink_layers(problem: Problem, rule_of: Callable[[int], ScoringRule]) -> Outcome:
    """Sweeps, scores and cuts every middle layer; uniform allocation cuts as it goes.

    A layer that is done leaves the devices. In `problem.checkpoints` it outlives the process; a
    compression that goes on only passes through it. `rule_of` takes an index in the middle.

    Raises:
        InputError: for a split that is no sandwich, a budget that cannot be met, unfit calibration,
            scores not finite, or checkpoints of another compression.
    """
    options = problem.options
    problem.split.check_sandwich(options.method)
    num_layers = len(problem.middle)
    pools = layer_pools(problem.config, options)
    counts = uniform_layer_counts(pools, options, num_layers)
    store = _open_store(problem)
    finished = store.finished
    left = [layer for layer in reversed(range(num_layers)) if layer not in finished]
    calibration, sweep = _sweep(problem, finished, left)
    batched = _BatchedDecompositions(problem, left)
    for layer, factors in track(sweep, "layers", total=len(left), enabled=problem.progress):
        candidate = _propose(problem, layer, factors, rule_of(layer), batched)
        if factors is not None:
            # Whoever still holds the dictionary must not hold the factors while the next are made.
            factors.clear()
        arrays, values = pack("terms", candidate.terms), {"calibration": calibration}
        if counts is None:
            arrays |= pack("parts", candidate.parts) | pack("factors", candidate.factors)
        else:
            orders = jax.device_get(layer_orders(candidate.terms, *lambdas(options)))
            plan, block = _cut(problem, layer, candidate, orders, counts)
            arrays |= layer_to_tensors(block, _LAYER)
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
    plans, blocks = zip(*done, strict=True)
    return Outcome(
        layers=plans,
        blocks=blocks,
        scores=_score_arrays(stacked, problem.config.family.layout.low_rank),
        calibration=store.load(0).values["calibration"],
    )


_LAYER = "layer."
"""Prefix of the tensors of a finished layer."""


def _open_store(problem: Problem) -> LayerStore:
    if problem.checkpoints is None:
        return LayerStore(problem.scratch)
    return LayerStore(
        problem.checkpoints,
        {
            "options": problem.options.identity,
            "split": dataclasses.asdict(problem.split),
            "config": config_identity(problem.config),
            "weights": tree_digest(problem.params),
            "calibration text": tree_digest(problem.batches),
            "dtype": str(problem.dtype),
        },
    )


def _sweep(
    problem: Problem, finished: set[int], left: list[int]
) -> tuple[dict[str, Any], Iterator[tuple[int, Factors | None]]]:
    """A record of the calibration; and the layers that are left with their factors."""
    options, batches = problem.options, problem.batches
    if options.calibrates == "nothing" or not left:
        return {}, ((layer, None) for layer in left)
    model = problem.config, problem.params, problem.split
    on = {
        "mesh": problem.mesh,
        "dtype": problem.dtype,
        "skip_positions": options.skip_positions or 0,
    }
    if options.calibrates == "inputs":
        record = {"sequences": sum(batch.input_ids.shape[0] for batch in batches)}
        return record, sweep_inputs(*model, batches, finished=finished, **on)
    forward_pass = run_forward(
        *model,
        batches,
        fisher=options.fisher,
        with_gradient=options.reads_gradient,
        seed=options.seed,
        offload=problem.offload,
        progress=problem.progress,
        **on,
    )
    record = {
        "loss": forward_pass.loss,
        "tokens": forward_pass.num_tokens,
        "sequences": forward_pass.num_sequences,
    }
    return record, sweep_middle(
        *model,
        forward_pass,
        with_gradient=options.reads_gradient,
        with_removals=options.channel_score == "token-fisher",
        finished=finished,
    )


def _original(problem: Problem, layer: int) -> Block:
    """A layer of the middle; on the host where it lies there, or on several devices."""
    (block,) = layers_at(problem.params.segments, [problem.middle[layer]])
    return block if problem.mesh is None else to_host(block)


class _BatchedDecompositions:
    """Decompositions that need no factors, of as many layers at once as there are workers for."""

    def __init__(self, problem: Problem, layers: list[int]):
        self._problem, self._layers = problem, layers
        self._known: dict[int, Parts] = {}

    def take(self, layer: int, rule: ScoringRule) -> Parts | None:
        """Those of a layer, once; None where they are to be made with the layer's factors."""
        mesh = self._problem.mesh
        if mesh is None or not rule.decomposes_alone:
            return None
        if layer not in self._known:
            start = self._layers.index(layer)
            sites = len(self._problem.config.family.layout.low_rank)
            group = self._layers[start : start + max(num_workers(mesh) // sites, 1)]
            blocks = [_original(self._problem, member) for member in group]
            parts = decompose_layers(blocks, [None] * len(group), rule, mesh)
            self._known |= zip(group, parts, strict=True)
        return self._known.pop(layer)


def _propose(
    problem: Problem,
    layer: int,
    factors: Factors | None,
    rule: ScoringRule,
    batched: _BatchedDecompositions,
) -> Candidate:
    """A layer's candidate, with what the cut will read and on a device that it can read."""
    block = _original(problem, layer)
    if problem.mesh is not None:
        block = put(block, problem.mesh.replicated)
    number = problem.middle[layer]
    try:
        parts = batched.take(layer, rule)
        # A copy: the sweep's own dictionary is emptied.
        own = None if factors is None else dict(factors)
        candidate = propose(block, own, rule, problem.mesh, parts)
    except ValueError as error:
        raise InputError(f"layer {number}: {error}") from None
    kept = None
    if problem.options.compensates and own is not None:
        # What a compensation reads.
        kept = {
            s: KroneckerFactors(f.input_covariance, f.input_mean, None, None)
            for s, f in own.items()
        }
    candidate = candidate._replace(factors=kept, terms=to_host(candidate.terms))
    _check_finite(number, candidate.terms)
    return candidate if problem.mesh is None else to_host(candidate)


def _check_finite(layer: int, terms: LayerTerms) -> None:
    # A NaN would sort somewhere and pass for a choice.
    if not all(np.isfinite(term).all() for term in jax.tree.leaves(terms)):
        raise InputError(
            f"layer {layer}: the scores are not finite; squares of its weights, of its activations "
            "on the calibration text or of their gradients overflow"
        )


def _score_arrays(terms: LayerTerms, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """Score terms of all layers by name: of components `[M, S, K]` if all sites have as many."""
    arrays = {}
    for term in ScoreTerms._fields:
        arrays[f"channels_{term}"] = getattr(terms.channels, term)
        by_site = {site: getattr(terms.components[site], term) for site in sites}
        if len({array.shape for array in by_site.values()}) == 1:
            arrays[f"components_{term}"] = np.stack(list(by_site.values()), axis=1)
        else:
            arrays |= {f"components_{site}_{term}": array for site, array in by_site.items()}
    return arrays


def _cut(
    problem: Problem, layer: int, candidate: Candidate, orders: LayerOrders, counts: LayerCounts
) -> tuple[LayerPlan, Block]:
    options, block = problem.options, _original(problem, layer)
    layout, layer_maps, factors = block.layout, maps(block), candidate.factors or {}
    fields, components = {}, []
    for site in layout.low_rank:
        fields[site], kept = cut_rank(
            layer_maps[site],
            candidate.parts[site],
            orders.components[site],
            counts.ranks[site],
            compensation=options.compensate_attention,
            factors=factors.get(site),
            damping=options.damping,
        )
        components.append((site, kept))
    pruned, channels = cut_channels(
        layout.channels,
        layer_maps,
        orders.channels,
        counts.channels,
        compensation=options.compensate_mlp,
        factors=factors.get(layout.channels.out),
        damping=options.damping,
    )
    number = problem.middle[layer]
    plan = LayerPlan(layer=number, components=tuple(components), channels=channels)
    return plan, block.replace(**fields, **pruned)


def _cut_globally(
    problem: Problem, store: LayerStore, terms: LayerTerms, pools: LayerPools
) -> list[tuple[LayerPlan, Block]]:
    orders, counts = global_orders_and_counts(terms, pools, problem.options)

    def cut(layer: int) -> tuple[LayerPlan, Block]:
        candidate = unpack(Candidate, "", store.load(layer).arrays)
        return jax.device_get(_cut(problem, layer, candidate, orders[layer], counts[layer]))

    return [cut(layer) for layer in range(len(counts))]


def _read_layer(problem: Problem, stored: StoredLayer) -> tuple[LayerPlan, Block]:
    plan = read_layer(stored.values["plan"])
    return plan, middle_layer_from_tensors(problem.config, plan.shape, stored.arrays, _LAYER)
