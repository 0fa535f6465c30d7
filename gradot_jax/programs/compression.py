"""The programs of methods that score every layer: their calibration, decompositions, scores."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gradot_jax.calibration.passes import (
    LayerSums,
    forward_layer,
    head_of_batch,
    input_moments,
    sweep_layer,
)
from gradot_jax.compression.score import LayerTerms, ScoreTerms, by_shape
from gradot_jax.curvature.factors import KroneckerFactors, normalise
from gradot_jax.curvature.tap import zero_taps
from gradot_jax.linalg.decomposition import default_algorithm
from gradot_jax.linalg.spread import host_device, one_program
from gradot_jax.linalg.svd import SVD, decompose_all
from gradot_jax.linalg.whitened import Whitened, decompose_moments, map_back, whiten
from gradot_jax.methods.activation_svd import activation_terms
from gradot_jax.methods.allocation import lambdas, layer_orders
from gradot_jax.methods.gradot import rule_of
from gradot_jax.methods.magnitude import magnitude_terms
from gradot_jax.methods.scored import WHITENING_DAMPING, stack_on_device, unstack_on_device
from gradot_jax.models.family import channel_count
from gradot_jax.nn.layout import maps
from gradot_jax.programs.compression_run import Run, embedding
from gradot_jax.programs.program import Place, Program


def scoring_programs(run: Run) -> Iterator[Program]:
    """Those of a method that scores every layer, `methods.scored.shrink_layers`."""
    options = run.options
    if options.calibrates == "factors":
        yield from _calibration(run)
    elif options.calibrates == "inputs":
        yield from _input_pass(run)
    yield from _decompositions(run)
    yield from _scores(run)


def _calibration(run: Run) -> Iterator[Program]:
    place, options, count = run.place, run.options, run.num_batches
    layer, stream, mask = place.params(run.block), run.stream(count), run.mask(count)
    cotangents, above = run.cotangents, run.num_layers - run.split.num_bottom
    yield embedding(run, count, (stream,))
    yield Program(
        name="calibration forward, one layer",
        function=forward_layer,
        args=(run.apply(), layer, stream, mask),
        times=run.num_layers,
        beside=(run.shell, run.boundaries(above - 1)),
    )
    key = place.replicated(jax.eval_shape(lambda: jax.random.key(0)))
    yield Program(
        name="head and its cotangents",
        function=head_of_batch,
        args=(
            run.config,
            run.shell,
            place.array(stream.shape[1:], run.dtype, "data"),
            run.batch,
            key if options.fisher == "mc" else None,
            cotangents.loss is not None,
        ),
        times=count,
        # The last layer's output, and cotangents batch by batch.
        beside=(run.boundaries(above), stream, cotangents),
    )
    yield Program(
        name="way back through the top, one layer",
        function=sweep_layer,
        args=(run.apply(), layer, None, stream, mask, cotangents),
        kwargs={"with_gradient": False},
        times=run.split.num_top,
        beside=(run.shell, run.boundaries(above - 1)),
    )
    taps = jax.eval_shape(
        partial(zero_taps, with_removals=options.channel_score == "token-fisher"), run.block
    )
    around = run.boundaries(run.num_middle - 1)
    yield Program(
        name="factor sweep, one layer",
        function=sweep_layer,
        args=(
            run.apply(options.skip_positions or 0),
            layer,
            place.factors(taps),
            stream,
            mask,
            cotangents,
        ),
        kwargs={"with_gradient": options.reads_gradient},
        times=run.num_middle,
        beside=around,
    )
    yield from _normalisations(run, taps, (around, cotangents))


def _input_pass(run: Run) -> Iterator[Program]:
    place, count = run.place, run.num_batches
    layer, stream, mask = place.params(run.block), run.stream(count), run.mask(count)
    taps = jax.eval_shape(partial(zero_taps, with_outputs=False), run.block)
    apply = run.apply(run.options.skip_positions or 0)
    yield embedding(run, count, (stream,))
    yield Program(
        name="calibration forward, one layer",
        function=forward_layer,
        args=(apply, layer, stream, mask),
        times=run.split.num_bottom,
    )
    yield Program(
        name="moments of inputs, one layer",
        function=input_moments,
        args=(apply, layer, place.factors(taps), stream, mask),
        times=run.num_middle,
    )
    yield from _normalisations(run, taps, (stream,))


def _normalisations(run: Run, taps: Any, beside: tuple) -> Iterator[Program]:
    """From sums to factors, one program for each kind of map."""
    block, layout = run.block, run.block.layout
    sums = LayerSums(run.place.factors(taps), _gradients(run))
    kinds = {s.name: _kind(block, s, layout, sums.gradient) for s in layout.sites}
    factors = _factors(run) or {}
    for group in by_shape(kinds):
        site = next(s for s in layout.sites if s.name == group[0])
        outputs = None if taps.outputs is None else sums.taps.outputs[site.name]
        removals = sums.taps.removals if site.name == layout.channels.out else None
        gradient = None if sums.gradient is None else getattr(sums.gradient, site.name)
        own = (sums.taps.inputs[site.reads], outputs, gradient, removals)
        # All sums but its own, and at the last site the factors of all others.
        others = [parts for name, parts in factors.items() if name != site.name]
        yield Program(
            name=f"factors of {', '.join(group)}",
            function=normalise,
            args=(*own[:3], 1, removals),
            times=len(group) * run.num_middle,
            beside=(*beside, *_without(sums, own), others),
        )


def _without(tree: Any, parts: Any) -> list:
    """The leaves of a tree that are not among those of its parts."""
    own = {id(leaf) for leaf in jax.tree.leaves(parts)}
    return [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in own]


def _kind(block: Any, site: Any, layout: Any, gradient: Any) -> tuple:
    """What decides the program of a site's factors: gradients lie as the weights do."""
    weights = maps(block)[site.name]
    of_gradient = None if gradient is None else (weights.bias is None, site.split)
    return weights.shape, of_gradient, site.name == layout.channels.out


