"""The measured phases: one builder each, from a workload to what runs and what it must cost.

Those of training are in `steps.py`.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp

from benchmarks import floor
from benchmarks.floor import Cost
from benchmarks.harness import Phase, text_phase
from benchmarks.steps import gradient, step_all, step_emulator, step_full
from benchmarks.workloads import Workload
from gradot_jax.compression.budget import rank_pool
from gradot_jax.compression.layer import (
    Candidate,
    LayerFactors,
    component_order,
    cut_attention,
    cut_mlp,
)
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import LayerShape
from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.rule import gradot_rule
from gradot_jax.compression.score import combine
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.curvature.sweep import Cotangents, sweep_layer
from gradot_jax.models.opt.forward import zero_taps
from gradot_jax.models.opt.params import ATTENTION_SITES, get_block
from gradot_jax.nn.dtypes import cast
from gradot_jax.offsite.bundle import save_bundle
from gradot_jax.offsite.calibrate import (
    CalibrationPass,
    attention_and_mlp,
    run_forward,
    sweep_middle,
)
from gradot_jax.offsite.compress import run_compression
from gradot_jax.offsite.layerwise import layer_function


def calibration_forward(workload: Workload) -> Phase:
    """The forward half of a calibration over all its text."""
    params, batches = workload.params(), workload.batches()
    run = partial(
        run_forward, workload.config, params, workload.split, batches, dtype=workload.dtype
    )
    cost = floor.forward_cost(workload)
    return text_phase(workload, cost, workload.num_batches, run, tuple)


def factor_sweep(workload: Workload) -> Phase:
    """The backward half: the factors of middle layers from the top, without weight gradients."""
    config, params = workload.config, workload.params()
    swept = min(workload.num_swept, workload.num_middle)

    def prepare() -> tuple[CalibrationPass]:
        return (_forward_pass(workload, swept),)

    def run(forward_pass: CalibrationPass) -> None:
        sweep = sweep_middle(config, params, workload.split, forward_pass)
        for _, factors in islice(sweep, swept):
            jax.block_until_ready(factors)

    times = workload.num_middle / swept
    cost = floor.sweep_cost(workload, swept)
    program = partial(lower_sweep, workload)
    return text_phase(
        workload, cost, workload.num_batches, run, prepare, program=program, times=times
    )


def _forward_pass(workload: Workload, swept: int) -> CalibrationPass:
    """A pass whose topmost boundaries are there; others would not be reached."""
    shape = (workload.num_batches, workload.batch_size, workload.length)
    stream = partial(jnp.ones, (*shape, workload.config.hidden_size), workload.dtype)
    missing = workload.num_middle - swept
    return CalibrationPass(
        boundaries=[None] * missing + [stream() for _ in range(swept)],
        masks=jnp.ones(shape),
        cotangents=Cotangents(stream(), None),
        loss=0.0,
        num_tokens=workload.num_batches * workload.tokens,
        num_sequences=workload.num_batches * workload.batch_size,
    )


def lower_sweep(workload: Workload) -> jax.stages.Lowered:
    """The sweep of one layer, from shapes alone."""
    shape = (workload.num_batches, workload.batch_size, workload.length)
    stream = jax.ShapeDtypeStruct((*shape, workload.config.hidden_size), workload.dtype)
    block = jax.eval_shape(lambda params: get_block(params.segments[0], 0), workload.shapes())
    return sweep_layer.lower(
        layer_function(workload.config),
        block,
        jax.eval_shape(zero_taps, block),
        stream,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        Cotangents(stream, None),
        with_gradient=False,
    )


def decomposition(workload: Workload) -> Phase:
    """Decomposition of one middle layer's attention maps."""
    kernels = cast(_layer(workload).attention.kernel, jnp.float32)
    run = gradot_rule().decompose
    cost = floor.decomposition_cost(workload)
    return _layer_phase(workload, cost, run, lambda: (kernels, unit_factors(workload)))


def selection(workload: Workload) -> Phase:
    """Scores of one middle layer, its orders of keeping, and the layer cut to size."""
    rule, layer, factors = gradot_rule(), _layer(workload), unit_factors(workload)
    parts = rule.decompose(cast(layer.attention.kernel, jnp.float32), factors)
    least = rank_pool(*[workload.config.hidden_size] * 2).floor

    def run():
        terms = rule.terms(layer, parts, factors)
        candidate = Candidate(layer, parts, terms, None)
        scores = jax.vmap(partial(combine, weight=0.0))(terms.components)
        orders = jax.device_get(component_order(scores, least))
        channels = jax.device_get(keep_order(combine(terms.channels, 0.0), 0))
        mlp = cut_mlp(candidate, channels, workload.num_channels, "none", 0.0)
        maps = [
            cut_attention(candidate, site, order, workload.rank, "none", 0.0)
            for site, order in enumerate(orders)
        ]
        return mlp, maps

    return _layer_phase(workload, floor.selection_cost(workload), run, tuple)


def compress(workload: Workload) -> Phase:
    """A compression from end to end: calibration, scores, selection and the emulator."""
    params, batches = workload.params(), workload.batches()
    options = CompressionOptions(budget=workload.budget)
    run = partial(
        run_compression,
        workload.config,
        params,
        workload.split,
        batches,
        options,
        dtype=workload.dtype,
    )
    cost = floor.compression_cost(workload)
    return text_phase(workload, cost, workload.num_batches, run, tuple)


def packaging(workload: Workload) -> Phase:
    """Writing the bundle, its digests included."""
    emulator = workload.emulator()
    dense = workload.rank >= rank_pool(*[workload.config.hidden_size] * 2).cap
    rank = None if dense else workload.rank
    ranks = tuple((site, rank) for site in ATTENTION_SITES)
    shape = LayerShape(ranks=ranks, num_channels=workload.num_channels)

    def run() -> None:
        with TemporaryDirectory() as folder:
            save_bundle(
                Path(folder) / "bundle",
                workload.config,
                emulator,
                method="gradot",
                attention_budget=workload.budget,
                mlp_budget=workload.budget,
                shapes=(shape,) * workload.num_middle,
            )

    return text_phase(workload, floor.packaging_cost(workload), 0, run, tuple)


PHASES: dict[str, Callable[[Workload], Phase]] = {
    build.__name__: build
    for build in (
        gradient,
        calibration_forward,
        factor_sweep,
        decomposition,
        selection,
        compress,
        packaging,
        step_emulator,
        step_full,
        step_all,
    )
}


def _layer(workload: Workload):
    return attention_and_mlp(get_block(workload.params().segments[0], 0))


def unit_factors(workload: Workload) -> LayerFactors:
    """Identity factors: the cost of a product does not depend on its values."""
    width, ffn = workload.config.hidden_size, workload.config.ffn_dim

    def factors(d_in: int, d_out: int, *lead: int) -> KroneckerFactors:
        eyes = [jnp.broadcast_to(jnp.eye(d), (*lead, d, d)) for d in (d_in, d_out)]
        return KroneckerFactors(eyes[0], jnp.zeros((*lead, d_in)), eyes[1], None)

    return LayerFactors(factors(width, width, 4), factors(width, ffn), factors(ffn, width))


def _layer_phase(workload: Workload, cost: Cost, run, prepare) -> Phase:
    return text_phase(workload, cost, 0, run, prepare, times=workload.num_middle)
