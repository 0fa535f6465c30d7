"""What a compression will store, known before it starts: shapes, parameters and bytes."""

import dataclasses

from gradot_jax.compression.plan import HarmonizerShape, LayerShape, Plan
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.split import AdapterSpec
from gradot_jax.models.tensors import (
    adapter_schema,
    count_all,
    count_kernels,
    layer_schema,
    middle_schema,
    model_schema,
    shell_schema,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the emulator will be.

    The budget is of `kept_kernels / middle_kernels`; biases and norms come on top.

    Attributes:
        shapes: of the stored middle layers, see `methods.table.Stored`.
        middle: parameters of the original's middle.
        middle_kernels: those of them in kernels.
        kept: parameters of the emulator's.
        kept_kernels: those of them in kernels.
        unchanged: parameters that are shipped as they are.
        original: parameters of the whole model.
        trained: parameters that the compression trains.
    """

    shapes: tuple[LayerShape | HarmonizerShape, ...]
    middle: int
    middle_kernels: int
    kept: int
    kept_kernels: int
    unchanged: int
    original: int
    trained: int

    @property
    def shipped(self) -> int:
        """Parameters in the bundle."""
        return self.kept + self.unchanged


def forecast(config: ModelConfig, split: AdapterSpec, options: CompressionOptions) -> Forecast:
    """Sizes that a compression will yield.

    Raises:
        InputError: for a split without a middle, or a budget that cannot be met.
    """
    split.check(config.num_hidden_layers)
    stored = options.record.forecast(config, split, options)
    whole, kept = model_schema(config), middle_schema(config, stored.shapes)
    outer = shell_schema(config) | adapter_schema(config, split)
    middle = {name: shape for name, shape in whole.items() if name not in outer}
    return Forecast(
        shapes=stored.shapes,
        middle=count_all(middle),
        middle_kernels=count_kernels(middle),
        kept=count_all(kept),
        kept_kernels=count_kernels(kept),
        unchanged=count_all(outer),
        original=count_all(whole),
        trained=stored.trained,
    )


def kernel_parameters(config: ModelConfig, plan: Plan) -> tuple[int, int]:
    """Parameters of the kernels that a plan keeps of the middle, and that the middle has.

    Biases and norms do not count. The middle is all that is outside the adapter of the plan.
    """
    split = AdapterSpec(plan.num_bottom, plan.num_top, plan.inner)
    block = count_kernels(layer_schema(config.family.block_shapes(config)))
    kept = count_kernels(middle_schema(config, plan.emulator.shapes))
    return kept, (config.num_hidden_layers - split.num_blocks) * block
