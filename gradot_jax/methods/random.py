"""`random`: components and channels drawn at random, the floor for every scoring rule."""

import jax

from gradot_jax.compression.score import LayerTerms, without_gradient
from gradot_jax.methods.problem import Outcome, Problem
from gradot_jax.methods.scored import Factors, Maps, Parts, ScoringRule, plain_svd, shrink_layers
from gradot_jax.nn.layout import Layout


def compress(problem: Problem) -> Outcome:
    """Draws by the seed of the options; the floor of ranks is kept as in every method."""
    return shrink_layers(problem, lambda layer: random_rule(problem.options.seed, layer))


def random_rule(seed: int, layer: int) -> ScoringRule:
    """Uniform scores; each layer, by its index, has a draw of its own."""

    def terms(layout: Layout, maps: Maps, parts: Parts, factors: Factors | None) -> LayerTerms:
        del factors
        key = jax.random.fold_in(jax.random.key(seed), layer)
        of_components, of_channels = jax.random.split(key)
        sizes = {site: parts[site].values.shape[0] for site in layout.low_rank}
        drawn = jax.random.uniform(of_components, (len(sizes), max(sizes.values())))
        components = {s: row[:n] for row, (s, n) in zip(drawn, sizes.items(), strict=True)}
        channels = jax.random.uniform(of_channels, (maps[layout.channels.out].shape[0],))
        return without_gradient(components, channels)

    return ScoringRule(plain_svd, terms, decomposes_alone=True)
