"""Calibration: one forward and one backward pass that yield each middle layer's factors.

The forward pass keeps the residual stream at the boundaries of middle and top layers only. The
backward pass starts at the loss, takes no weight gradient in the top adapter, visits the middle
from top to bottom with one layer's factors alive at a time, and stops at the bottom adapter.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax.typing import DTypeLike

from gradot_jax.calibration.passes import (
    Cotangents,
    LayerSums,
    Streams,
    embed_batches,
    forward_layer,
    head_cotangents,
    input_moments,
    layer_function,
    place_layer,
    sweep_layer,
    to_memory,
)
from gradot_jax.curvature.factors import KroneckerFactors, normalise
from gradot_jax.curvature.tap import BlockTaps, zero_taps
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig, attention_windows
from gradot_jax.models.params import Params
from gradot_jax.models.partition import factor_sharding, place
from gradot_jax.models.run import counted_tokens
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import compute_dtype
from gradot_jax.nn.layout import Layout, Site
from gradot_jax.parallel import DeviceMesh, put
from gradot_jax.progress import track

FisherKind = Literal["empirical", "mc"]


class CalibrationPass(NamedTuple):
    """State between the forward pass and the backward sweep, which empties its lists.

    Attributes:
        boundaries: inputs of each middle layer, `[S, B, T, D]`.
        masks: `[S, B, T]`.
        cotangents: the one at the output of the middle.
        loss: mean next-token loss in nats.
        num_tokens: tokens that the factors count, N.
        num_sequences: sequences seen.
        skip_positions: first tokens of each sequence that the factors leave out.
        mesh: where all of it lies.
    """

    boundaries: list[jax.Array]
    masks: jax.Array
    cotangents: list[Cotangents]
    loss: float
    num_tokens: int
    num_sequences: int
    skip_positions: int = 0
    mesh: DeviceMesh | None = None


def run_forward(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    batches: Iterable[Batch],
    *,
    fisher: FisherKind = "empirical",
    with_gradient: bool = False,
    skip_positions: int = 0,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
    dtype: DTypeLike | None = None,
    offload: bool = False,
    progress: bool = False,
) -> CalibrationPass:
    """The forward half of a calibration, and the way back through the head and the top adapter.

    Args:
        config: the model's configuration.
        params: the full original model, on the host or on devices.
        split: which blocks are the adapter.
        batches: calibration text, equal shapes throughout.
        fisher: targets from the text (`empirical`) or sampled from the model (`mc`).
        with_gradient: whether the sweep will take weight gradients; under `mc` this carries the
            cotangents of the true loss as well.
        skip_positions: first tokens of each sequence that the factors leave out; loss and
            gradients are of all. Attention parks much of its weight, and a few activations of huge
            size, on the first one (Xiao et al. 2023, "attention sinks").
        seed: of sampled targets.
        mesh: devices to spread the work over.
        dtype: of the arithmetic, see `nn.dtypes.compute_dtype`.
        offload: keep the boundaries in host memory.
        progress: whether to report.

    Raises:
        InputError: for a split with inner blocks, without a batch, with batches of unequal
            shapes, when the loss is not finite, or when no token is left to count.
    """
    shell, streams, sequences = _start(config, params, split, batches, mesh, dtype)
    num_tokens = _count(streams.mask, skip_positions)
    windows = attention_windows(config, params.num_layers)
    boundaries: list[jax.Array] = []
    # Whoever holds a stream that nobody reads any more holds as much as a boundary.
    hidden, streams = streams.hidden, streams._replace(hidden=None)
    layers = range(params.num_layers)
    for index in track(layers, "calibration forward", enabled=progress):
        if index >= split.num_bottom:
            boundaries.append(to_memory(hidden, "pinned_host") if offload else hidden)
        apply = layer_function(config, windows[index])
        hidden = forward_layer(apply, place_layer(params, index, mesh), hidden, streams.mask)
    sampled = fisher == "mc"
    sums = head_cotangents(
        config,
        shell,
        streams._replace(hidden=hidden),
        sample=sampled,
        true_too=with_gradient and sampled,
        seed=seed,
    )
    loss, cotangents = sums.loss / sums.count, sums.cotangents
    del hidden, sums
    if not math.isfinite(loss):
        raise InputError("the model's loss on the calibration text is not finite")
    for index in reversed(range(params.num_layers - split.num_top, params.num_layers)):
        _, cotangents = sweep_layer(
            layer_function(config, windows[index]),
            place_layer(params, index, mesh),
            None,
            to_memory(boundaries.pop(), "device"),
            streams.mask,
            cotangents,
            with_gradient=False,
        )
    return CalibrationPass(
        boundaries, streams.mask, [cotangents], loss, num_tokens, sequences, skip_positions, mesh
    )


def sweep_middle(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    forward_pass: CalibrationPass,
    *,
    with_gradient: bool = False,
    with_removals: bool = False,
    finished: Collection[int] = (),
) -> Iterator[tuple[int, dict[str, KroneckerFactors]]]:
    """The backward half: factors per site for each middle layer, from the top one down.

    What the sweep has passed is released, so a `CalibrationPass` serves once.

    Args:
        config: the model's configuration.
        params: the full original model.
        split: which blocks are the adapter.
        forward_pass: of the same model and split.
        with_gradient: whether to take the gradients of the weights.
        with_removals: whether to take the removal Fisher of the channels, `[F, F]`.
        finished: layers, by their index in the middle, whose factors are not wanted.

    Yields:
        (index in the middle, factors by site); factors of one layer at a time.
    """
    cotangents, mesh = forward_pass.cotangents.pop(), forward_pass.mesh
    windows = attention_windows(config, params.num_layers)
    wanted = [i for i in range(len(forward_pass.boundaries)) if i not in finished]
    for layer in reversed(range(min(wanted, default=0), len(forward_pass.boundaries))):
        block = place_layer(params, split.num_bottom + layer, mesh)
        taps = None
        if layer in wanted:
            taps = _place_taps(zero_taps(block, with_removals=with_removals), mesh)
        sums, cotangents = sweep_layer(
            layer_function(config, windows[split.num_bottom + layer], forward_pass.skip_positions),
            block,
            taps,
            to_memory(forward_pass.boundaries.pop(), "device"),
            forward_pass.masks,
            cotangents,
            with_gradient=with_gradient and layer in wanted,
        )
        factors = (
            _site_factors(block.layout, sums, forward_pass.num_tokens) if layer in wanted else None
        )
        del block, taps, sums
        if factors is not None:
            yield layer, factors


def sweep_inputs(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    batches: Iterable[Batch],
    *,
    skip_positions: int = 0,
    mesh: DeviceMesh | None = None,
    dtype: DTypeLike | None = None,
    finished: Collection[int] = (),
) -> Iterator[tuple[int, dict[str, KroneckerFactors]]]:
    """Moments of the inputs alone, by a forward pass that ends with the middle.

    Arguments and errors as in `run_forward` and `sweep_middle`.

    Yields:
        (index in the middle, factors by site, of inputs only), from the bottom layer up.
    """
    _, streams, _ = _start(config, params, split, batches, mesh, dtype)
    num_tokens = _count(streams.mask, skip_positions)
    hidden, streams = streams.hidden, streams._replace(hidden=None)
    windows = attention_windows(config, params.num_layers)
    for index in range(params.num_layers - split.num_top):
        block = place_layer(params, index, mesh)
        layer = index - split.num_bottom
        apply = layer_function(config, windows[index], skip_positions)
        if layer < 0 or layer in finished:
            hidden = forward_layer(apply, block, hidden, streams.mask)
            continue
        taps = _place_taps(zero_taps(block, with_outputs=False), mesh)
        moments, hidden = input_moments(apply, block, taps, hidden, streams.mask)
        factors = _site_factors(block.layout, LayerSums(moments, None), num_tokens)
        del block, taps, moments
        yield layer, factors


def kronecker_factors(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    batches: Iterable[Batch],
    *,
    fisher: FisherKind = "empirical",
    with_gradient: bool = True,
    skip_positions: int = 0,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
    dtype: DTypeLike | None = None,
) -> Iterator[tuple[int, dict[str, KroneckerFactors]]]:
    """Kronecker factors and mean gradients of every middle layer, from the top one down.

    Arguments and errors as in `run_forward`.

    Yields:
        (index in the middle, factors by site).
    """
    forward_pass = run_forward(
        config,
        params,
        split,
        batches,
        fisher=fisher,
        with_gradient=with_gradient,
        skip_positions=skip_positions,
        seed=seed,
        mesh=mesh,
        dtype=dtype,
    )
    yield from sweep_middle(config, params, split, forward_pass, with_gradient=with_gradient)


def _start(config, params, split, batches, mesh, dtype) -> tuple[Any, Streams, int]:
    """The shell on its devices, the streams before the first layer, the number of sequences."""
    split.check_sandwich("calibration")
    split.check(params.num_layers)
    batches = list(batches)
    if not any(batch.loss_mask.any() for batch in batches):
        raise InputError("calibration needs at least one batch with a counted token")
    shell = place(params.shell, mesh)
    dtype = compute_dtype(shell.embed_tokens.dtype, dtype)
    sequences = sum(batch.input_ids.shape[0] for batch in batches)
    return shell, embed_batches(config, shell, batches, dtype, mesh), sequences


def _count(mask: jax.Array, skip_positions: int) -> int:
    count = int(counted_tokens(mask, skip_positions).sum())
    if not count:
        raise InputError(
            f"skip_positions {skip_positions} leaves no token of sequences of at most "
            f"{int(mask.sum(-1).max())} to take factors from"
        )
    return count


def _place_taps(taps: BlockTaps, mesh: DeviceMesh | None) -> BlockTaps:
    if mesh is None:
        return taps

    def sharding(leaf):
        return factor_sharding(leaf.shape, mesh) if leaf.ndim == 2 else mesh.replicated

    return put(taps, jax.tree.map(sharding, taps))


def _site_factors(layout: Layout, sums: LayerSums, num_tokens: int) -> dict[str, KroneckerFactors]:
    taps: BlockTaps = sums.taps
    of_input: dict[str, KroneckerFactors] = {}

    def factors(site: Site) -> KroneckerFactors:
        own = normalise(
            taps.inputs[site.reads],
            None if taps.outputs is None else taps.outputs[site.name],
            None if sums.gradient is None else getattr(sums.gradient, site.name),
            num_tokens,
            taps.removals if site.name == layout.channels.out else None,
        )
        # Sites that read one input hold one covariance.
        shared = of_input.setdefault(site.reads, own)
        return own._replace(input_covariance=shared.input_covariance, input_mean=shared.input_mean)

    return {site.name: factors(site) for site in layout.sites}
