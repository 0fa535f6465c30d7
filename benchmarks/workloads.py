"""Workloads: the shapes that are measured, with random weights and tokens.

What a phase costs depends on shapes alone, so nothing is downloaded and nothing trained. The same
names stand for less text on CPU, where a suite has minutes, than on accelerators.
"""

import dataclasses
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gradot_jax.compression.plan import LayerShape
from gradot_jax.methods.allocation import forecast
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.families import read_config
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Params, model_shapes
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.models.tensors import layer_shapes
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.programs.compression_run import Run
from gradot_jax.programs.program import Place, Program
from gradot_jax.programs.training import finetuning_programs

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

    config: ModelConfig
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
    def layer_shape(self) -> LayerShape:
        """Of each layer of the emulator, where all keep the same share."""
        options = CompressionOptions(budget=self.budget)
        return forecast(self.config, self.split, options).shapes[0]

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
        model = jax.eval_shape(partial(split_model, split=self.split), self.shapes())

        def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.num_middle, *leaf.shape), self.dtype)

        layer = layer_shapes(self.config, self.layer_shape)
        return Emulator(model.shell, model.adapter, (jax.tree.map(stack, layer),))

    def compression(self, place: Place, **options: Any) -> Run:
        """A compression of it, as its programs see it."""
        return Run(
            config=self.config,
            split=self.split,
            options=CompressionOptions(budget=self.budget, **options),
            place=place,
            stored=self.dtype,
            dtype=self.dtype,
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            length=self.length,
        )

    def tuning(
        self, place: Place, optimizer: optax.GradientTransformation, *, full: bool = False
    ) -> list[Program]:
        """The programs of tuning the adapter in its emulator, or in the full model."""
        model = self.emulator_shapes()
        if full:
            model = jax.eval_shape(partial(split_model, split=self.split), self.shapes())
        return finetuning_programs(
            self.config,
            model,
            optimizer,
            place,
            batch_size=self.batch_size,
            length=self.length,
            dtype=self.dtype,
            remat=self.remat,
            validations=1,
        )

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
                attention_mask=ones.astype(jnp.int32),
            )
            for ids in rng.integers(0, self.config.vocab_size, shape, np.int32)
        ]

    def describe(self) -> dict[str, object]:
        """Its shapes as JSON values."""
        config = self.config
        return {
            "model": config.family.describe(config),
            "num_bottom": self.split.num_bottom,
            "num_middle": self.num_middle,
            "num_top": self.split.num_top,
            "width": config.hidden_size,
            "ffn": channel_count(config),
            "heads": config.num_attention_heads,
            "vocabulary": config.vocab_size,
            "length": self.length,
            "batch_size": self.batch_size,
            "num_batches": self.num_batches,
            "budget": self.budget,
            "dtype": jnp.dtype(self.dtype).name,
            "remat": self.remat,
        }


def _filled(shapes):
    return jax.tree.map(lambda leaf: jnp.asarray(random_array(leaf.shape, leaf.dtype)), shapes)


def random_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Small random numbers, drawn once and repeated.

    On the host, so that no initialiser has to be drawn from or compiled for each shape, and in
    the dtype from the start, so that no array is there twice.
    """
    return np.resize(_pool(jnp.dtype(dtype)), shape)


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


def llama(blocks: int, width: int, heads: int, groups: int, **others: Any) -> ModelConfig:
    """The configuration of a Llama model with tied embeddings; `others` have their HF names."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": width}
    kind = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    return read_config({**kind, **sizes, "num_hidden_layers": blocks, **others})


OPT_125M = model(12, 768, 12)
OPT_1_3B = model(24, 2048, 32)
OPT_6_7B = model(32, 4096, 32)

_SMOLLM2 = {"intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192}
SMOLLM2_135M = llama(30, 576, 9, 3, rope_theta=100_000.0, **_SMOLLM2)

_LLAMA = {"intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 131_072}
_SCALING = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
_SCALING |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_1B = llama(16, 2048, 32, 8, rope_theta=500_000.0, rope_scaling=_SCALING, **_LLAMA)
"""The shape of Llama 3.2 1B."""

_SMOKE = Workload(
    config=model(4, 16, 2, ffn=32, vocabulary=24, positions=8),
    length=8,
    batch_size=2,
    num_batches=2,
    split=AdapterSpec(1, 1),
)
_TINY = {"head_dim": 4, "intermediate_size": 20, "vocab_size": 24, "max_position_embeddings": 8}
_SMOKE_LLAMA = dataclasses.replace(_SMOKE, config=llama(4, 12, 4, 2, **_TINY))
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
        "smoke-llama": _SMOKE_LLAMA,
        "small": _SMALL,
        "opt-125m": Workload(config=OPT_125M, length=512, batch_size=2, num_batches=2),
        "smollm2-135m": Workload(config=SMOLLM2_135M, length=512, batch_size=2, num_batches=2),
    },
    "device": {
        "smoke": dataclasses.replace(_SMOKE, dtype=jnp.bfloat16),
        "smoke-llama": dataclasses.replace(_SMOKE_LLAMA, dtype=jnp.bfloat16),
        "opt-1.3b": _LARGE(config=OPT_1_3B, phases=_PARTS),
        "opt-1.3b-512": Workload(
            config=OPT_1_3B,
            length=512,
            batch_size=1,
            num_batches=1,
            dtype=jnp.bfloat16,
            phases=STEPS,
        ),
        "llama-1b": _LARGE(config=LLAMA_1B, phases=_PARTS),
        "opt-125m": _LARGE(config=OPT_125M),
        "small": dataclasses.replace(_SMALL, dtype=jnp.bfloat16),
        # The moments of all its weights would not fit beside it.
        "opt-6.7b": _LARGE(
            config=OPT_6_7B, phases=tuple(phase for phase in _PARTS if phase != "step_all")
        ),
    },
}
"""By suite. `opt-1.3b-512` has one sequence of 512 tokens; those named `smoke` are for tests."""
