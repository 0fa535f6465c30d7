"""`layer-drop`: evenly spread layers of the middle, as they are; offsite-tuning untrained.

That is the emulator of offsite-tuning before its distillation (Xiao et al. 2023).
"""

from gradot_jax.compression.budget import whole_layers
from gradot_jax.compression.plan import LayerShape
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.problem import Outcome, Problem, whole_layer
from gradot_jax.methods.table import Stored
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.params import layers_at
from gradot_jax.models.split import AdapterSpec


def compress(problem: Problem) -> Outcome:
    """Keeps as many layers as the budget holds."""
    problem.split.check_sandwich(problem.options.method)
    middle = problem.middle
    count = whole_layers(len(middle), problem.options.budget)
    kept = [middle[place] for place in kept_layers(len(middle), count)]
    return Outcome(
        layers=[whole_layer(problem.config, layer) for layer in kept],
        blocks=layers_at(problem.params.segments, kept),
    )


def kept_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Evenly spread layers, the first and the last included.

    Args:
        num_layers: M, layers of the middle.
        count: S <= M, layers to keep.

    Returns:
        `round(i (M - 1) / (S - 1))` for i = 0..S-1; the middle one for S = 1, none for S = 0.
    """
    if count <= 1:
        return ((num_layers - 1) // 2,)[:count]
    return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count))


def forecast(config: ModelConfig, split: AdapterSpec, options: CompressionOptions) -> Stored:
    """The whole layers that a budget holds, see `methods.table.Stored`."""
    count = whole_layers(config.num_hidden_layers - split.num_blocks, options.budget)
    ranks = tuple((site, None) for site in config.family.layout.low_rank)
    return Stored((LayerShape(ranks=ranks, num_channels=channel_count(config)),) * count)
