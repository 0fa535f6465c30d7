"""What a model family is: its configuration, and functions on arrays that are its own.

Everything else in the package reads the family from the configuration and knows none by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.nn.layout import Block, Layout, Projected

if TYPE_CHECKING:
    from gradot_jax.curvature.tap import TappedMaps


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
        bos_token_id: begins a document, see `data.tokenizer`; or None.
        end_token_ids: each of them ends a text.
        windows: tokens that attention sees at most, in each layer, or one number for all; None for
            no bound.
    """

    family: ClassVar["Family"]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    end_token_ids: tuple[int, ...]
    windows: tuple[int | None, ...]

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads as this model."""
        ...


class Family(NamedTuple):
    """One model family.

    A shell is what a model has outside its blocks: a flax dataclass with the fields of
    `shell_paths`, arrays, `Dense` maps or norms, some of them None; `embed_tokens` `[V, E]` is one.

    Attributes:
        model_types: in config.json.
        label: for people.
        read_config: configuration from the contents of a config.json and its place, for messages;
            raises InputError.
        layout: of a block.
        layers_path: Hugging Face's name of the list of layers.
        shell_paths: Hugging Face's name of each field of the shell, in the order in which they are
            stored.
        canonical_name: the full name of a tensor that some checkpoints store under another; None
            for one that is of no use.
        block_shapes: one dense block as shapes without arrays; touches no device.
        shell_shapes: the shell likewise.
        init: random `(shell, stack of all blocks)` from configuration, key and dtype.
        embed: `(config, shell, input_ids [B, T], positions [B or 1, T], dtype)` to `[B, T, D]`;
            padding is at position -1.
        project: what a block's attention reads, `(config, maps, hidden [B, T, D], positions)` with
            positions `[B, T]` or None for 0..T-1; weights are in the stream's dtype.
        finish: the rest of a block, `(config, maps, hidden, what attention mixed)` to `[B, T, D]`.
        final_norm: the norm between the last block and the head, `(config, shell, hidden)`.
        head_operands: what the head multiplies, `(config, shell, hidden)` to `[B, T, E]` and
            `[E, V]`, in the stream's dtype.
        describe: a configuration in a line.
        begins_documents: whether `bos_token_id` begins every document, whatever the tokenizer
            says; else what the tokenizer puts in front of a text does.
    """

    model_types: tuple[str, ...]
    label: str
    read_config: Callable[[dict[str, Any], str], Any]
    layout: Layout
    layers_path: str
    shell_paths: Mapping[str, str]
    canonical_name: Callable[[str], str | None]
    block_shapes: Callable[[Any], Block]
    shell_shapes: Callable[[Any], Any]
    init: Callable[[Any, jax.Array, DTypeLike], tuple[Any, Block]]
    embed: Callable[[Any, Any, jax.Array, jax.Array, DTypeLike | None], jax.Array]
    project: Callable[[Any, "TappedMaps", jax.Array, jax.Array | None], Projected]
    finish: Callable[[Any, "TappedMaps", jax.Array, jax.Array], jax.Array]
    final_norm: Callable[[Any, Any, jax.Array], jax.Array]
    head_operands: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array]]
    describe: Callable[[Any], str]
    begins_documents: bool = False


def config_identity(config: ModelConfig) -> dict[str, Any]:
    """What makes a configuration what it is, as plain values; no field that shapes nothing."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    return {field.name: getattr(config, field.name) for field in fields if field.compare}


def attention_windows(config: ModelConfig, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer of a model that runs.

    Raises:
        InputError: where layers differ and the model has not the original's number of them.
    """
    if len(config.windows) == 1:
        return config.windows * num_layers
    if len(config.windows) != num_layers:
        raise InputError(
            f"{len(config.windows)} layers attend with and without a sliding window; a model of "
            f"{num_layers} layers does not say which"
        )
    return config.windows


def channel_count(config: ModelConfig) -> int:
    """F, hidden channels of a block's MLP."""
    block = config.family.block_shapes(config)
    return getattr(block, config.family.layout.channels.out).shape[0]
