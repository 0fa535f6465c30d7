"""The programs of a command of the pipeline."""

from typing import Any

import jax
from jax.typing import DTypeLike

from gradot_jax.compression.plan import EmulatorSpec
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import model_shapes
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.models.tensors import layer_shapes
from gradot_jax.offsite.emulator import Emulator, build_emulator
from gradot_jax.programs.compression_run import Run
from gradot_jax.programs.program import Program


def compression_programs(run: Run) -> list[Program]:
    """Those of `gradot compress`: the method's own, then the comparison of gradients."""
    from gradot_jax.programs import compression, gradients, trained

    method = run.options.record
    if method.scores:
        own = compression.scoring_programs(run)
    elif "distillation" in method.options:
        own = trained.distillation_programs(run)
    elif "scaleot" in method.options:
        own = trained.harmonizer_programs(run)
    elif "crash" in method.options:
        own = trained.similarity_programs(run)
    elif method.reads == "weights":
        own = iter(())
    else:
        raise InputError(f"--target: the programs of {method.name} are not listed")
    # What is one program at two moments is compiled once.
    found: dict[Any, Program] = {}
    for program in (*own, *gradients.comparison_programs(run)):
        before = found.get(program.key)
        found[program.key] = program if before is None else before.and_again(program)
    return list(found.values())


def emulator_shapes(
    config: ModelConfig, split: AdapterSpec, spec: EmulatorSpec, dtype: DTypeLike
) -> Emulator:
    """An emulator as shapes, from what ships of its plan.

    Args:
        config: of the full model.
        split: of the adapter.
        spec: of the emulator.
        dtype: of all arrays.
    """
    layers = [layer_shapes(config, shape) for shape in spec.shapes]
    layers = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), layers)

    def build(model, layers) -> Emulator:
        return build_emulator(model.shell, adapter_of(model, split), layers, spec.layer_map)

    return jax.eval_shape(build, model_shapes(config, dtype), layers)
