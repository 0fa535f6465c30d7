"""What a model family is: its configuration, and functions on arrays that are its own.

Everything else in the package reads the family from the configuration and knows none by name.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from gradot_jax.nn.layout import Block, Layout

if TYPE_CHECKING:
    from gradot_jax.curvature.tap import BlockTaps


class ModelConfig(Protocol):
    """Configuration of a model of any family: a frozen dataclass, named as Hugging Face does.

    Attributes:
        family: the record of its family.
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: L.
        num_attention_heads: H.
        max_position_embeddings: tokens of the longest sequence.
        tie_word_embeddings: whether the head is the transposed token embedding.
        bos_token_id: begins every document.
        eos_token_id: ends one.
        pad_token_id: padding.
    """

    family: ClassVar["Family"]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads as this model."""
        ...


class Family(NamedTuple):
    """One model family.

    A shell is what a model has outside its blocks: a flax dataclass with the fields of
    `shell_paths`, arrays, `Dense` maps or norms, some of them None; `embed_tokens` `[V, E]` is one.

    Attributes:
        name: `model_type` in config.json.
        label: for people.
        read_config: configuration from the contents of a config.json and its place, for messages;
            raises InputError.
        layout: of a block.
        layers_path: Hugging Face's name of the list of layers.
        shell_paths: Hugging Face's name of each field of the shell, in the order in which they are
            stored.
        canonical_name: the full name of a tensor that some checkpoints store under another.
        block_shapes: one dense block as shapes without arrays; touches no device.
        shell_shapes: the shell likewise.
        init: random `(shell, stack of all blocks)` from configuration, key and dtype.
        embed: `(config, shell, input_ids [B, T], mask [B, T] or None, dtype)` to `[B, T, D]`.
        apply_block: `(config, block, hidden [B, T, D], mask, taps or None)` to `[B, T, D]`; weights
            are in the stream's dtype.
        final_norm: the norm between the last block and the head, `(config, shell, hidden)`.
        head_operands: what the head multiplies, `(config, shell, hidden)` to `[B, T, E]` and
            `[E, V]`, in the stream's dtype.
        describe: a configuration in a line.
    """

    name: str
    label: str
    read_config: Callable[[dict[str, Any], str], Any]
    layout: Layout
    layers_path: str
    shell_paths: Mapping[str, str]
    canonical_name: Callable[[str], str]
    block_shapes: Callable[[Any], Block]
    shell_shapes: Callable[[Any], Any]
    init: Callable[[Any, jax.Array, DTypeLike], tuple[Any, Block]]
    embed: Callable[[Any, Any, jax.Array, jax.Array | None, DTypeLike | None], jax.Array]
    apply_block: Callable[[Any, Any, jax.Array, jax.Array | None, "BlockTaps | None"], jax.Array]
    final_norm: Callable[[Any, Any, jax.Array], jax.Array]
    head_operands: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array]]
    describe: Callable[[Any], str]


def channel_count(config: ModelConfig) -> int:
    """F, hidden channels of a block's MLP."""
    block = config.family.block_shapes(config)
    return getattr(block, config.family.layout.channels.out).shape[0]
