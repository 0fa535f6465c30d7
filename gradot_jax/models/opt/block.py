"""The functions of OPT on arrays: embedding, block and head.

A block may be the original's or an emulator's: shapes are read from the arrays, so low-rank maps
and pruned MLPs need no configuration of their own.
"""

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.curvature.tap import TappedMaps
from gradot_jax.nn.dtypes import cast
from gradot_jax.nn.layout import Channels, Layout, Projected, Site, shaped
from gradot_jax.nn.linear import Dense, Linear, linear
from gradot_jax.nn.norm import LayerNorm, layer_norm

if TYPE_CHECKING:
    from gradot_jax.models.opt.config import OPTConfig

LAYOUT = Layout(
    sites=(
        Site("q_proj", "self_attn", "self_attn.q_proj", "column"),
        Site("k_proj", "self_attn", "self_attn.k_proj", "column"),
        Site("v_proj", "self_attn", "self_attn.v_proj", "column"),
        Site("out_proj", "out_proj", "self_attn.out_proj", "row"),
        Site("fc1", "fc1", "fc1", "column"),
        Site("fc2", "fc2", "fc2", "row"),
    ),
    channels=Channels(into=("fc1",), out="fc2"),
    norms=(
        ("self_attn_layer_norm", "self_attn_layer_norm"),
        ("final_layer_norm", "final_layer_norm"),
    ),
)
SHELL_PATHS = {
    "embed_tokens": "model.decoder.embed_tokens",
    "embed_positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_layer_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}


@flax.struct.dataclass
class Block:
    """One decoder block, or a stack of blocks of equal shape (a leading layer axis on each leaf).

    Attributes:
        self_attn_layer_norm: norm of the attention half.
        q_proj: `D -> D`; attention maps may be `Dense` or `LowRank`.
        k_proj: `D -> D`.
        v_proj: `D -> D`.
        out_proj: `D -> D`.
        final_layer_norm: norm of the MLP half.
        fc1: `D -> F`.
        fc2: `F -> D`.
    """

    layout: ClassVar[Layout] = LAYOUT

    self_attn_layer_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    final_layer_norm: LayerNorm
    fc1: Linear
    fc2: Linear


@flax.struct.dataclass
class Shell:
    """Everything outside the blocks.

    Attributes:
        embed_tokens: `[V, E]`.
        embed_positions: `[P + 2, D]`.
        project_in: `E -> D` without bias, or None when E = D.
        project_out: `D -> E` without bias, or None.
        final_layer_norm: norm after the last block, or None.
        lm_head: `[E, V]`, or None when the head is the transposed token embedding.
    """

    embed_tokens: jax.Array
    embed_positions: jax.Array
    project_in: Dense | None
    project_out: Dense | None
    final_layer_norm: LayerNorm | None
    lm_head: jax.Array | None


def canonical_name(name: str) -> str | None:
    """The full name of a tensor that some checkpoints store without the leading `model.`.

    None for the version number that old ones store.
    """
    name = f"model.{name}" if name.startswith("decoder.") else name
    return None if name == "model.decoder.version" else name


def _norm_shapes(config: "OPTConfig") -> LayerNorm:
    if not config.layer_norm_elementwise_affine:
        return LayerNorm(None, None)
    return LayerNorm(shaped(config.hidden_size), shaped(config.hidden_size))


def block_shapes(config: "OPTConfig") -> Block:
    """One dense block as shapes without arrays."""
    width, ffn = config.hidden_size, config.ffn_dim

    def dense(d_in: int, d_out: int) -> Dense:
        return Dense(shaped(d_in, d_out), shaped(d_out) if config.enable_bias else None)

    return Block(
        self_attn_layer_norm=_norm_shapes(config),
        **{site: dense(width, width) for site in LAYOUT.low_rank},
        final_layer_norm=_norm_shapes(config),
        fc1=dense(width, ffn),
        fc2=dense(ffn, width),
    )


def shell_shapes(config: "OPTConfig") -> Shell:
    """The shell as shapes without arrays."""
    width, embed, vocabulary = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
    projected = config.has_projection
    return Shell(
        embed_tokens=shaped(vocabulary, embed),
        embed_positions=shaped(config.max_position_embeddings + 2, width),
        project_in=Dense(shaped(embed, width), None) if projected else None,
        project_out=Dense(shaped(width, embed), None) if projected else None,
        final_layer_norm=_norm_shapes(config) if config.has_final_layer_norm else None,
        lm_head=None if config.tie_word_embeddings else shaped(embed, vocabulary),
    )


def init(config: "OPTConfig", key: jax.Array, dtype: DTypeLike) -> tuple[Shell, Block]:
    """Fresh weights: normal with `init_std`, the residual outputs smaller by `(2 L)^-1/2`."""
    layers, shapes, shell = config.num_hidden_layers, block_shapes(config), shell_shapes(config)
    keys = iter(jax.random.split(key, 16))

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) * (config.init_std * scale)

    def dense(site: str) -> Dense:
        kernel, bias = getattr(shapes, site).kernel, getattr(shapes, site).bias
        scale = (2 * layers) ** -0.5 if site in ("out_proj", "fc2") else 1.0
        weights = normal((layers, *kernel.shape), scale)
        return Dense(weights, None if bias is None else jnp.zeros((layers, *bias.shape), dtype))

    def norm(like: LayerNorm, *lead: int) -> LayerNorm:
        if like.scale is None:
            return like
        shape = (*lead, *like.scale.shape)
        return LayerNorm(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))

    blocks = shapes.replace(
        **{site.name: dense(site.name) for site in LAYOUT.sites},
        **{name: norm(getattr(shapes, name), layers) for name, _ in LAYOUT.norms},
    )
    final = None if shell.final_layer_norm is None else norm(shell.final_layer_norm)
    drawn = jax.tree.map(lambda leaf: normal(leaf.shape), shell.replace(final_layer_norm=None))
    return drawn.replace(final_layer_norm=final), blocks


