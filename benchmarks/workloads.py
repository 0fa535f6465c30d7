"""Workloads: the shapes that are measured, with random weights and tokens.

What a phase costs depends on shapes alone, so nothing is downloaded and nothing trained.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params, init_params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.split import AdapterSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its split and the text that it sees.

    Attributes:
        config: the model, of `config.max_position_embeddings` tokens a sequence.
        split: blocks of the adapter.
        batch_size: B.
        num_batches: S, batches of calibration text.
        budget: share of the middle that the emulator keeps.
    """

    config: OPTConfig
    split: AdapterSpec
    batch_size: int
    num_batches: int
    budget: float = 0.6

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.config.max_position_embeddings

    @property
    def tokens(self) -> int:
        """N, tokens of one batch."""
        return self.batch_size * self.length

    @property
    def num_outer(self) -> int:
        """Blocks of the adapter."""
        return self.split.num_bottom + self.split.num_top

    @property
    def num_middle(self) -> int:
        """M, blocks of the middle."""
        return self.config.num_hidden_layers - self.num_outer

    def params(self) -> Params:
        """Random weights, drawn on the host so that no initialiser has to be compiled."""
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(partial(init_params, self.config), jax.random.key(0))
        return jax.tree.map(
            lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes
        )

    def batches(self) -> list[Batch]:
        """S batches of random tokens, every one real and counted."""
        rng = np.random.default_rng(1)
        shape = (self.num_batches, self.batch_size, self.length + 1)
        ones = np.ones((self.batch_size, self.length), np.float32)
        return [
            Batch(*map(jnp.asarray, (ids[:, :-1], ids[:, 1:], ones, ones)))
            for ids in rng.integers(0, self.config.vocab_size, shape, np.int32)
        ]


def _config(blocks: int, width: int, ffn: int, heads: int, vocabulary: int, length: int):
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=blocks,
        ffn_dim=ffn,
        num_attention_heads=heads,
        max_position_embeddings=length,
        word_embed_proj_dim=width,
    )


WORKLOADS = {
    "tiny": Workload(
        config=_config(16, 128, 512, 4, 2048, 128),
        split=AdapterSpec(2, 2),
        batch_size=16,
        num_batches=8,
    ),
    "small": Workload(
        config=_config(12, 256, 1024, 8, 4096, 256),
        split=AdapterSpec(2, 2),
        batch_size=8,
        num_batches=4,
    ),
    "smoke": Workload(
        config=_config(4, 16, 32, 2, 24, 8),
        split=AdapterSpec(1, 1),
        batch_size=2,
        num_batches=2,
    ),
}
"""`tiny` has the shape of the bundled model; `smoke` is for tests."""
