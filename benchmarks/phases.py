"""The measured phases: one builder each, from a workload to what runs and what it must cost.

`gradient` is the unit of all others. A step trains the adapter within the emulator, the same
adapter within the full model, or all weights. The sweep, the gradient and the steps are also
lowered from shapes alone, for models too large to run.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import floor
from benchmarks.floor import Cost
from benchmarks.harness import Phase, text_phase
from benchmarks.workloads import Step, Workload
from gradot_jax.calibration.passes import Cotangents
from gradot_jax.calibration.sweep import (
    CalibrationPass,
    run_forward,
    sweep_middle,
)
from gradot_jax.compression.channel import cut_channels
from gradot_jax.compression.plan import EmulatorSpec
from gradot_jax.compression.rank import cut_rank
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.methods.allocation import layer_orders
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.gradot import gradot_rule
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.scored import Factors, decompose_layers
from gradot_jax.models.params import Params, get_block
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import SplitModel, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.layout import Block, maps
from gradot_jax.offsite.bundle import ship
from gradot_jax.programs.compression import scoring_programs
from gradot_jax.programs.program import Place
from gradot_jax.training.adapter import Frozen, TrainState, descend, init_training, train_step
from gradot_jax.training.optimizer import make_optimizer


@cache
def optimizer() -> optax.GradientTransformation:
    """Of every step that is measured."""
    return make_optimizer(learning_rate=1e-3, num_steps=1000)


def gradient(workload: Workload) -> Phase:
    """The unit: the gradient of one batch's mean loss with respect to all weights."""
    arguments = workload.params(), workload.batches()[0]
    return text_phase(
        workload,
        1,
        run=_gradient_program(workload),
        prepare=lambda: arguments,
        cost=floor.gradient_cost(workload),
    )


def calibration_forward(workload: Workload) -> Phase:
    """The forward half of a calibration over all its text."""
    run = partial(
        run_forward,
        workload.config,
        workload.params(),
        workload.split,
        workload.batches(),
        dtype=workload.dtype,
    )
    return text_phase(workload, workload.num_batches, run=run, cost=floor.forward_cost(workload))


def factor_sweep(workload: Workload) -> Phase:
    """The backward half: the factors of middle layers from the top, without weight gradients."""
    config, params = workload.config, workload.params()
    swept = min(workload.num_swept, workload.num_middle)

    def run(forward_pass: CalibrationPass) -> None:
        sweep = sweep_middle(config, params, workload.split, forward_pass)
        for _, factors in islice(sweep, swept):
            jax.block_until_ready(factors)

    return text_phase(
        workload,
        workload.num_batches,
        run=run,
        prepare=lambda: (_forward_pass(workload, swept),),
        program=partial(lower_sweep, workload),
        cost=floor.sweep_cost(workload, swept),
        times=workload.num_middle / swept,
    )


def _forward_pass(workload: Workload, swept: int) -> CalibrationPass:
    """A pass whose topmost boundaries are there; others would not be reached."""
    shape = (workload.num_batches, workload.batch_size, workload.length)
    stream = partial(jnp.ones, (*shape, workload.config.hidden_size), workload.dtype)
    missing = workload.num_middle - swept
    return CalibrationPass(
        boundaries=[None] * missing + [stream() for _ in range(swept)],
        masks=jnp.ones(shape),
        cotangents=[Cotangents(stream(), None)],
        loss=0.0,
        num_tokens=workload.num_batches * workload.tokens,
        num_sequences=workload.num_batches * workload.batch_size,
    )


def decomposition(workload: Workload) -> Phase:
    """Decomposition of one middle layer's attention maps."""
    rule, block = gradot_rule(), cast(_block(workload), jnp.float32)
    factors = unit_factors(workload)
    return Phase(
        run=lambda: decompose_layers([block], [factors], rule),
        cost=floor.decomposition_cost(workload),
        times=workload.num_middle,
    )


def selection(workload: Workload) -> Phase:
    """Scores of one middle layer, its orders of keeping, and the layer cut to size."""
    rule, block, factors = gradot_rule(), _block(workload), unit_factors(workload)
    (parts,) = decompose_layers([cast(block, jnp.float32)], [factors], rule)
    layout, layer, shape = block.layout, maps(block), workload.layer_shape
    # No map has more components than this: with as many it stays dense.
    width = workload.config.hidden_size

    def run():
        terms = rule.terms(layout, layer, parts, factors)
        orders = jax.device_get(layer_orders(terms, 0.0, 0.0))
        mlp, _ = cut_channels(layout.channels, layer, orders.channels, shape.num_channels)
        attention = [
            cut_rank(layer[site], parts[site], orders.components[site], rank or width)[0]
            for site, rank in shape.ranks
        ]
        return mlp, attention

    return Phase(run=run, cost=floor.selection_cost(workload), times=workload.num_middle)


def compress(workload: Workload) -> Phase:
    """A compression from end to end: calibration, scores, selection and the emulator."""
    run = partial(
        run_compression,
        workload.config,
        workload.params(),
        workload.split,
        workload.batches(),
        CompressionOptions(budget=workload.budget),
        dtype=workload.dtype,
    )
    cost = floor.compression_cost(workload)
    return text_phase(workload, workload.num_batches, run=run, cost=cost)


