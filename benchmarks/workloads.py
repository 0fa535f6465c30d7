"""Workloads: the shapes that are measured, with random weights and tokens.

What a phase costs depends on shapes alone, so nothing is downloaded and nothing trained. The same
names stand for less text on CPU, where a suite has minutes, than on accelerators.
"""

import dataclasses
from functools import cache, partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.compression.budget import channel_pool, rank_pool, uniform_counts
from gradot_jax.models.opt.block import Block
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Params, model_shapes
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.offsite.emulator import Emulator

Suite = Literal["cpu", "device"]
SUITES: tuple[Suite, ...] = get_args(Suite)

Step = Literal["step_emulator", "step_full", "step_all"]
STEPS: tuple[Step, ...] = get_args(Step)
"""Phases that train: the adapter in the emulator, in the full model, or all weights."""

_SPLIT = AdapterSpec(num_bottom=2, num_top=2)
"""The papers' adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its split and the text that it sees.

    Attributes:
        config: the model.
        length: T, tokens of a sequence.
        batch_size: B.
        num_batches: S, batches of calibration text.
        split: blocks of the adapter.
        budget: share of the middle that the emulator keeps.
        dtype: of the weights and the arithmetic; factors, decompositions, scores, the weights
            that are trained and the optimiser's moments are float32 in any case.
        remat: whether gradients and steps recompute blocks instead of keeping their insides.
        num_swept: middle layers, from the top, on which the sweep is measured.
        phases: names of what is measured, most valuable first; all where empty.
    """

    config: OPTConfig
    length: int
    batch_size: int
    num_batches: int
    split: AdapterSpec = _SPLIT
    budget: float = 0.6
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    num_swept: int = 8
    phases: tuple[str, ...] = ()

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

    @property
    def rank(self) -> int:
        """R, components that an attention map of the emulator keeps; the cap means all."""
        return uniform_counts([rank_pool(*[self.config.hidden_size] * 2)], self.budget)[0]

    @property
    def num_channels(self) -> int:
        """Channels that an MLP of the emulator keeps."""
        return uniform_counts(
            [channel_pool(self.config.ffn_dim, 2 * self.config.hidden_size)], self.budget
        )[0]

    def shapes(self) -> Params:
        """The model as shapes and dtypes alone."""
        return model_shapes(self.config, self.dtype)

    def params(self) -> Params:
        """Random weights on the default device."""
        return _filled(self.shapes())

    def emulator(self) -> Emulator:
        """Random weights in the shape that a compression with one share for all layers yields."""
        return _filled(self.emulator_shapes())

    def emulator_shapes(self) -> Emulator:
        """The same as shapes and dtypes alone."""
        return jax.eval_shape(self._emulator, self.shapes())

    def _emulator(self, params: Params) -> Emulator:
        model = split_model(params, self.split)
        middle = tuple(shrink(stack, self.rank, self.num_channels) for stack in model.middle)
        return Emulator(model.shell, model.adapter, middle)

    def batches(self) -> list[Batch]:
        """S batches of random tokens, every one real and counted."""
        rng = np.random.default_rng(1)
        shape = (self.num_batches, self.batch_size, self.length + 1)
        ones = jnp.ones((self.batch_size, self.length))
        return [
            Batch(
                input_ids=jnp.asarray(ids[:, :-1]),
                targets=jnp.asarray(ids[:, 1:]),
                loss_mask=ones,
                attention_mask=ones,
            )
            for ids in rng.integers(0, self.config.vocab_size, shape, np.int32)
        ]

    def describe(self) -> dict[str, object]:
        """Its shapes as JSON values."""
        config = self.config
        return {
            "num_bottom": self.split.num_bottom,
            "num_middle": self.num_middle,
            "num_top": self.split.num_top,
            "width": config.hidden_size,
            "ffn": config.ffn_dim,
            "heads": config.num_attention_heads,
            "vocabulary": config.vocab_size,
            "length": self.length,
            "batch_size": self.batch_size,
            "num_batches": self.num_batches,
            "budget": self.budget,
            "dtype": jnp.dtype(self.dtype).name,
            "remat": self.remat,
        }


