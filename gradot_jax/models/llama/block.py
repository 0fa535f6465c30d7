"""The functions of Llama-type models on arrays: embedding, block and head.

A block may be the original's or an emulator's: ranks and channels are read from the arrays.
"""

from typing import TYPE_CHECKING, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.curvature.tap import TappedMaps
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.layout import Channels, Layout, Projected, Site, shaped
from gradot_jax.nn.linear import Dense, Linear
from gradot_jax.nn.norm import RMSNorm, rms_norm
from gradot_jax.nn.rotary import rotate

if TYPE_CHECKING:
    from gradot_jax.models.llama.config import LlamaConfig

LAYOUT = Layout(
    sites=(
        Site("q_proj", "self_attn", "self_attn.q_proj", "column", of_heads=True),
        Site("k_proj", "self_attn", "self_attn.k_proj", "column", of_heads=True),
        Site("v_proj", "self_attn", "self_attn.v_proj", "column", of_heads=True),
        Site("o_proj", "o_proj", "self_attn.o_proj", "row", of_heads=True),
        Site("gate_proj", "mlp", "mlp.gate_proj", "column"),
        Site("up_proj", "mlp", "mlp.up_proj", "column"),
        Site("down_proj", "down_proj", "mlp.down_proj", "row"),
    ),
    channels=Channels(into=("gate_proj", "up_proj"), out="down_proj"),
    norms=(
        ("input_layernorm", "input_layernorm"),
        ("post_attention_layernorm", "post_attention_layernorm"),
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
    ),
)
SHELL_PATHS = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}


@flax.struct.dataclass
class Block:
    """One decoder block, or a stack of blocks of equal shape (a leading layer axis on each leaf).

    Attributes:
        input_layernorm: norm of the attention half.
        q_proj: `D -> H K`; attention maps may be `Dense` or `LowRank`.
        k_proj: `D -> G K`.
        v_proj: `D -> G K`.
        o_proj: `H K -> D`.
        q_norm: of each head's queries, or None.
        k_norm: of each head's keys, or None.
        post_attention_layernorm: norm of the MLP half.
        gate_proj: `D -> F`.
        up_proj: `D -> F`.
        down_proj: `F -> D`.
        head_dim: K.
    """

    layout: ClassVar[Layout] = LAYOUT

    input_layernorm: RMSNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    post_attention_layernorm: RMSNorm
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    head_dim: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Shell:
    """Everything outside the blocks.

    Attributes:
        embed_tokens: `[V, D]`.
        norm: after the last block.
        lm_head: `[D, V]`, or None when the head is the transposed token embedding.
    """

    embed_tokens: jax.Array
    norm: RMSNorm
    lm_head: jax.Array | None


def canonical_name(name: str) -> str | None:
    """The name of a tensor; None for the frequencies that old checkpoints store."""
    return None if name.endswith(".rotary_emb.inv_freq") else name


def block_shapes(config: "LlamaConfig") -> Block:
    """One dense block as shapes without arrays."""
    width, ffn, size = config.hidden_size, config.intermediate_size, config.head_dim
    wide, narrow = config.num_attention_heads * size, config.num_key_value_heads * size
    norm, head_norm = RMSNorm(shaped(width)), RMSNorm(shaped(size)) if config.qk_norm else None

    def dense(d_in: int, d_out: int, bias: bool) -> Dense:
        return Dense(shaped(d_in, d_out), shaped(d_out) if bias else None)

    return Block(
        input_layernorm=norm,
        q_proj=dense(width, wide, config.qkv_bias),
        k_proj=dense(width, narrow, config.qkv_bias),
        v_proj=dense(width, narrow, config.qkv_bias),
        o_proj=dense(wide, width, config.attention_bias),
        q_norm=head_norm,
        k_norm=head_norm,
        post_attention_layernorm=norm,
        gate_proj=dense(width, ffn, config.mlp_bias),
        up_proj=dense(width, ffn, config.mlp_bias),
        down_proj=dense(ffn, width, config.mlp_bias),
        head_dim=size,
    )