def packaging(workload: Workload) -> Phase:
    """Writing the bundle, its digests included."""
    emulator = workload.emulator()
    spec = EmulatorSpec(
        method="gradot",
        attention_budget=workload.budget,
        mlp_budget=workload.budget,
        shapes=(workload.layer_shape,) * workload.num_middle,
        layer_map=tuple(range(workload.num_middle)),
    )

    def run() -> None:
        with TemporaryDirectory() as folder:
            ship(Path(folder) / "bundle", workload.config, spec, emulator)

    return Phase(run=run, cost=floor.packaging_cost(workload))


def step_emulator(workload: Workload) -> Phase:
    """One fine-tuning step of the adapter within the emulator."""
    return _adapter_step(workload, workload.emulator(), floor.emulator_block_weights(workload))


def step_full(workload: Workload) -> Phase:
    """One fine-tuning step of the same adapter around the original middle."""
    model = split_model(workload.params(), workload.split)
    return _adapter_step(workload, model, floor.block_weights(workload))


def step_all(workload: Workload) -> Phase:
    """One fine-tuning step of all weights, as without any split; they are float32."""
    arguments = _start_all(workload.params()), workload.batches()[0]
    return _step(workload, _all_program(workload), arguments, floor.step_all_cost(workload))


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


def lower_sweep(workload: Workload) -> jax.stages.Lowered:
    """The sweep of one layer, from shapes alone."""
    programs = scoring_programs(workload.compression(Place(jax.devices()[:1])))
    (sweep,) = (program for program in programs if program.name == "factor sweep, one layer")
    return sweep.trace().lower()


def lower_gradient(workload: Workload) -> jax.stages.Lowered:
    """The gradient's program, from shapes alone."""
    return _gradient_program(workload).lower(workload.shapes(), _batch_shapes(workload))


def lower_step(workload: Workload, kind: Step) -> jax.stages.Lowered:
    """A step's program, from shapes alone."""
    batch = _batch_shapes(workload)
    if kind == "step_all":
        return _all_program(workload).lower(jax.eval_shape(_start_all, workload.shapes()), batch)
    place = Place(jax.devices()[:1])
    step, _ = workload.tuning(place, optimizer(), full=kind == "step_full")
    return step.trace().lower()


def unit_factors(workload: Workload) -> Factors:
    """Identity factors by site: the cost of a product does not depend on its values."""

    def factors(d_in: int, d_out: int) -> KroneckerFactors:
        return KroneckerFactors(jnp.eye(d_in), jnp.zeros(d_in), jnp.eye(d_out), None)

    block = workload.config.family.block_shapes(workload.config)
    return {site: factors(*weights.shape) for site, weights in maps(block).items()}


def _block(workload: Workload) -> Block:
    return get_block(workload.params().segments[0], 0)


def _gradient_program(workload: Workload) -> jax.stages.Wrapped:
    return jax.jit(jax.grad(partial(_mean_loss, workload)))


def _mean_loss(workload: Workload, params: Params, batch: Batch) -> jax.Array:
    total, count = summed_loss(workload.config, params, batch, remat=workload.remat)
    return total / count


def _adapter_step(workload: Workload, model: SplitModel, middle_block: int) -> Phase:
    frozen, state = init_training(model, optimizer(), compute_dtype=workload.dtype)
    arguments = state, frozen, workload.batches()[0]
    cost = floor.step_cost(workload, middle_block)
    return _step(workload, _adapter_program(workload), arguments, cost)


def _adapter_program(workload: Workload) -> jax.stages.Wrapped:
    def step(state: TrainState, frozen: Frozen, batch: Batch):
        return train_step(workload.config, optimizer(), state, frozen, batch, remat=workload.remat)

    return jax.jit(step, donate_argnums=0)


def _start_all(params: Params) -> tuple[Params, optax.OptState]:
    weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return weights, optimizer().init(weights)


def _all_program(workload: Workload) -> jax.stages.Wrapped:
    def step(state: tuple[Params, optax.OptState], batch: Batch):
        weights, moments = state

        def loss_of(weights: Params) -> jax.Array:
            return _mean_loss(workload, cast(weights, workload.dtype), batch)

        loss, gradient = jax.value_and_grad(loss_of)(weights)
        return descend(optimizer(), weights, moments, gradient, None), loss

    return jax.jit(step, donate_argnums=0)


def _step(workload: Workload, run, arguments: tuple[Any, ...], cost: Cost) -> Phase:
    return text_phase(workload, 1, run=run, prepare=lambda: arguments, advance=hand_on, cost=cost)


def hand_on(arguments: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The next step's arguments: the state that a step returns, and what it read beside it."""
    return result[0], *arguments[1:]


def _batch_shapes(workload: Workload) -> Batch:
    shape = (workload.batch_size, workload.length)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(input_ids=ids, targets=ids, loss_mask=weights, attention_mask=ids)