def embed(
    config: "OPTConfig",
    shell: Shell,
    input_ids: jax.Array,
    positions: jax.Array,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Token plus position embeddings `[B, T, D]`, the start of the residual stream.

    Position t reads row t + 2, padding row 1. All that follows is computed in `dtype`, by default
    that of the stored embedding.
    """
    del config
    dtype = shell.embed_tokens.dtype if dtype is None else dtype
    tokens = shell.embed_tokens[input_ids].astype(dtype)
    if shell.project_in is not None:
        tokens = linear(cast(shell.project_in, dtype), tokens)
    return tokens + shell.embed_positions[positions + 2].astype(dtype)


def project(
    config: "OPTConfig", maps: TappedMaps, hidden: jax.Array, positions: jax.Array | None
) -> Projected:
    """What attention reads, from the residual stream `[B, T, D]`; see `Family.project`."""
    del positions
    if config.do_layer_norm_before:
        hidden = layer_norm(maps.block.self_attn_layer_norm, hidden)
    x = maps.read("self_attn", hidden)
    return Projected(*(maps.apply(site, x) for site in ("q_proj", "k_proj", "v_proj")))


def finish(config: "OPTConfig", maps: TappedMaps, hidden: jax.Array, mixed: jax.Array) -> jax.Array:
    """The rest of a block: `[B, T, D]` from its input and what attention mixed, `[B, T, D]`."""
    block, pre = maps.block, config.do_layer_norm_before
    activation = jax.nn.relu if config.activation_function == "relu" else _gelu
    hidden = hidden + maps.apply("out_proj", maps.read("out_proj", mixed))
    if not pre:
        hidden = layer_norm(block.self_attn_layer_norm, hidden)

    x = layer_norm(block.final_layer_norm, hidden) if pre else hidden
    x = maps.remove(activation(maps.apply("fc1", maps.read("fc1", x))))
    hidden = hidden + maps.apply("fc2", maps.read("fc2", x))
    return hidden if pre else layer_norm(block.final_layer_norm, hidden)


_gelu = partial(jax.nn.gelu, approximate=False)


def final_norm(config: "OPTConfig", shell: Shell, hidden: jax.Array) -> jax.Array:
    """The norm after the last block, where there is one; `[B, T, D]`."""
    del config
    if shell.final_layer_norm is None:
        return hidden
    return layer_norm(cast(shell.final_layer_norm, hidden.dtype), hidden)


def head_operands(
    config: "OPTConfig", shell: Shell, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the head multiplies: its input `[B, T, E]` and its kernel `[E, V]`, in one dtype."""
    kernel = shell.embed_tokens.T if shell.lm_head is None else shell.lm_head
    hidden = final_norm(config, shell, hidden)
    if shell.project_out is not None:
        hidden = linear(cast(shell.project_out, hidden.dtype), hidden)
    return hidden, kernel.astype(hidden.dtype)


def describe(config: "OPTConfig") -> str:
    """The configuration in a line."""
    norms = "before" if config.do_layer_norm_before else "after"
    return (
        f"OPT, {config.num_hidden_layers} blocks, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, FFN {config.ffn_dim}, "
        f"vocabulary {config.vocab_size}, norms {norms}, {config.activation_function}"
    )
