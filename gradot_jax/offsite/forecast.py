"""What a compression will store, known before it starts: shapes, parameters and bytes."""

import dataclasses
import math

import jax
from jax.typing import DTypeLike

from gradot_jax.compression.budget import channel_pool, rank_pool, uniform_counts
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import model_schema, shell_schema
from gradot_jax.models.opt.params import ATTENTION_SITES, Block, get_block, init_params
from gradot_jax.offsite.method import layers_to_keep
from gradot_jax.offsite.methods.scaleot import attention_rank, num_replaced
from gradot_jax.offsite.names import Schema, adapter_schema, middle_schema
from gradot_jax.offsite.split import AdapterSpec

DEPTH_METHODS = ("layer-drop", "offsite-tuning", "crash")
"""Methods that store whole layers, fewer of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the emulator will be.

    Attributes:
        shapes: of the stored middle layers. With a budget shared between layers (`allocation =
            "global"`) each has the average shape; `crash` may store frozen copies of the blocks
            next to the middle beside these, `adapter = "own"` those of other layers.
        middle: parameters of the original's middle.
        kept: parameters of the emulator's.
        unchanged: parameters that are shipped as they are.
        original: parameters of the whole model.
    """

    shapes: tuple[LayerShape | HarmonizerShape, ...]
    middle: int
    kept: int
    unchanged: int
    original: int

    @property
    def shipped(self) -> int:
        """Parameters in the bundle."""
        return self.kept + self.unchanged

    def bundle_bytes(self, dtype: DTypeLike) -> int:
        """Size of the bundle's tensors when stored in a dtype."""
        return self.shipped * jax.numpy.dtype(dtype).itemsize


def forecast(config: OPTConfig, split: AdapterSpec, options: CompressionOptions) -> Forecast:
    """Sizes that a compression will yield.

    Args:
        config: of the model.
        split: which blocks are the adapter.
        options: how to compress.

    Raises:
        InputError: for a split without a middle, or a budget that cannot be met.
    """
    split.check(config.num_hidden_layers)
    shapes = _shapes(config, split, options)
    original = _size(model_schema(config))
    unchanged = _size(shell_schema(config)) + _size(adapter_schema(config, split))
    return Forecast(
        shapes=shapes,
        middle=original - unchanged,
        kept=_size(middle_schema(config, shapes)),
        unchanged=unchanged,
        original=original,
    )


def _shapes(
    config: OPTConfig, split: AdapterSpec, options: CompressionOptions
) -> tuple[LayerShape | HarmonizerShape, ...]:
    number = config.num_hidden_layers - split.num_blocks
    if options.method == "empty":
        return ()
    if options.method in DEPTH_METHODS:
        return (_layer(config.ffn_dim, None),) * layers_to_keep(number, options)
    if options.method == "scaleot":
        return _with_harmonizers(config, number, options)
    width = config.hidden_size
    ranks = rank_pool(width, width, options.rank_multiple)
    channels = channel_pool(config.ffn_dim, options.channel_multiple)
    (rank,), (count,) = (
        uniform_counts([pool], budget)
        for pool, budget in zip((ranks, channels), options.budgets, strict=True)
    )
    return (_layer(count, rank if rank < ranks.cap else None),) * number


def _with_harmonizers(config: OPTConfig, number: int, options: CompressionOptions):
    rank = attention_rank(config, options)
    replaced = num_replaced(block_shapes(config), number, rank, options)
    cap = rank_pool(config.hidden_size, config.hidden_size).cap
    frozen = _layer(config.ffn_dim, rank if rank < cap else None)
    harmonizer = HarmonizerShape(rank=options.scaleot.harmonizer_rank)
    return (harmonizer,) * replaced + (frozen,) * (number - replaced)


def _layer(channels: int, rank: int | None) -> LayerShape:
    return LayerShape(ranks=tuple((s, rank) for s in ATTENTION_SITES), num_channels=channels)


def block_shapes(config: OPTConfig) -> Block:
    """One block of a model as shapes without arrays."""

    def first(key: jax.Array) -> Block:
        return get_block(init_params(config, key).segments[0], 0)

    return jax.eval_shape(first, jax.random.key(0))


def _size(schema: Schema) -> int:
    return sum(math.prod(shape) for shape in schema.values())
