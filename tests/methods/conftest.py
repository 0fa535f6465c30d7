"""A layer of no family, with what a calibration might have found of it; and a model of six."""

from collections.abc import Callable
from functools import cache
from typing import ClassVar, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.memory.forecast import Forecast, forecast
from gradot_jax.methods.compress import Compression, run_compression
from gradot_jax.methods.options import CompressionOptions, DistillationOptions, ScaleOTOptions
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import Channels, Layout, Site
from gradot_jax.nn.linear import Dense, Linear

D, F, TOKENS = 6, 8, 20


@flax.struct.dataclass
class ToyBlock:
    """Two maps that are square, one that is not, and an MLP with two maps into its channels."""

    layout: ClassVar[Layout] = Layout(
        sites=(
            Site("query", "x", "query", "column"),
            Site("key", "x", "key", "column"),
            Site("out", "mixed", "out", "row"),
            Site("gate", "y", "gate", "column"),
            Site("up", "y", "up", "column"),
            Site("down", "hidden", "down", "row"),
        ),
        channels=Channels(into=("gate", "up"), out="down"),
        norms=(),
    )

    query: Linear
    key: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear


SHAPES = {
    "query": (D, D),
    "key": (D, 4),
    "out": (D, D),
    "gate": (D, F),
    "up": (D, F),
    "down": (F, D),
}


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., tuple[ToyBlock, dict[str, KroneckerFactors]]]:
    """Builds a layer and its factors by site; `dtype` is that of the weights."""

    def build(seed=0, dtype="float32"):
        rng = np.random.default_rng(seed)

        def dense(d_in, d_out) -> Dense:
            kernel, bias = rng.normal(size=(d_in, d_out)), rng.normal(size=d_out)
            return Dense(jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype))

        def factors(d_in, d_out) -> KroneckerFactors:
            x, g = rng.normal(size=(TOKENS, d_in)), rng.normal(size=(TOKENS, d_out))
            removals = x * (g @ rng.normal(size=(d_out, d_in)))
            means = x.T @ x, x.sum(0), g.T @ g, x.T @ g, g.sum(0), removals.T @ removals
            a, mean, g2, dw, db, fisher = (jnp.asarray(m / TOKENS, jnp.float32) for m in means)
            return KroneckerFactors(a, mean, g2, Dense(dw, db), fisher)

        block = ToyBlock(**{site: dense(*shape) for site, shape in SHAPES.items()})
        return block, {site: factors(*shape) for site, shape in SHAPES.items()}

    return build


QUICK = {
    "distillation": DistillationOptions(steps=1, warmup_steps=0),
    "scaleot": ScaleOTOptions(steps=1, harmonizer_rank=2, group_size=2),
}
"""Options with which methods that train do next to nothing."""


class SixLayers(NamedTuple):
    """A model of six layers, the four between the first and the last to be compressed."""

    config: ModelConfig
    compress: Callable[..., Compression]
    forecast: Callable[..., Forecast]


@pytest.fixture(scope="session")
def six_layers(toy_model, toy_batch) -> SixLayers:
    """Compresses by method and further options on a single batch, each but once."""
    config, params = toy_model(num_hidden_layers=6)
    batches, split = [toy_batch(size=4)], AdapterSpec(1, 1)

    def options(method: str, **asked) -> CompressionOptions:
        read = CompressionOptions(method=method).record.options
        quick = {name: value for name, value in QUICK.items() if name in read}
        return CompressionOptions(method=method, **(quick | asked))

    @cache
    def compress(method: str, **asked) -> Compression:
        return run_compression(config, params, split, batches, options(method, **asked))

    return SixLayers(
        config, compress, lambda method, **asked: forecast(config, split, options(method, **asked))
    )
