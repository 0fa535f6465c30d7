import jax
import numpy as np
import pytest
import scipy.special

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params
from gradot_jax.models.run import forward
from gradot_jax.nn.batch import Batch


@pytest.fixture(scope="session")
def config():
    return OPTConfig(
        vocab_size=300,
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=40,
        init_std=0.5,
    )


@pytest.fixture(scope="session")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="session")
def log_probabilities(config, params):
    """Float64 log-probabilities `[B, T, V]`, normalised outside the code under test."""

    def compute(input_ids, attention_mask):
        logits = np.asarray(forward(config, params, input_ids, attention_mask), np.float64)
        return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)

    return compute


@pytest.fixture
def examples(config):
    """Seven right-padded sequences, of which every fourth token or so counts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, config.vocab_size, (7, 13)).astype(np.int32)
    attention = (np.arange(12) < rng.integers(6, 13, (7, 1))).astype(np.int32)
    loss = (attention * (rng.random((7, 12)) < 0.25)).astype(np.float32)
    loss[:, 3] = 1.0
    return Batch(ids[:, :-1], ids[:, 1:], loss, attention)
