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


def stack_blocks(blocks: Sequence[Layer]) -> Layer:
    """Stacks layers of equal shape along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def concatenate_blocks(stacks: Sequence[Segment]) -> Block:
    """Joins stacks of equal block shape in depth order."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)


def unstack_blocks(segments: Sequence[Segment]) -> list[Layer]:
    """The layers of a sequence of segments, single and in the order in which they run."""
    return [
        get_block(segment, index)
        for segment in segments
        for index in (segment.order if isinstance(segment, Shared) else range(depth(segment)))
    ]


def segment_blocks(blocks: Sequence[Layer], *, pad: bool = False) -> tuple[Layer, ...]:
    """Stacks each run of consecutive layers of equal shape.

    Args:
        blocks: single layers of one model, in depth order.
        pad: stack blocks that differ in ranks and channels alone as well, filled up with zeros to
            the largest of their run: fewer scans to compile, the same function.
    """

    def kind(block: Layer) -> Layer:
        return jax.tree.map(lambda leaf: leaf.dtype if pad else (leaf.shape, leaf.dtype), block)

    runs: list[list[Layer]] = []
    for block in blocks:
        if runs and kind(block) == kind(runs[-1][0]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return tuple(stack_blocks(_pad_to_largest(run) if pad else run) for run in runs)


def _pad_to_largest(run: list[Layer]) -> list[Layer]:
    # Ranks and channels are all that differs within a model, and zeros there add nothing.
    largest = jax.tree.map(lambda *leaves: np.max([leaf.shape for leaf in leaves], axis=0), *run)

    def pad(leaf: jax.Array, shape: np.ndarray) -> jax.Array:
        return jnp.pad(leaf, [(0, n) for n in shape - np.array(leaf.shape)])

    return [jax.tree.map(pad, block, largest) for block in run]


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