def _gradients(run: Run) -> Any:
    if not run.options.reads_gradient:
        return None
    return run.place.params(
        jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), run.block)
    )


def _factors(run: Run) -> dict[str, KroneckerFactors] | None:
    """Of each site of a layer, as the scores take them."""
    options, block = run.options, run.block
    if options.calibrates == "nothing":
        return None
    place, gradients = run.place, _gradients(run)
    both = options.calibrates == "factors"

    def square(width: int) -> Any:
        return place.factors(jax.ShapeDtypeStruct((width, width), jnp.float32))

    def of_site(name: str, weights: Any) -> KroneckerFactors:
        d_in, d_out = weights.shape
        sets = options.channel_score == "token-fisher" and name == block.layout.channels.out
        return KroneckerFactors(
            input_covariance=square(d_in),
            input_mean=place.array((d_in,), jnp.float32),
            gradient_covariance=square(d_out) if both else None,
            gradient=None if gradients is None else getattr(gradients, name),
            removal_fisher=square(d_in) if sets else None,
        )

    return {name: of_site(name, weights) for name, weights in maps(block).items()}


def _around_scores(run: Run) -> tuple:
    """What lies on the devices while a layer is scored, beside what the programs take."""
    if run.options.calibrates == "factors":
        return (run.boundaries(run.num_middle - 1), run.cotangents)
    return () if run.options.calibrates == "nothing" else (run.stream(run.num_batches),)


