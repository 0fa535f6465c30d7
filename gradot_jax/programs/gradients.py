"""The programs by which a compression compares the gradients of two models."""

from collections import Counter
from collections.abc import Iterator

import jax

from gradot_jax.calibration.passes import Cotangents, forward_layer, head_of_batch, sweep_layer
from gradot_jax.models.tensors import layer_shapes
from gradot_jax.programs.compression_run import Run, embedding
from gradot_jax.programs.program import Program


def comparison_programs(run: Run) -> Iterator[Program]:
    """Those of `calibration.fidelity.gradient_fidelity`, whatever the method."""
    stored = run.options.record.forecast(run.config, run.split, run.options).shapes
    place, count = run.place, run.held_out
    stream, mask = run.stream(count), run.mask(count)
    # Boundaries of both models, of which an emulator may run as many layers, and two heads'
    # cotangents.
    beside: tuple = (run.shell, run.shell, (stream,) * (2 * run.num_layers + 2))
    if not run.options.record.streams:
        # The model as it was loaded and as it is split, and the emulator.
        whole = place.params(run.shapes)
        layers = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, run.stored),
            [layer_shapes(run.config, shape) for shape in stored],
        )
        beside = (*beside, whole, whole, place.params(layers))
    yield embedding(run, 2 * count, beside)
    kinds = Counter(stored)
    layers = {"the model's": (run.block, run.num_layers + run.split.num_blocks, run.num_middle)}
    for index, (shape, number) in enumerate(kinds.items(), 1):
        layers[f"the emulator's, kind {index}"] = (
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, run.stored),
                layer_shapes(run.config, shape),
            ),
            number,
            number,
        )
    for whose, (layer, forward, back) in layers.items():
        layer = place.params(layer)
        yield Program(
            name=f"comparison forward, one layer of {whose}",
            function=forward_layer,
            args=(run.apply(), layer, stream, mask),
            times=forward,
            beside=beside,
        )
        backward = {
            "function": sweep_layer,
            "args": (run.apply(), layer, None, stream, mask, Cotangents(stream, None)),
            "beside": beside,
        }
        yield Program(
            name=f"comparison back, one layer of {whose}",
            kwargs={"with_gradient": False},
            times=back,
            **backward,
        )
        if whose == "the model's":
            yield Program(
                name="comparison back, one layer of the adapter",
                kwargs={"with_gradient": True},
                times=2 * run.split.num_blocks,
                **backward,
            )
    yield Program(
        name="head in the comparison",
        function=head_of_batch,
        args=(
            run.config,
            run.shell,
            place.array(stream.shape[1:], run.dtype, "data"),
            run.batch,
            None,
            False,
        ),
        times=2 * count,
        beside=beside,
    )
