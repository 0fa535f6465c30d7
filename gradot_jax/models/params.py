"""A model's parameters as a pytree, and the tree surgery on its stacks of blocks."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.layout import Block

if TYPE_CHECKING:
    from gradot_jax.models.family import ModelConfig


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
class Params:
    """A whole model: its shell, see `Family`, and its layers by depth in stacks of equal shape."""

    shell: Any
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


def slice_places(segment: Segment, start: int, stop: int) -> Segment:
    """The layers that run at places start..stop-1 of a segment."""
    if isinstance(segment, Shared):
        return segment.replace(order=segment.order[start:stop])
    return slice_blocks(segment, start, stop)


def take_blocks(stack: Block, indices: Sequence[int]) -> Block:
    """The blocks of a stack at some indices, as a stack."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(indices, np.int32)], stack)


def get_block(stack: Segment, index: int) -> Layer:
    """One stored layer of a segment, without the layer axis."""
    stored = stack.blocks if isinstance(stack, Shared) else stack
    return jax.tree.map(lambda leaf: leaf[index], stored)


def unstack_blocks(segments: Sequence[Segment]) -> list[Layer]:
    """The layers of a sequence of segments, single and in the order in which they run."""
    return layers_at(segments, range(sum(map(depth, segments))))


def layers_at(segments: Sequence[Segment], indices: Iterable[int]) -> list[Layer]:
    """The single layers that run at some depths; views where the arrays are numpy."""
    places = [
        (segment, index)
        for segment in segments
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
        if not all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return jnp.stack(leaves)
        return jnp.asarray(np.stack(_of_one_dtype(leaves)))

    return jax.tree.map(stack, *blocks)


def concatenate_blocks(stacks: Sequence[Segment]) -> Block:
    """Joins stacks of equal block shape in depth order; on the host where all are numpy."""

    def join(*leaves):
        if all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return leaves[0] if len(leaves) == 1 else np.concatenate(_of_one_dtype(leaves))
        return jnp.concatenate(leaves)

    return jax.tree.map(join, *stacks)


def _of_one_dtype(leaves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same arrays in the least dtype that holds all exactly; numpy knows none for halves."""
    dtype = jnp.result_type(*{leaf.dtype for leaf in leaves})
    return [leaf.astype(dtype, copy=False) for leaf in leaves]


def segment_blocks(blocks: Sequence[Layer]) -> tuple[Layer, ...]:
    """Stacks each run of consecutive layers of equal shape, given singly and in depth order."""

    def kind(block: Layer) -> Layer:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), block)

    return tuple(stack_blocks(list(run)) for _, run in groupby(blocks, kind))


def count_params(tree) -> int:
    """Number of parameters in any tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def merge_segments(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same layers in fewer stacks: neighbours of equal shape are joined.

    Shared blocks stay apart; a stack that is joined with no other is taken as it is.
    """
    runs = [list(run) for _, run in groupby(segments, _kind)]
    return tuple(run[0] if len(run) == 1 else concatenate_blocks(run) for run in runs)


def _kind(segment: Segment):
    if isinstance(segment, Shared):
        return object()  # Equal to no other.
    leaves, structure = jax.tree.flatten(segment)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def init_params(config: "ModelConfig", key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh weights of a model, drawn as its family does."""
    shell, blocks = config.family.init(config, key, dtype)
    return Params(shell, (blocks,))


def model_shapes(config: "ModelConfig", dtype: DTypeLike = jnp.float32) -> Params:
    """A model as shapes without arrays, all blocks in one segment; touches no device."""
    family, layers = config.family, config.num_hidden_layers

    def shape(leaf, *lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *leaf.shape), dtype)

    blocks = jax.tree.map(lambda leaf: shape(leaf, layers), family.block_shapes(config))
    return Params(jax.tree.map(shape, family.shell_shapes(config)), (blocks,))
