"""Calibration: one forward and one backward pass that yield each middle layer's factors.

The forward pass keeps the residual stream at the boundaries of middle layers only. The backward
pass starts at the loss, takes no weight gradient in the top adapter, visits the middle from top
to bottom with one layer's factors alive at a time, and stops at the bottom adapter.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.compression.layer import LayerFactors, LayerWeights
from gradot_jax.compression.options import FisherKind
from gradot_jax.curvature.factors import KroneckerFactors, normalise
from gradot_jax.curvature.sweep import ApplyLayer, Cotangents, sweep_layer
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import (
    INPUT_OF_SITE,
    apply_block,
    embed,
    head,
    run_blocks,
    zero_taps,
)
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    Block,
    Params,
    Shell,
    depth,
    get_block,
)
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.offsite.split import Adapter, AdapterSpec, split_blocks
from gradot_jax.offsite.training import place_batch
from gradot_jax.parallel import DeviceMesh


class CalibrationPass(NamedTuple):
    """State between the forward pass and the backward sweep.

    Attributes:
        boundaries: inputs of each middle layer, a list over layers of lists over batches.
        masks: `[S, B, T]`.
        cotangents: at the output of the middle.
        loss: mean next-token loss in nats.
        num_tokens: real tokens seen, N.
        num_sequences: sequences seen.
    """

    boundaries: list[list[jax.Array]]
    masks: jax.Array
    cotangents: Cotangents
    loss: float
    num_tokens: int
    num_sequences: int


def attention_and_mlp(block: Block) -> LayerWeights:
    """The compressible maps of one dense block, attention sites in `ATTENTION_SITES` order."""
    sites = [getattr(block, site) for site in ATTENTION_SITES]
    return LayerWeights(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *sites), block.fc1, block.fc2
    )


def layer_factors(sites: dict[str, KroneckerFactors]) -> LayerFactors:
    """Per-site factors as the compression of a layer takes them."""
    attention = [sites[site] for site in ATTENTION_SITES]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *attention)
    return LayerFactors(stacked, sites["fc1"], sites["fc2"])


def run_forward(
    config: OPTConfig,
    params: Params,
    spec: AdapterSpec,
    batches: Iterable[Batch],
    *,
    fisher: FisherKind = "empirical",
    with_gradient: bool = False,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
) -> CalibrationPass:
    """The forward half of a calibration.

    Args:
        config: the model's configuration.
        params: the full original model.
        spec: the split.
        batches: calibration text, equal shapes throughout.
        fisher: targets from the text (`empirical`) or sampled from the model (`mc`).
        with_gradient: whether the sweep will take weight gradients; under `mc` this carries the
            cotangents of the true loss as well.
        seed: of sampled targets.
        mesh: devices to spread each batch over.

    Raises:
        InputError: for a split with inner blocks, without a batch, with batches of unequal
            shapes, or when the loss is not finite.
    """
    spec.check_sandwich("calibration")
    adapter, middle = split_blocks(params, spec)
    true_too = with_gradient and fisher == "mc"
    boundaries: list[list[jax.Array]] = [[] for _ in range(depth(middle))]
    masks, fishers, losses, shapes = [], [], [], set()
    total = counted = tokens = sequences = 0.0
    for index, batch in enumerate(batches):
        shapes.add(batch.input_ids.shape)
        if len(shapes) > 1:
            raise InputError(f"calibration batches must have one shape, got {sorted(shapes)}")
        sequences += batch.input_ids.shape[0]
        batch = place_batch(batch, mesh)
        key = jax.random.fold_in(jax.random.key(seed), index)
        inputs, sampled, true, loss, count = _forward_batch(
            config, params.shell, adapter, middle, batch, key, fisher == "mc", true_too
        )
        for layer, hidden in enumerate(inputs):
            boundaries[layer].append(hidden)
        fishers.append(sampled)
        losses.append(true)
        masks.append(batch.attention_mask)
        total, counted = total + float(loss), counted + float(count)
        tokens += float(batch.attention_mask.sum())
    if not masks or not counted:
        raise InputError("calibration needs at least one batch with a counted token")
    if not jnp.isfinite(total / counted):
        raise InputError("the model's loss on the calibration text is not finite")
    return CalibrationPass(
        boundaries=boundaries,
        masks=jnp.stack(masks),
        cotangents=Cotangents(jnp.stack(fishers), jnp.stack(losses) if true_too else None),
        loss=total / counted,
        num_tokens=int(tokens),
        num_sequences=int(sequences),
    )


@partial(jax.jit, static_argnames=("config", "sample", "true_too"))
def _forward_batch(
    config: OPTConfig,
    shell: Shell,
    adapter: Adapter,
    middle: Block,
    batch: Batch,
    key: jax.Array,
    sample: bool,
    true_too: bool,
):
    mask = batch.attention_mask
    hidden = embed(config, shell, batch.input_ids, mask)
    hidden = run_blocks(config, (adapter.bottom,), hidden, mask)

    def keep_input(carry, block):
        return apply_block(config, block, carry, mask), carry

    hidden, inputs = jax.lax.scan(keep_input, hidden, middle)

    def top(h):
        return head(config, shell, run_blocks(config, (adapter.top,), h, mask))

    logits, pull = jax.vjp(top, hidden)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    def cotangent(targets):
        slope = probabilities - jax.nn.one_hot(targets, logits.shape[-1])
        return pull((slope * batch.loss_mask[..., None]).astype(logits.dtype))[0]

    fisher_targets = batch.targets
    if sample:
        fisher_targets = jax.random.categorical(key, logits.astype(jnp.float32), axis=-1)
    true = cotangent(batch.targets) if true_too else None
    weights = batch.loss_mask.astype(jnp.float32)
    loss = -(token_log_likelihood(logits, batch.targets) * weights).sum()
    layers = [inputs[i] for i in range(depth(middle))]
    return layers, cotangent(fisher_targets), true, loss, weights.sum()


def sweep_middle(
    config: OPTConfig,
    params: Params,
    spec: AdapterSpec,
    forward_pass: CalibrationPass,
    *,
    with_gradient: bool = False,
    with_removals: bool = False,
) -> Iterator[tuple[int, dict[str, KroneckerFactors]]]:
    """The backward half: factors per site for each middle layer, from the top one down.

    Boundaries are released as the sweep passes them, so a `CalibrationPass` serves once.

    Args:
        config: the model's configuration.
        params: the full original model.
        spec: the split.
        forward_pass: of the same model and split.
        with_gradient: whether to take the gradients of the weights.
        with_removals: whether to take the removal Fisher of fc2, `[F, F]`.

    Yields:
        (index in the middle, factors by site); factors of one layer at a time.
    """
    _, middle = split_blocks(params, spec)
    cotangents = forward_pass.cotangents
    for layer in reversed(range(depth(middle))):
        block = get_block(middle, layer)
        hidden = jnp.stack(forward_pass.boundaries[layer])
        forward_pass.boundaries[layer].clear()
        sums, cotangents = sweep_layer(
            _block_function(config),
            block,
            zero_taps(block, with_removals=with_removals),
            hidden,
            forward_pass.masks,
            cotangents,
            with_gradient=with_gradient,
        )
        yield layer, _site_factors(sums, forward_pass.num_tokens)


def kronecker_factors(
    config: OPTConfig,
    params: Params,
    spec: AdapterSpec,
    batches: Iterable[Batch],
    *,
    fisher: FisherKind = "empirical",
    with_gradient: bool = True,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
) -> Iterator[tuple[int, dict[str, KroneckerFactors]]]:
    """Kronecker factors and mean gradients of every middle layer, from the top one down.

    Arguments and errors as in `run_forward`.

    Yields:
        (index in the middle, factors by site).
    """
    forward_pass = run_forward(
        config,
        params,
        spec,
        batches,
        fisher=fisher,
        with_gradient=with_gradient,
        seed=seed,
        mesh=mesh,
    )
    yield from sweep_middle(config, params, spec, forward_pass, with_gradient=with_gradient)


@cache
def _block_function(config: OPTConfig) -> ApplyLayer:
    """One function object per configuration, so that the sweep compiles once."""
    return lambda block, hidden, mask, taps: apply_block(config, block, hidden, mask, taps)


def _site_factors(sums, num_tokens: int) -> dict[str, KroneckerFactors]:
    inputs, outputs, removals = sums.taps

    def factors(site: str, name: str) -> KroneckerFactors:
        gradient = None if sums.gradient is None else getattr(sums.gradient, site)
        removed = removals if site == "fc2" else None
        return normalise(inputs[name], outputs[site], gradient, num_tokens, removed)

    return {site: factors(site, name) for site, name in INPUT_OF_SITE.items()}