def _decompositions(run: Run) -> Iterator[Program]:
    """Of the kernels of equal shape together, as `methods.scored.decompose_layers` takes them."""
    block, mesh, home = run.block, run.place.mesh, run.place.devices[0]
    layout, factors = block.layout, _factors(run)
    whitened = run.options.attention_basis == "whitened" or run.options.calibrates == "inputs"
    whitened &= run.options.record.reads in ("factors", "inputs")
    on_host = host_device(home) is not None
    beside = (*_around_scores(run), run.place.replicated(block))
    together = 1
    if mesh is not None and not whitened:
        workers = run.place.num_hosts if on_host else mesh.mesh.size
        together = min(max(workers // len(layout.low_rank), 1), run.num_middle)
    # The last of them may be fewer.
    batches = {together: run.num_middle // together, run.num_middle % together: 1}
    kernels = {site: maps(block)[site].kernel for site in layout.low_rank}
    for group in by_shape({site: kernel.shape for site, kernel in kernels.items()}):
        if whitened and factors is not None:
            known = {site: factors[site] for site in group}
            yield Program(
                name=f"factors together, {', '.join(group)}",
                function=stack_on_device,
                args=(known, group),
                times=run.num_middle,
                beside=(*beside, _without(factors, known)),
            )
        for layers, times in batches.items():
            if not layers:
                continue
            number = len(group) * layers
            label = ", ".join(group) + ("" if layers == together else ", those that are left")
            batch = _stacked(kernels[group[0]], number)
            for name, function, own, options in _steps(run, batch, whitened):
                jitted, args = one_program(function, own, mesh, home, *options)
                yield Program(
                    name=f"{name}, {label}",
                    function=jitted,
                    args=args,
                    times=times,
                    beside=(*beside, factors),
                    on_host=on_host,
                )
            yield Program(
                name=f"components apart, {label}",
                function=unstack_on_device,
                args=(
                    run.place.replicated(_svd_of(batch)),
                    group if together == 1 else tuple(range(number)),
                ),
                times=times,
                beside=(*beside, factors),
            )


def _steps(run: Run, kernels: Any, whitened: bool) -> Iterator[tuple]:
    return _whitened_svd(run, kernels) if whitened else _plain_svd(run, kernels)


def _stacked(kernel: Any, number: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((number, *kernel.shape), kernel.dtype)


def _svd_of(matrices: Any) -> SVD:
    *lead, d_in, d_out = matrices.shape
    size = min(d_in, d_out)
    shapes = ((*lead, d_in, size), (*lead, size), (*lead, d_out, size))
    return SVD(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def _plain_svd(run: Run, kernels: Any) -> Iterator[tuple]:
    home = run.place.devices[0]
    algorithm = default_algorithm((host_device(home) or home).platform)
    yield f"decomposition ({algorithm})", decompose_all, kernels, (algorithm,)


def _whitened_svd(run: Run, kernels: Any) -> Iterator[tuple]:
    number, d_in, d_out = kernels.shape
    moments = [jax.ShapeDtypeStruct((number, d, d), jnp.float32) for d in (d_in, d_out)]
    both = run.options.calibrates == "factors"
    yield "root of inputs", decompose_moments, moments[0], (WHITENING_DAMPING,)
    if both:
        yield "root of outputs", decompose_moments, moments[1], (WHITENING_DAMPING,)
    yield "whitening", whiten, (kernels, moments[0], moments[1] if both else None), ()
    rotated = jax.ShapeDtypeStruct(kernels.shape, jnp.float32)
    yield from _plain_svd(run, rotated)
    yield "way back", map_back, Whitened(kernels, rotated, moments[0], _svd_of(kernels)), ()


def _scores(run: Run) -> Iterator[Program]:
    block, options, place = run.block, run.options, run.place
    layout, layer = block.layout, place.replicated(maps(block))
    parts = place.replicated({site: _svd_of(layer[site].kernel) for site in layout.low_rank})
    known: Mapping[str, Any] = {}
    if options.record.reads == "factors":
        terms = rule_of(run.config, options, run.num_middle).terms
        function, known = terms.func, terms.keywords
    elif options.record.reads == "inputs":
        function = activation_terms
    elif options.record.reads == "weights":
        function = magnitude_terms
    else:
        function = None
    if function is not None:
        yield Program(
            name="scores of a layer",
            function=function,
            args=(layout, layer, parts, _factors(run)),
            kwargs=known,
            times=run.num_middle,
            beside=_around_scores(run),
        )
    terms = LayerTerms(
        {site: _score_terms(run, min(layer[site].kernel.shape)) for site in layout.low_rank},
        _score_terms(run, channel_count(run.config)),
    )
    if options.allocation == "uniform":
        yield Program(
            name="order of keeping",
            function=layer_orders,
            args=(terms, *lambdas(options)),
            times=run.num_middle,
            beside=_around_scores(run),
        )


def _score_terms(run: Run, size: int) -> ScoreTerms:
    # On the host as they are handed in.
    return ScoreTerms(*[jax.ShapeDtypeStruct((size,), jnp.float32, sharding=_alone(run))] * 2)


def _alone(run: Run) -> Any:
    return Place(run.place.devices[:1]).whole
