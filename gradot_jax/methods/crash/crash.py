"""`crash`: clusters layers, keeps one of each, runs it in place of the rest (Zhang et al. 2023).

Layers are compared on the owner's public text, where the published system reads data of the task.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import whole_layers
from gradot_jax.errors import InputError
from gradot_jax.methods.crash.similarity import (
    adjacent_cka,
    contiguous_clusters,
    nearest_kept,
    representatives,
    spread_positions,
)
from gradot_jax.methods.problem import Outcome, Problem, whole_layer
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params, layers_at
from gradot_jax.models.partition import place_batch
from gradot_jax.models.run import apply_layer, embed, runs
from gradot_jax.models.split import AdapterSpec, LayerMap
from gradot_jax.parallel import to_host
from gradot_jax.progress import track

MAX_SEQUENCES = 512
"""Sequences on which layers are compared, as published."""

Clusters = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice:
    """Clusters, the layers that stand for them with those of the adapter, and where they run."""

    clusters: Clusters
    split: AdapterSpec
    kept: tuple[int, ...]
    stored: list[int]
    layer_map: LayerMap


def compress(problem: Problem) -> Outcome:
    """Keeps as many layers as the budget holds, spread by similarity instead of evenly.

    A sandwich clusters the middle; an adapter of its own is picked among what stands for the
    clusters of all layers. Frozen copies of the adapter's blocks, where they serve removed layers,
    count as layers kept, so there may be fewer clusters than the budget has layers.

    Raises:
        InputError: for a sandwich with inner blocks, a budget that cannot be met, or text that
            does not tell layers apart.
    """
    config, params, options = problem.config, problem.params, problem.options
    num_layers, num_middle = params.num_layers, len(problem.middle)
    own = options.adapter == "own"
    if not own:
        problem.split.check_sandwich("crash with adapter = 'sandwich'")
    most = whole_layers(num_middle, options.budget)
    representations = pooled_hidden_states(problem)
    adjacent = np.asarray(adjacent_cka(representations))
    _check_similarity(adjacent, representations.shape[1])
    split_up = _own_adapter if own else _sandwich

    def choose(count: int) -> _Choice:
        clusters, split = split_up(problem, adjacent, count)
        kept = tuple(sorted({*representatives(clusters), *split.layers(num_layers)}))
        stored, layer_map = arrange(kept, split, num_layers, share=options.crash.share)
        return _Choice(
            clusters=clusters, split=split, kept=kept, stored=stored, layer_map=layer_map
        )

    choice = _largest(choose, most, num_middle)
    return Outcome(
        layers=[whole_layer(config, layer) for layer in choice.stored],
        blocks=layers_at(params.segments, choice.stored),
        layer_map=choice.layer_map,
        split=choice.split,
        scores={"adjacent_similarity": adjacent},
        calibration={
            "sequences": representations.shape[1],
            "clusters": [list(cluster) for cluster in choice.clusters],
            "kept_layers": list(choice.kept),
            "adapter_layers": list(choice.split.layers(num_layers)),
        },
    )


def _largest(choose: Callable[[int], _Choice], most: int, num_middle: int) -> _Choice:
    """The choice of most clusters that stores at most so many layers."""
    choices = [choose(count) for count in range(most, 0, -1)]
    for choice in choices:
        if len(choice.stored) <= most:
            return choice
    least = min(len(choose(count).stored) for count in range(1, num_middle + 1))
    raise InputError(
        f"crash: a budget of {most} of {num_middle} layers cannot be met: with the frozen copies "
        f"of the adapter's blocks that serve removed layers at least {least} are stored, a budget "
        f"of {-(-10_000 * least // num_middle) / 10_000:g}; crash.share = False stores no copies"
    )


def _sandwich(problem: Problem, adjacent: np.ndarray, count: int) -> tuple[Clusters, AdapterSpec]:
    """Clusters of the middle, in layers of the model, around the adapter asked for."""
    middle = problem.middle
    clusters = contiguous_clusters(adjacent[middle[0] : middle[-1]], count)
    return tuple(tuple(middle[i] for i in cluster) for cluster in clusters), problem.split


def _own_adapter(
    problem: Problem, adjacent: np.ndarray, count: int
) -> tuple[Clusters, AdapterSpec]:
    """Clusters of all layers, and an adapter of as many blocks as were asked for."""
    num_layers, num_blocks = problem.params.num_layers, problem.split.num_blocks
    clusters = contiguous_clusters(adjacent, count + num_blocks)
    kept = representatives(clusters)
    adapter = tuple(kept[place] for place in spread_positions(count + num_blocks, num_blocks))
    return clusters, AdapterSpec.of_layers(adapter, num_layers)


def arrange(
    kept: tuple[int, ...], split: AdapterSpec, num_layers: int, *, share: bool
) -> tuple[list[int], LayerMap]:
    """Which layers are stored frozen, and where they run.

    With `share` the nearest kept layer runs where one was removed. Where that is a block of the
    adapter, its initial weights are stored frozen; a copy serves the places on one side of it.

    Args:
        kept: kept layers, those of the adapter included.
        split: the adapter.
        num_layers: L, of the full model.
        share: rebuild the full depth, or skip what was removed.

    Returns:
        Stored layers in depth order, indices in the full model, and the layer map of an
        `Outcome`.
    """
    nearest = nearest_kept(kept, num_layers)
    stored: list[int] = []
    layer_map: list[int | None] = []
    side = 0
    for place in range(split.num_bottom, num_layers - split.num_top):
        if place in split.inner:
            layer_map.append(None)
            side = len(stored)
        elif share or place in kept:
            # The nearest layers ascend with the place: one that is stored already is the last.
            if nearest[place] not in stored[side:]:
                stored.append(nearest[place])
            layer_map.append(len(stored) - 1)
    return stored, tuple(layer_map)


def pooled_hidden_states(problem: Problem) -> jax.Array:
    """What each layer makes of each sequence.

    Returns:
        `[L, n, D]` float32: the output of every layer, that of the last behind the final norm as
        in Hugging Face's `hidden_states`, averaged over the tokens with their positions 1..T as
        weights; the first 512 sequences that have a token.

    Raises:
        InputError: without any such sequence.
    """
    parts, count = [], 0
    for batch in track(problem.batches, "hidden states", enabled=problem.progress):
        batch = place_batch(batch, problem.mesh)
        pooled = pooled_states(
            problem.config, problem.params, batch.input_ids, batch.attention_mask
        )
        mask, pooled = to_host((batch.attention_mask, pooled))
        rows = np.flatnonzero(mask.any(1))[: MAX_SEQUENCES - count]
        parts.append(pooled[:, rows])
        count += len(rows)
        if count == MAX_SEQUENCES:
            break
    if not count:
        raise InputError("crash compares layers on calibration text: it needs a batch with a token")
    return jnp.concatenate(parts, axis=1)


@partial(jax.jit, static_argnames="config")
def pooled_states(
    config: ModelConfig, params: Params, input_ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """`[L, B, D]`; rows without a token are zero."""
    weights = jnp.cumsum(mask, axis=1) * mask
    weights = (weights / jnp.maximum(weights.sum(1, keepdims=True), 1)).astype(jnp.float32)

    def pool(hidden: jax.Array) -> jax.Array:
        return jnp.einsum("bt,btd->bd", weights, hidden.astype(jnp.float32), precision="highest")

    hidden = embed(config, params.shell, input_ids, mask)
    layers = []
    for run, window in runs(config, params.segments):

        def step(hidden, block, window=window):
            hidden = apply_layer(config, block, hidden, mask, window=window)
            return hidden, pool(hidden)

        hidden, pooled = jax.lax.scan(step, hidden, run)
        layers.append(pooled)
    outputs = jnp.concatenate(layers)
    return outputs.at[-1].set(pool(config.family.final_norm(config, params.shell, hidden)))


def _check_similarity(adjacent: np.ndarray, num_sequences: int) -> None:
    # A NaN would sort somewhere and pass for a choice.
    if not np.isfinite(adjacent).all():
        layer = int(np.flatnonzero(~np.isfinite(adjacent))[0])
        raise InputError(
            f"crash: the similarity of layers {layer} and {layer + 1} on {num_sequences} "
            "calibration sequences is not finite; expected at least two sequences that differ and "
            "finite activations"
        )
