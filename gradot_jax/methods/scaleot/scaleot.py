"""`scaleot`: harmonizers in place of the layers of least importance (ScaleOT, Yao et al. 2024).

Every layer has a harmonizer, `x + up(relu(down(x)))`, which starts as the identity, and an
importance. Dynamic LayerReplace alternates: the harmonizers descend the next-token loss of one
sampled network, then a few sampled networks are validated on held-out text and the importance of
their raw layers follows (`methods.scaleot.importance`). The emulator has harmonizers for the middle
layers of least importance and keeps the others, with q, k, v and out cut to a lower rank
(selective rank compression), but for the adapter's.

The accounts of the method differ or are silent on some points. Here

* the up projection alone starts at zero; if both do, only a bias ever learns;
* the harmonizers train at a constant rate, and the data owner never trains them;
* the adapter is the one asked for, or under `adapter = "own"` the most important layers, of which
  none is forced to be first or last;
* the number of harmonizers is the least that meets the budget, rather than a share given, and the
  groups in which they are spread are of consecutive middle layers;
* ranks are cut only where that saves parameters.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import rank_pool, rounded_up
from gradot_jax.compression.plan import HarmonizerPlan, HarmonizerShape, LayerPlan, LayerShape
from gradot_jax.compression.rank import cut_rank
from gradot_jax.errors import InputError
from gradot_jax.methods.magnitude import MAGNITUDE
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.problem import Outcome, Problem, whole_layer
from gradot_jax.methods.scaleot.importance import layers_to_replace
from gradot_jax.methods.scaleot.layer_replace import mean_network_loss, train_harmonizers
from gradot_jax.methods.scored import decompose_layers
from gradot_jax.methods.table import Stored
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.params import Layer, Params, concatenate_blocks, get_block
from gradot_jax.models.partition import place
from gradot_jax.models.split import AdapterSpec, LayerMap
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.layout import Block, maps
from gradot_jax.parallel import to_host
from gradot_jax.training.public_text import hold_out


def compress(problem: Problem) -> Outcome:
    """Trains harmonizers and importance, and replaces as few layers as the budget allows.

    Goes on from the newest checkpoint of the same run in `problem.checkpoints`; runs that differ
    in budget, adapter or rank alone are the same run. Of fewer than four batches none is held
    out: those trained on validate the sampled networks as well.

    Raises:
        InputError: when no number of harmonizers meets the budget, for batches that are none, of
            unequal shapes or without a target, or when the checkpoints belong to another run.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the training; its state is saved.
    """
    # Before the training, which would be in vain.
    _number_replaced(problem)
    training, held_out = hold_out(problem.batches)
    validation = held_out or training
    model = place(_one_stack(problem.params), problem.mesh)
    harmonizers, importance = train_harmonizers(problem, model, training, validation)
    outcome = replace_layers(problem, harmonizers, importance)
    replaced = [plan.layer for plan in outcome.layers if isinstance(plan, HarmonizerPlan)]

    def loss_without(layers: list[int]) -> float:
        raw = ~np.isin(np.arange(len(importance)), layers)
        return mean_network_loss(problem.config, model, harmonizers, raw, validation, problem.mesh)

    calibration = {
        "steps": problem.options.scaleot.steps,
        "training_batches": len(training),
        "held_out_batches": len(held_out),
        "adapter_layers": list((outcome.split or problem.split).layers(len(importance))),
        "replaced_layers": replaced,
        "attention_ranks": attention_ranks(problem.config, problem.options),
        "original_loss": loss_without([]),
        "replaced_loss": loss_without(replaced),
    }
    return dataclasses.replace(outcome, calibration=calibration)


def replace_layers(problem: Problem, harmonizers: Harmonizer, importance: np.ndarray) -> Outcome:
    """The emulator's middle from harmonizers and importance `[L]` of all layers; no text is read.

    Raises:
        InputError: when no number of harmonizers meets the budget.
    """
    options, num_layers = problem.options, len(importance)
    number = _number_replaced(problem)
    blocks = _one_stack(problem.params).segments[0]
    split = problem.split
    if options.adapter == "own":
        most_important = np.argsort(-importance, kind="stable")[: split.num_blocks]
        split = AdapterSpec.of_layers(tuple(map(int, most_important)), num_layers)
    middle = split.middle_layers(num_layers)
    chosen = layers_to_replace(importance[list(middle)], number, options.scaleot.group_size)
    replaced = [middle[index] for index in chosen]
    stored = [
        _harmonizer(harmonizers, blocks, layer)
        if layer in replaced
        else _frozen(problem, blocks, layer)
        for layer in middle
    ]
    layers, kept = zip(*stored, strict=True)
    return Outcome(
        layers=layers,
        blocks=kept,
        layer_map=_layer_map(split, num_layers),
        split=split if options.adapter == "own" else None,
        scores={"importance": importance},
    )


def attention_ranks(config: ModelConfig, options: CompressionOptions) -> dict[str, int | None]:
    """Rank, at least 1, of each low-rank site of a kept layer; None where it stays dense."""
    block, share = config.family.block_shapes(config), 1 - options.scaleot.rank_removed

    def rank(site: str) -> int | None:
        shape = getattr(block, site).shape
        wanted = max(int(share * min(shape) + 0.5), 1)
        return wanted if wanted < rank_pool(*shape).cap else None

    return {site: rank(site) for site in block.layout.low_rank}


def num_replaced(
    config: ModelConfig,
    num_layers: int,
    ranks: Mapping[str, int | None],
    options: CompressionOptions,
) -> int:
    """The least number of harmonizers with which the stored middle meets the budget.

    Parameters of matrices count: those of attention, MLPs and harmonizers; biases and norms do
    not.

    Args:
        config: of the model.
        num_layers: M, layers of the middle.
        ranks: of the low-rank sites of layers that are kept.
        options: the budget and the rank of a harmonizer are read.

    Raises:
        InputError: when no number does.
    """
    sizes = {
        site: weights.shape for site, weights in maps(config.family.block_shapes(config)).items()
    }
    whole = sum(map(math.prod, sizes.values()))
    kept = sum(
        rank * sum(sizes[site]) if (rank := ranks.get(site)) else math.prod(sizes[site])
        for site in sizes
    )
    harmonizer = 2 * config.hidden_size * options.scaleot.harmonizer_rank
    stored = [n * harmonizer + (num_layers - n) * kept for n in range(num_layers + 1)]
    allowed = options.budget * num_layers * whole + 1e-9
    if min(stored) > allowed:
        least = rounded_up(min(stored) / (num_layers * whole))
        raise InputError(
            f"scaleot: budget = {options.budget} cannot be met, with harmonizer_rank = "
            f"{options.scaleot.harmonizer_rank} the emulator stores at least {least} of the "
            f"middle's {num_layers * whole} parameters; a smaller harmonizer_rank helps"
        )
    return next(n for n, size in enumerate(stored) if size <= allowed)


def forecast(config: ModelConfig, split: AdapterSpec, options: CompressionOptions) -> Stored:
    """Harmonizers and kept layers, see `methods.table.Stored`."""
    number, rank = config.num_hidden_layers - split.num_blocks, options.scaleot.harmonizer_rank
    ranks = attention_ranks(config, options)
    replaced = num_replaced(config, number, ranks, options)
    kept = LayerShape(ranks=tuple(ranks.items()), num_channels=channel_count(config))
    shapes = (HarmonizerShape(rank=rank),) * replaced + (kept,) * (number - replaced)
    return Stored(shapes, config.num_hidden_layers * 2 * config.hidden_size * rank)


def _number_replaced(problem: Problem) -> int:
    ranks = attention_ranks(problem.config, problem.options)
    return num_replaced(problem.config, len(problem.middle), ranks, problem.options)


def _one_stack(params: Params) -> Params:
    return Params(params.shell, (concatenate_blocks(params.segments),))


def _layer_map(split: AdapterSpec, num_layers: int) -> LayerMap:
    stored = iter(range(num_layers))
    between = range(split.num_bottom, num_layers - split.num_top)
    return tuple(None if layer in split.inner else next(stored) for layer in between)


def _harmonizer(harmonizers: Harmonizer, blocks: Block, layer: int) -> tuple[HarmonizerPlan, Layer]:
    dtype = getattr(blocks, blocks.layout.channels.out).kernel.dtype
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf[layer], dtype), harmonizers)
    return HarmonizerPlan(layer=layer, rank=single.down.shape[1]), single


def _frozen(problem: Problem, blocks: Block, layer: int) -> tuple[LayerPlan, Layer]:
    block, plan = get_block(blocks, layer), whole_layer(problem.config, layer)
    ranks = attention_ranks(problem.config, problem.options)
    if not any(ranks.values()):
        return plan, block
    block = block if problem.mesh is None else to_host(block)
    (parts,) = decompose_layers([block], [None], MAGNITUDE)
    fields, components = {}, []
    for site, rank in ranks.items():
        dense = getattr(block, site)
        order = np.arange(min(dense.shape))
        wanted = len(order) if rank is None else rank
        fields[site], kept = cut_rank(dense, parts[site], order, wanted)
        components.append((site, kept))
    return dataclasses.replace(plan, components=tuple(components)), block.replace(**fields)