def shell_shapes(config: "LlamaConfig") -> Shell:
    """The shell as shapes without arrays."""
    width, vocabulary = config.hidden_size, config.vocab_size
    head = None if config.tie_word_embeddings else shaped(width, vocabulary)
    return Shell(shaped(vocabulary, width), RMSNorm(shaped(width)), head)


def init(config: "LlamaConfig", key: jax.Array, dtype: DTypeLike) -> tuple[Shell, Block]:
    """Fresh weights: matrices normal with `initializer_range`, gains 1, biases 0."""
    layers = config.num_hidden_layers
    stack = jax.tree.map(lambda s: shaped(layers, *s.shape), block_shapes(config))
    paths, structure = jax.tree.flatten_with_path((shell_shapes(config), stack))

    def draw(path, shape, key: jax.Array) -> jax.Array:
        if path[-1].name in ("scale", "bias"):
            return jnp.full(shape.shape, float(path[-1].name == "scale"), dtype)
        return jax.random.normal(key, shape.shape, dtype) * config.initializer_range

    keys = jax.random.split(key, len(paths))
    return structure.unflatten([draw(*pair, own) for pair, own in zip(paths, keys, strict=True)])


def embed(
    config: "LlamaConfig",
    shell: Shell,
    input_ids: jax.Array,
    positions: jax.Array,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Token embeddings `[B, T, D]`, in `dtype` or their own."""
    del config, positions
    rows = shell.embed_tokens[input_ids]
    return rows if dtype is None else rows.astype(dtype)


def project(
    config: "LlamaConfig", maps: TappedMaps, hidden: jax.Array, positions: jax.Array | None
) -> Projected:
    """What attention reads, from the residual stream `[B, T, D]`; see `Family.project`."""
    block = maps.block
    x = maps.read("self_attn", rms_norm(block.input_layernorm, hidden, config.rms_norm_eps))
    query, key, value = (maps.apply(site, x) for site in ("q_proj", "k_proj", "v_proj"))

    def turn(x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        if norm is not None:
            heads = x.reshape(*x.shape[:2], -1, block.head_dim)
            x = rms_norm(norm, heads, config.rms_norm_eps).reshape(x.shape)
        return rotate(config.rotary, x, positions)

    return Projected(turn(query, block.q_norm), turn(key, block.k_norm), value)


def finish(
    config: "LlamaConfig", maps: TappedMaps, hidden: jax.Array, mixed: jax.Array
) -> jax.Array:
    """The rest of a block, `[B, T, D]`, from its input and what attention mixed, `[B, T, H K]`."""
    hidden = hidden + maps.apply("o_proj", maps.read("o_proj", mixed))
    norm = maps.block.post_attention_layernorm
    x = maps.read("mlp", rms_norm(norm, hidden, config.rms_norm_eps))
    x = maps.remove(jax.nn.silu(maps.apply("gate_proj", x)) * maps.apply("up_proj", x))
    return hidden + maps.apply("down_proj", maps.read("down_proj", x))


def final_norm(config: "LlamaConfig", shell: Shell, hidden: jax.Array) -> jax.Array:
    """The norm after the last block; `[B, T, D]`."""
    return rms_norm(cast(shell.norm, hidden.dtype), hidden, config.rms_norm_eps)


def head_operands(
    config: "LlamaConfig", shell: Shell, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Input `[B, T, D]` and kernel `[D, V]` of the head, in one dtype."""
    kernel = shell.embed_tokens.T if shell.lm_head is None else shell.lm_head
    return final_norm(config, shell, hidden), kernel.astype(hidden.dtype)


def describe(config: "LlamaConfig") -> str:
    """The configuration in a line."""
    return (
        f"{config.model_type}, {config.num_hidden_layers} blocks, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim} on "
        f"{config.num_key_value_heads} keys and values, MLP {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}, rope {config.rotary.rope_type}"
        + "".join(f", window {size}" for size in {*config.windows} - {None})
    )
