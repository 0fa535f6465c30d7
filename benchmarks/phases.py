"""The measured phases: one builder each, from a workload to what runs and what it must cost."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floor
from benchmarks.floor import Cost
from benchmarks.harness import Phase
from benchmarks.workloads import Workload
from gradot_jax.compression.budget import rank_pool
from gradot_jax.compression.layer import LayerFactors, component_order, propose
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.rule import gradot_rule
from gradot_jax.compression.score import combine
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.curvature.sweep import Cotangents, sweep_layer
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import apply_block, summed_loss, zero_taps
from gradot_jax.models.opt.params import SITES, Block, Params, get_block
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.calibrate import (
    CalibrationPass,
    _forward_batch,
    attention_and_mlp,
    run_forward,
    sweep_middle,
)
from gradot_jax.offsite.compress import run_compression
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.split import split_blocks
from gradot_jax.offsite.training import init_training, train_step


def gradient(workload: Workload) -> Phase:
    """The unit: the gradient of one batch's mean loss with respect to all weights."""
    params, batch = workload.params(), workload.batches()[0]

    def mean_loss(params: Params, batch: Batch) -> jax.Array:
        total, count = summed_loss(workload.config, params, batch)
        return total / count

    run = jax.jit(jax.grad(mean_loss))
    return _phase(workload, floor.gradient_cost(workload), 1, run, lambda: (params, batch))


def calibration_forward(workload: Workload) -> Phase:
    """The forward half of a calibration over all its text."""
    params, batches = workload.params(), workload.batches()

    def program() -> jax.stages.Lowered:
        adapter, middle = split_blocks(params, workload.split)
        key = jax.random.key(0)
        blocks = (params.shell, adapter, middle)
        return _forward_batch.lower(workload.config, *blocks, batches[0], key, False, False)

    run = partial(run_forward, workload.config, params, workload.split, batches)
    cost = floor.forward_cost(workload)
    return _phase(workload, cost, workload.num_batches, run, tuple, program)


def factor_sweep(workload: Workload) -> Phase:
    """The backward half: the factors of every middle layer, without weight gradients."""
    config, params = workload.config, workload.params()
    stream = jnp.ones(
        (workload.num_batches, workload.batch_size, workload.length, config.hidden_size)
    )
    mask = jnp.ones(stream.shape[:-1])

    def prepare() -> tuple[CalibrationPass]:
        boundaries = [list(stream) for _ in range(workload.num_middle)]
        sequences = workload.num_batches * workload.batch_size
        tokens = workload.num_batches * workload.tokens
        cotangents = Cotangents(stream, None)
        return (CalibrationPass(boundaries, mask, cotangents, 0.0, tokens, sequences),)

    def run(forward_pass: CalibrationPass) -> None:
        for _, factors in sweep_middle(config, params, workload.split, forward_pass):
            jax.block_until_ready(factors)

    def program() -> jax.stages.Lowered:
        block = get_block(params.segments[0], 0)
        return lower_sweep(config, block, stream, mask)

    cost = floor.sweep_cost(workload)
    return _phase(workload, cost, workload.num_batches, run, prepare, program)


def lower_sweep(
    config: OPTConfig, block: Block, stream: jax.Array, mask: jax.Array
) -> jax.stages.Lowered:
    """The sweep of one layer, with `stream` `[S, B, T, D]` as its inputs and cotangents."""

    def apply(block, hidden, mask, taps):
        return apply_block(config, block, hidden, mask, taps)

    cotangents = Cotangents(stream, None)
    return sweep_layer.lower(
        apply, block, zero_taps(block), stream, mask, cotangents, with_gradient=False
    )


def decompose_and_score(workload: Workload) -> Phase:
    """Decomposition, scores and orders of keeping for every middle layer, given its factors."""
    _, middle = split_blocks(workload.params(), workload.split)
    factors = unit_factors(workload)
    floor_rank = rank_pool(*[workload.config.hidden_size] * 2).floor

    def run() -> list[np.ndarray]:
        orders = []
        for layer in range(workload.num_middle):
            weights = attention_and_mlp(get_block(middle, layer))
            terms = propose(weights, factors, gradot_rule()).terms
            scores = jax.vmap(partial(combine, weight=0.0))(terms.components)
            orders.append(component_order(scores, floor_rank))
            orders.append(keep_order(combine(terms.channels, 0.0), 0))
        return jax.device_get(orders)

    return _phase(workload, floor.scoring_cost(workload), 0, run, tuple)


def compress(workload: Workload) -> Phase:
    """A compression from end to end: calibration, scores, selection and the emulator."""
    params, batches = workload.params(), workload.batches()
    options = CompressionOptions(budget=workload.budget)
    run = partial(run_compression, workload.config, params, workload.split, batches, options)
    cost = floor.compression_cost(workload)
    return _phase(workload, cost, workload.num_batches, run, tuple)


def step_emulator(workload: Workload) -> Phase:
    """One fine-tuning step of the adapter within the emulator."""
    # Magnitude needs no calibration and, with one share for all layers, gives the same shapes.
    options = CompressionOptions(budget=workload.budget, method="magnitude")
    params = workload.params()
    compression = run_compression(workload.config, params, workload.split, (), options)
    return _step(workload, compression.emulator)


def step_full(workload: Workload) -> Phase:
    """One fine-tuning step of the same adapter around the original middle."""
    params = workload.params()
    adapter, middle = split_blocks(params, workload.split)
    return _step(workload, Emulator(params.shell, adapter, (middle,)))


PHASES: dict[str, Callable[[Workload], Phase]] = {
    build.__name__: build
    for build in (
        gradient,
        calibration_forward,
        factor_sweep,
        decompose_and_score,
        compress,
        step_emulator,
        step_full,
    )
}


def _step(workload: Workload, emulator: Emulator) -> Phase:
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=1000)
    frozen, state = init_training(emulator, optimizer)
    batch = workload.batches()[0]

    @partial(jax.jit, donate_argnums=0)
    def run(state, frozen, batch):
        return train_step(workload.config, optimizer, state, frozen, batch)

    cost = floor.step_cost(workload, linear_weights(emulator.middle))
    return _phase(workload, cost, 1, run, lambda: (jax.tree.map(jnp.copy, state), frozen, batch))


def linear_weights(segments: tuple[Block, ...]) -> int:
    """Weights of all linear maps of some stacks of blocks, dense or in two factors."""
    maps = [getattr(stack, site) for stack in segments for site in SITES]
    return sum(leaf.size for weights in maps for leaf in _matrices(weights))


def _matrices(weights) -> list[jax.Array]:
    return jax.tree.leaves(weights.replace(bias=None))


def unit_factors(workload: Workload) -> LayerFactors:
    """Identity factors: the cost of a product does not depend on its values."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim

    def factors(d_in: int, d_out: int, *lead: int) -> KroneckerFactors:
        eyes = [jnp.broadcast_to(jnp.eye(d), (*lead, d, d)) for d in (d_in, d_out)]
        return KroneckerFactors(eyes[0], jnp.zeros((*lead, d_in)), eyes[1], None)

    return LayerFactors(factors(width, width, 4), factors(width, ffn), factors(ffn, width))


def _phase(workload: Workload, cost: Cost, batches: int, run, prepare, program=None) -> Phase:
    return Phase(
        run=run,
        prepare=prepare,
        program=program,
        batches=batches,
        tokens=batches * workload.tokens,
        flops=cost.flops,
        bytes=cost.bytes,
    )
