"""Test settings, the one table of tolerances, and a model of the smallest size that is sharp.

Eight CPU devices, full matmul precision, no silent rank promotion. The tolerances are relative to
the largest entry expected; none is loosened to make a test pass.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands keep compiled programs in the home folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params, init_params
from gradot_jax.nn.batch import Batch

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

TOLERANCES = {
    "float64": 1e-10,  # linear algebra on the host
    "float32": 2e-6,  # a product or two
    "float32_model": 2e-5,  # a pass through a model, forward or backward
    "bfloat16": 3e-2,
    "bfloat16_model": 0.15,  # a backward pass whose every activation is rounded
    "monte_carlo": 6e-2,  # four standard errors of the largest entry at 4,096 samples
}
PLATFORM_FACTOR = {"cpu": 1, "gpu": 4, "tpu": 16}


@pytest.fixture(scope="session")
def assert_close():
    """Asserts that trees agree within a named tolerance, relative to each leaf's largest entry."""

    def check(actual, expected, tolerance: str) -> None:
        relative = TOLERANCES[tolerance] * PLATFORM_FACTOR[jax.default_backend()]
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
        for (path, got), wanted in pairs:
            got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
            scale = np.abs(wanted).max(initial=0) or 1.0
            np.testing.assert_allclose(
                got, wanted, rtol=0, atol=relative * scale, err_msg=jax.tree_util.keystr(path)
            )

    return check


@pytest.fixture(scope="session")
def toy_model():
    """Builds `(config, params)`: D 8, H 2, F 12, V 13, L 5; options are fields of the config."""

    @functools.cache
    def build(dtype: str = "float32", **changes) -> tuple[OPTConfig, Params]:
        sizes = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 5, "ffn_dim": 12}
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
        config = OPTConfig(**(sizes | {"word_embed_proj_dim": 8} | changes))
        rng = np.random.default_rng(0)

        def fill(path, leaf) -> jax.Array:
            # Biases and gains vary too: constant ones would hide a mistake in them.
            gain = path[-1].name == "scale"
            return jnp.asarray(gain + 0.4 * rng.normal(size=leaf.shape), dtype)

        shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return config, jax.tree.map_with_path(fill, shapes)

    return build


@pytest.fixture(scope="session")
def toy_batch():
    """Builds a `Batch` of random tokens for `toy_model`, every token counted, `[B, 6]`."""

    def build(seed: int = 0, size: int = 8) -> Batch:
        tokens = np.random.default_rng(seed).integers(0, 13, (size, 7))
        ones = np.ones((size, 6), np.float32)
        return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], ones, ones)))

    return build
