"""Parameters of an OPT model as pytrees, and the tree surgery on its stack of blocks."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.linear import Dense, Linear
from gradot_jax.nn.norm import LayerNorm

ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_SITES = ("fc1", "fc2")
SITES = ATTENTION_SITES + MLP_SITES


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

    self_attn_layer_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    final_layer_norm: LayerNorm
    fc1: Linear
    fc2: Linear


@flax.struct.dataclass
class Shared:
    """Blocks that run more than once, stored once (CRaSh).

    Attributes:
        blocks: stack of the stored blocks.
        order: index into the stack for each place at which a block runs, in depth order.
    """

    blocks: Block
    order: tuple[int, ...] = flax.struct.field(pytree_node=False)


Layer = Block | Harmonizer
"""What can stand in the place of a layer; stacks of one kind have a leading axis."""

Segment = Block | Harmonizer | Shared


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


@flax.struct.dataclass
class Params:
    """A whole model: its shell, and its layers in depth order as stacks of equal shape."""

    shell: Shell
    segments: tuple[Segment, ...]

    @property
    def num_layers(self) -> int:
        """Number of layers that run."""
        return sum(depth(segment) for segment in self.segments)


def depth(segment: Segment) -> int:
    """Number of layers that run in a segment."""
    return len(segment.order) if isinstance(segment, Shared) else num_stored(segment)


def num_stored(segment: Segment) -> int:
    """Number of layers stored in a segment."""
    return jax.tree.leaves(segment)[0].shape[0]


def slice_blocks(stack: Block, start: int, stop: int) -> Block:
    """Blocks start..stop-1 of a stack, as a stack."""
    return jax.tree.map(lambda leaf: leaf[start:stop], stack)


def take_blocks(stack: Block, indices: Sequence[int]) -> Block:
    """The blocks of a stack at some indices, as a stack."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(indices, np.int32)], stack)


def get_block(stack: Segment, index: int) -> Layer:
    """One stored layer of a segment, without the layer axis."""
    stored = stack.blocks if isinstance(stack, Shared) else stack
    return jax.tree.map(lambda leaf: leaf[index], stored)


def layers_at(params: Params, indices: Sequence[int]) -> list[Layer]:
    """The single layers of a model that run at some depths; views where its arrays are numpy."""
    places = [
        (segment, index)
        for segment in params.segments
        for index in (segment.order if isinstance(segment, Shared) else range(depth(segment)))
    ]
    return [get_block(*places[index]) for index in indices]


def slice_segments(segments: Sequence[Block], start: int, stop: int) -> tuple[Block, ...]:
    """Layers start..stop-1 of a model; segments that lie within are taken as they are."""
    parts = []
    first = 0
    for segment in segments:
        size = depth(segment)
        low, high = max(start - first, 0), min(stop - first, size)
        if low < high:
            parts.append(segment if high - low == size else slice_blocks(segment, low, high))
        first += size
    return tuple(parts)


def stack_blocks(blocks: Sequence[Layer]) -> Layer:
    """Stacks layers of equal shape along a new leading axis, on the device."""

    def stack(*leaves):
        # What is on the host is stacked there: on a device each shape is a program to compile.
        on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return jnp.asarray(np.stack(leaves)) if on_host else jnp.stack(leaves)

    return jax.tree.map(stack, *blocks)


def concatenate_blocks(stacks: Sequence[Segment]) -> Block:
    """Joins stacks of equal block shape in depth order; on the host where all are numpy."""

    def join(*leaves):
        if all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return leaves[0] if len(leaves) == 1 else np.concatenate(leaves)
        return jnp.concatenate(leaves)

    return jax.tree.map(join, *stacks)


def unstack_blocks(segments: Sequence[Segment]) -> list[Layer]:
    """The layers of a sequence of segments, single and in the order in which they run."""
    return [
        get_block(segment, index)
        for segment in segments
        for index in (segment.order if isinstance(segment, Shared) else range(depth(segment)))
    ]


def segment_blocks(blocks: Sequence[Layer]) -> tuple[Layer, ...]:
    """Stacks each run of consecutive layers of equal shape.

    Args:
        blocks: single layers of one model, in depth order.
    """

    def kind(block: Layer) -> Layer:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), block)

    runs: list[list[Layer]] = []
    for block in blocks:
        if runs and kind(block) == kind(runs[-1][0]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return tuple(map(stack_blocks, runs))


def count_params(tree) -> int:
    """Number of parameters in any tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def init_params(config: OPTConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Fresh weights: normal with `init_std`, the residual outputs smaller by `(2 L)^-1/2`."""
    width, ffn, layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    embed = config.word_embed_proj_dim
    keys = iter(jax.random.split(key, 16))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) * (config.init_std * scale)

    def dense(d_in: int, d_out: int, scale: float = 1.0) -> Dense:
        bias = jnp.zeros((layers, d_out), dtype) if config.enable_bias else None
        return Dense(normal(layers, d_in, d_out, scale=scale), bias)

    def norm(*lead: int) -> LayerNorm:
        if not config.layer_norm_elementwise_affine:
            return LayerNorm(None, None)
        return LayerNorm(jnp.ones((*lead, width), dtype), jnp.zeros((*lead, width), dtype))

    residual = (2 * layers) ** -0.5
    blocks = Block(
        self_attn_layer_norm=norm(layers),
        q_proj=dense(width, width),
        k_proj=dense(width, width),
        v_proj=dense(width, width),
        out_proj=dense(width, width, residual),
        final_layer_norm=norm(layers),
        fc1=dense(width, ffn),
        fc2=dense(ffn, width, residual),
    )
    shell = Shell(
        embed_tokens=normal(config.vocab_size, embed),
        embed_positions=normal(config.max_position_embeddings + 2, width),
        project_in=Dense(normal(embed, width), None) if config.has_projection else None,
        project_out=Dense(normal(width, embed), None) if config.has_projection else None,
        final_layer_norm=norm() if config.has_final_layer_norm else None,
        lm_head=None if config.tie_word_embeddings else normal(embed, config.vocab_size),
    )
    return Params(shell, (blocks,))
