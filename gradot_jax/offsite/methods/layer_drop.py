"""`layer-drop`: evenly spread layers of the middle, as they are; offsite-tuning untrained."""

from gradot_jax.compression.layer_drop import kept_layers
from gradot_jax.offsite.method import Outcome, Problem, layers_to_keep, whole_layer
from gradot_jax.offsite.split import middle_blocks


def compress(problem: Problem) -> Outcome:
    """Keeps the number of layers that is nearest to the budget."""
    problem.split.check_sandwich("layer-drop")
    middle = middle_blocks(problem.params, problem.split)
    numbers = problem.split.middle_layers(problem.params.num_layers)
    kept = kept_layers(len(middle), layers_to_keep(len(middle), problem.options))
    layers = [whole_layer(problem.config, numbers[layer]) for layer in kept]
    return Outcome(layers, [middle[layer] for layer in kept])
