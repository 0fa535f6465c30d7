"""The programs of methods that train an emulator, or look at whole models: all but the scored."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.compression.score import by_shape
from gradot_jax.linalg.decomposition import default_algorithm
from gradot_jax.linalg.spread import host_device, one_program
from gradot_jax.linalg.svd import decompose_all
from gradot_jax.methods.crash.crash import MAX_SEQUENCES, pooled_states
from gradot_jax.methods.crash.similarity import adjacent_cka
from gradot_jax.methods.offsite_tuning import (
    DistillationState,
    distillation_optimizer,
    distillation_step,
    jitted_sums,
)
from gradot_jax.methods.scaleot.layer_replace import (
    ReplaceState,
    harmonizer_optimizer,
    init_harmonizers,
    jitted_network_loss,
    replace_step,
)
from gradot_jax.models.params import model_shapes
from gradot_jax.models.split import split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import maps
from gradot_jax.programs.compression_run import Run
from gradot_jax.programs.program import Place, Program


def distillation_programs(run: Run) -> Iterator[Program]:
    """Those of `offsite-tuning`."""
    options, place = run.options.distillation, run.place
    stored = run.options.record.forecast(run.config, run.split, run.options).shapes
    optimizer = distillation_optimizer(options)
    model = model_shapes(run.config, run.dtype)
    original = place.params(jax.eval_shape(lambda params: split_model(params, run.split), model))

    def first(blocks: Any) -> DistillationState:
        student = jax.tree.map(lambda leaf: leaf[: len(stored)].astype(jnp.float32), blocks)
        return DistillationState(student, optimizer.init(student))

    state = place.params(jax.eval_shape(first, model.segments[0]))
    whole, blocks = place.params(model), _as(state.student, run.dtype)
    # The model as it was loaded, the blocks that are kept and their stack, the best so far.
    beside = (whole, blocks, blocks, *([state.student] if run.num_batches > 1 else []))
    yield Program(
        name="distillation step",
        function=distillation_step,
        args=(
            run.config,
            optimizer,
            state,
            original,
            run.batch,
            (options.lm_weight, options.kd_weight),
        ),
        kwargs={"mesh": place.mesh},
        times=options.steps,
        beside=beside,
    )
    yield Program(
        name="distillation losses",
        function=jitted_sums,
        args=(run.config, state.student, original, run.batch),
        beside=(*beside, state.optimizer),
    )


def _as(tree: Any, dtype: DTypeLike) -> Any:
    def same(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree.map(same, tree)


def harmonizer_programs(run: Run) -> Iterator[Program]:
    """Those of `scaleot`."""
    options, place = run.options.scaleot, run.place
    optimizer = harmonizer_optimizer(options)
    layers = run.config.num_hidden_layers

    def first(key: jax.Array) -> ReplaceState:
        harmonizers = init_harmonizers(run.config, options.harmonizer_rank, key)
        bits = jax.random.key_data(key)
        return ReplaceState(harmonizers, optimizer.init(harmonizers), jnp.zeros(layers), bits)

    state = place.params(jax.eval_shape(lambda: first(jax.random.key(0))))
    model = place.params(model_shapes(run.config, run.dtype))
    held_out = max(run.num_batches // 5, 1)
    ids, counted = (
        place.array((held_out, run.batch_size, run.length), dtype, None, "data")
        for dtype in (jnp.int32, jnp.float32)
    )
    yield Program(
        name="harmonizer step",
        function=replace_step,
        args=(
            run.config,
            optimizer,
            options,
            state,
            model,
            run.batch,
            Batch(ids, ids, counted, ids),
        ),
        kwargs={"mesh": place.mesh},
        times=options.steps,
    )
    yield from _rank_reductions(run)
    raw = place.replicated(jax.ShapeDtypeStruct((layers,), jnp.bool_))
    yield Program(
        name="loss of a network",
        function=jitted_network_loss,
        args=(run.config, model, state.harmonizers, raw, run.batch),
    )


def _rank_reductions(run: Run) -> Iterator[Program]:
    """Decompositions of the attention of a layer that `scaleot` keeps, on one device."""
    from gradot_jax.methods.scaleot.scaleot import attention_ranks
    from gradot_jax.methods.scored import unstack_on_device

    if not any(attention_ranks(run.config, run.options).values()):
        return
    alone = Place(run.place.devices[:1])
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, run.dtype), run.block)
    sites = {site: maps(block)[site].kernel for site in block.layout.low_rank}
    for group in by_shape({site: kernel.shape for site, kernel in sites.items()}):
        shape = sites[group[0]].shape
        kernels = jax.ShapeDtypeStruct((len(group), *shape), run.dtype)
        home = alone.devices[0]
        host = host_device(home)
        algorithm = default_algorithm((host or home).platform)
        function, args = one_program(decompose_all, kernels, None, home, algorithm)
        name = f"decomposition ({algorithm}), {', '.join(group)}"
        yield Program(
            name=name,
            function=function,
            args=args,
            times=run.num_middle,
            on_host=host is not None,
        )
        parts, _, _ = jax.eval_shape(lambda k, a=algorithm: decompose_all(k, a), kernels)
        yield Program(
            name=f"components apart, {', '.join(group)}",
            function=unstack_on_device,
            args=(alone.replicated(parts), group),
            times=run.num_middle,
        )


def similarity_programs(run: Run) -> Iterator[Program]:
    """Those of `crash`."""
    place, text = run.place, run.batch
    model = place.params(model_shapes(run.config, run.dtype))
    yield Program(
        name="hidden states",
        function=pooled_states,
        args=(run.config, model, text.input_ids, text.attention_mask),
        times=run.num_batches,
    )
    rows = min(run.num_batches * run.batch_size, MAX_SEQUENCES)
    shape = (run.config.num_hidden_layers, rows, run.config.hidden_size)
    states = jax.ShapeDtypeStruct(shape, jnp.float32)
    yield Program(
        name="similarity of layers",
        function=adjacent_cka,
        args=(place.replicated(states),),
        beside=(model,),
    )
