from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.opt.params import init_params


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture
def random_params():
    """Makes parameters of a configuration, every one of them random."""

    def make(config):
        draw = np.random.default_rng(0).normal
        shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), shapes)

    return make
