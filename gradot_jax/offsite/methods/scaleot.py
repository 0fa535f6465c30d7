"""`scaleot`: harmonizers in place of the layers of least importance (ScaleOT, Yao et al. 2024).

Every layer has a harmonizer, `x + up(relu(down(x)))`, which starts as the identity, and an
importance. Dynamic LayerReplace alternates: the harmonizers descend the next-token loss of one
sampled network, then a few sampled networks are judged on held-out text and the importance of
their raw layers follows (`compression.importance`). The emulator has harmonizers for the middle
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

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.compression.budget import rank_pool
from gradot_jax.compression.importance import layers_to_replace
from gradot_jax.compression.layer import cut_attention, propose
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import HarmonizerPlan, LayerPlan
from gradot_jax.compression.rule import MAGNITUDE
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    SITES,
    Block,
    Layer,
    Params,
    concatenate_blocks,
    get_block,
)
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.offsite.calibrate import attention_and_mlp
from gradot_jax.offsite.layer_replace import mean_network_loss, train_harmonizers
from gradot_jax.offsite.method import Outcome, Problem, whole_layer
from gradot_jax.offsite.public_text import hold_out
from gradot_jax.offsite.split import AdapterSpec
from gradot_jax.offsite.training import place
from gradot_jax.parallel import to_host


def compress(problem: Problem) -> Outcome:
    """Trains harmonizers and importance, and replaces as few layers as the budget allows.

    Goes on from the newest checkpoint of the same run in `problem.checkpoints`; runs that differ
    in budget, adapter or rank alone are the same run. Of fewer than four batches none is held
    out: those trained on judge the sampled networks as well.

    Raises:
        InputError: when no number of harmonizers meets the budget, for batches that are none, of
            unequal shapes or without a target, or when the checkpoints belong to another run.
        DivergenceError: when a loss or gradient is not finite.
        Interrupted: when a signal stopped the training; its state is saved.
    """
    # Before the training, which would be in vain.
    _number_replaced(problem)
    training, held_out = hold_out(problem.batches)
    judging = held_out or training
    model = place(_one_stack(problem.params), problem.mesh)
    harmonizers, importance = train_harmonizers(problem, model, training, judging)
    outcome = replace_layers(problem, harmonizers, importance)
    replaced = [plan.layer for plan in outcome.layers if isinstance(plan, HarmonizerPlan)]

    def loss_without(layers: list[int]) -> float:
        raw = ~np.isin(np.arange(len(importance)), layers)
        return mean_network_loss(problem.config, model, harmonizers, raw, judging, problem.mesh)

    calibration = {
        "steps": problem.options.scaleot.steps,
        "training_batches": len(training),
        "held_out_batches": len(held_out),
        "adapter_layers": list((outcome.split or problem.split).layers(len(importance))),
        "replaced_layers": replaced,
        "attention_rank": attention_rank(problem.config, problem.options),
        "original_loss": loss_without([]),
        "replaced_loss": loss_without(replaced),
    }
    return outcome._replace(calibration=calibration)


def replace_layers(problem: Problem, harmonizers: Harmonizer, importance: np.ndarray) -> Outcome:
    """The emulator's middle from what was learnt.

    Args:
        problem: what is to be compressed; its text is not read.
        harmonizers: stack over all layers.
        importance: `[L]`.

    Raises:
        InputError: when no number of harmonizers meets the budget.
    """
    options, num_layers = problem.options, len(importance)
    number = _number_replaced(problem)
    blocks = _one_stack(problem.params).segments[0]
    split = problem.split if options.adapter == "sandwich" else _own_split(problem, importance)
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
        layers,
        kept,
        layer_map=_layer_map(split, num_layers),
        split=split if options.adapter == "own" else None,
        scores={"importance": importance},
    )


def attention_rank(config: OPTConfig, options: CompressionOptions) -> int:
    """Rank that q, k, v and out of a kept layer are cut to, at least 1."""
    return max(int((1 - options.scaleot.rank_removed) * config.hidden_size + 0.5), 1)


def num_replaced(block: Block, num_layers: int, rank: int, options: CompressionOptions) -> int:
    """The least number of harmonizers with which the stored middle meets the budget.

    Parameters of matrices count: those of attention, MLPs and harmonizers; biases and norms do
    not.

    Args:
        block: one of the original's, all of which have its shape.
        num_layers: M, layers of the middle.
        rank: of the attention matrices of layers that are kept.
        options: the budget and the rank of a harmonizer are read.

    Raises:
        InputError: when no number does.
    """
    sizes = {site: getattr(block, site).shape for site in SITES}
    whole = sum(math.prod(shape) for shape in sizes.values())
    saved = sum(math.prod(sizes[site]) - rank * sum(sizes[site]) for site in ATTENTION_SITES)
    kept = whole - max(saved, 0)
    harmonizer = 2 * sizes["fc1"][0] * options.scaleot.harmonizer_rank
    stored = [n * harmonizer + (num_layers - n) * kept for n in range(num_layers + 1)]
    allowed = options.budget * num_layers * whole + 1e-9
    if min(stored) > allowed:
        least = math.ceil(1e4 * min(stored) / (num_layers * whole)) / 1e4
        raise InputError(
            f"scaleot: budget = {options.budget} cannot be met, with harmonizer_rank = "
            f"{options.scaleot.harmonizer_rank} the emulator stores at least {least} of the "
            f"middle's {num_layers * whole} parameters; a smaller harmonizer_rank helps"
        )
    return next(n for n, size in enumerate(stored) if size <= allowed)


def _number_replaced(problem: Problem) -> int:
    block = get_block(problem.params.segments[0], 0)
    num_middle = problem.params.num_layers - problem.split.num_blocks
    rank = attention_rank(problem.config, problem.options)
    return num_replaced(block, num_middle, rank, problem.options)


def _one_stack(params: Params) -> Params:
    return Params(params.shell, (concatenate_blocks(params.segments),))


def _own_split(problem: Problem, importance: np.ndarray) -> AdapterSpec:
    order = np.argsort(-importance, kind="stable")
    own = tuple(map(int, order[: problem.split.num_blocks]))
    return AdapterSpec.of_layers(own, len(importance))


def _layer_map(split: AdapterSpec, num_layers: int) -> tuple[int | None, ...]:
    stored = iter(range(num_layers))
    between = range(split.num_bottom, num_layers - split.num_top)
    return tuple(None if layer in split.inner else next(stored) for layer in between)


def _harmonizer(harmonizers: Harmonizer, blocks: Block, layer: int) -> tuple[HarmonizerPlan, Layer]:
    dtype = blocks.fc1.kernel.dtype
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf[layer], dtype), harmonizers)
    return HarmonizerPlan(layer=layer, rank=single.down.shape[1]), single


def _frozen(problem: Problem, blocks: Block, layer: int) -> tuple[LayerPlan, Layer]:
    block, plan = get_block(blocks, layer), whole_layer(problem.config, layer)
    width = problem.config.hidden_size
    rank = attention_rank(problem.config, problem.options)
    if rank >= rank_pool(width, width).cap:
        return plan, block
    block = block if problem.mesh is None else to_host(block)
    candidate = propose(attention_and_mlp(block), None, MAGNITUDE)
    maps, components = {}, []
    for index, site in enumerate(ATTENTION_SITES):
        maps[site], kept = cut_attention(candidate, index, np.arange(width), rank, "none", 0.0)
        components.append((site, kept))
    return dataclasses.replace(plan, components=tuple(components)), block.replace(**maps)