def shrink(blocks: Block, rank: int, num_channels: int) -> Block:
    """A stack cut to size with no regard to what it keeps; the full rank keeps a map dense."""

    def cut(dense: Dense) -> Dense | LowRank:
        if rank >= rank_pool(*dense.shape).cap:
            return dense
        return LowRank(dense.kernel[..., :rank], dense.kernel[..., :rank, :], dense.bias)

    fc1, fc2 = blocks.fc1, blocks.fc2
    return blocks.replace(
        **{site: cut(getattr(blocks, site)) for site in blocks.layout.low_rank},
        fc1=Dense(fc1.kernel[..., :num_channels], fc1.bias[..., :num_channels]),
        fc2=Dense(fc2.kernel[..., :num_channels, :], fc2.bias),
    )


def _filled(shapes):
    """Small random numbers in the shapes of a tree, drawn once and repeated.

    On the host, so that no initialiser has to be drawn from or compiled for each shape.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(np.resize(_pool(leaf.dtype), leaf.shape)), shapes)


@cache
def _pool(dtype: np.dtype) -> np.ndarray:
    # A prime number of them, so that no two rows of a matrix made of them are equal.
    numbers = 0.02 * np.random.default_rng(0).standard_normal(1_048_583, np.float32)
    return numbers.astype(dtype)


def model(
    blocks: int, width: int, heads: int, *, ffn: int = 0, vocabulary: int = 50272, positions=2048
) -> OPTConfig:
    """The configuration of an OPT model; `ffn` is four times the width where it is 0."""
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=blocks,
        ffn_dim=ffn or 4 * width,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        word_embed_proj_dim=width,
    )


OPT_125M = model(12, 768, 12)
OPT_1_3B = model(24, 2048, 32)
OPT_6_7B = model(32, 4096, 32)

_SMOKE = Workload(
    config=model(4, 16, 2, ffn=32, vocabulary=24, positions=8),
    length=8,
    batch_size=2,
    num_batches=2,
    split=AdapterSpec(1, 1),
)
_SMALL = Workload(
    config=model(12, 256, 8, vocabulary=4096, positions=256),
    length=256,
    batch_size=8,
    num_batches=4,
)
_LARGE = partial(
    Workload, length=2048, batch_size=8, num_batches=16, dtype=jnp.bfloat16, remat=True, num_swept=2
)

_PARTS = (*STEPS, "factor_sweep", "calibration_forward", "decomposition", "selection", "packaging")
"""Without the whole of a compression, which takes minutes on the larger models."""

WORKLOADS: dict[Suite, dict[str, Workload]] = {
    "cpu": {
        "smoke": _SMOKE,
        "small": _SMALL,
        "opt-125m": Workload(config=OPT_125M, length=512, batch_size=2, num_batches=2),
    },
    "device": {
        "smoke": dataclasses.replace(_SMOKE, dtype=jnp.bfloat16),
        "opt-1.3b": _LARGE(config=OPT_1_3B, phases=_PARTS),
        "opt-1.3b-512": Workload(
            config=OPT_1_3B,
            length=512,
            batch_size=1,
            num_batches=1,
            dtype=jnp.bfloat16,
            phases=STEPS,
        ),
        "opt-125m": _LARGE(config=OPT_125M),
        "small": dataclasses.replace(_SMALL, dtype=jnp.bfloat16),
        # The moments of all its weights would not fit beside it.
        "opt-6.7b": _LARGE(
            config=OPT_6_7B, phases=tuple(phase for phase in _PARTS if phase != "step_all")
        ),
    },
}
"""By suite. `opt-1.3b-512` has one sequence of 512 tokens; `smoke` is for tests."""
