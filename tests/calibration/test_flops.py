from functools import partial

import jax
import jax.numpy as jnp
import pytest

from gradot_jax.calibration.passes import (
    Cotangents,
    forward_layer,
    input_moments,
    layer_function,
    sweep_layer,
)
from gradot_jax.curvature.tap import zero_taps
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import get_block, init_params

B, T, D, F = 2, 64, 128, 512
N = B * T
WEIGHTS = 4 * D * D + 2 * D * F
MIXING = 4 * N * T * D
FACTORS = 8 * D * D + 2 * F * F * 5 / 8
"""Products of factors: D fits one block, of F's four ten sixteenths are computed."""
BACK = 2 * N * (2 * WEIGHTS - D * F) + 3 * MIXING
"""A block's inside again, but for the product whose result nobody reads, and its way back."""


@pytest.fixture(scope="module")
def flops():
    """FLOPs of a compiled pass of one block over one batch, by what is asked of it."""
    config = OPTConfig(
        vocab_size=4,
        hidden_size=D,
        num_hidden_layers=1,
        ffn_dim=F,
        num_attention_heads=4,
        max_position_embeddings=T,
        word_embed_proj_dim=D,
    )
    block = jax.eval_shape(
        lambda key: get_block(init_params(config, key).segments[0], 0), jax.random.key(0)
    )
    hidden = jax.ShapeDtypeStruct((1, B, T, D), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, B, T), jnp.float32)
    apply = layer_function(config)

    def sweep(taps, with_gradient):
        taps = None if taps is None else jax.eval_shape(taps, block)
        cotangents = Cotangents(hidden, None)
        return sweep_layer.lower(
            apply, block, taps, hidden, mask, cotangents, with_gradient=with_gradient
        )

    passes = {
        "forward": lambda: forward_layer.lower(apply, block, hidden, mask),
        "back": lambda: sweep(None, with_gradient=False),
        "back with gradient": lambda: sweep(None, with_gradient=True),
        "back with factors": lambda: sweep(zero_taps, with_gradient=False),
        "inputs": lambda: input_moments.lower(
            apply,
            block,
            jax.eval_shape(partial(zero_taps, with_outputs=False), block),
            hidden,
            mask,
        ),
    }
    return lambda name: passes[name]().compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("forward", 2 * N * WEIGHTS + MIXING),
        ("back", BACK),
        ("back with gradient", BACK + 2 * N * WEIGHTS),
        ("back with factors", BACK + 2 * N * FACTORS),
        ("inputs", 2 * N * WEIGHTS + MIXING + 2 * N * (3 * D * D + F * F * 5 / 8)),
    ],
)
def test_nothing_is_multiplied_that_nobody_reads(name, needed, flops):
    # What is no product (softmax, norms, sums) is a few per cent at this size.
    assert flops(name) < 1.06 * needed
