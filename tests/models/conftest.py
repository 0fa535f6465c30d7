from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.params import Params, init_params, unstack_blocks


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "opt" / "golden"


@pytest.fixture
def random_params():
    """Makes parameters of a configuration, every one of them random."""

    def make(config):
        draw = np.random.default_rng(0).normal
        shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), shapes)

    return make


@pytest.fixture
def on_host() -> Callable[[Params], Params]:
    """Puts a model into the form of a memory-mapped one: numpy, each block a segment."""

    def convert(params: Params) -> Params:
        shell, blocks = jax.tree.map(np.asarray, (params.shell, unstack_blocks(params.segments)))
        singles = tuple(jax.tree.map(lambda leaf: leaf[None], block) for block in blocks)
        return Params(shell, singles)

    return convert
