"""The split of a model into adapter blocks, which are trained, and the frozen middle."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import flax.struct

from gradot_jax.errors import InputError
from gradot_jax.models.params import (
    Layer,
    Params,
    Segment,
    Shared,
    concatenate_blocks,
    depth,
    get_block,
    num_stored,
    slice_blocks,
    slice_segments,
)
from gradot_jax.nn.layout import Block

LayerMap = tuple[int | None, ...]
"""What runs between bottom and top adapter, place by place: the index of a stored layer of the
middle, or None for the next inner block of the adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Which blocks the data owner trains.

    Attributes:
        num_bottom: first blocks of the model.
        num_top: last blocks of the model.
        inner: further blocks between those, ascending indices in the full model.
    """

    num_bottom: int = 2
    num_top: int = 2
    inner: tuple[int, ...] = ()

    @classmethod
    def of_layers(cls, layers: tuple[int, ...], num_layers: int) -> "AdapterSpec":
        """The split that trains exactly these layers of a model of `num_layers`."""
        chosen = sorted(layers)
        bottom = next((i for i, layer in enumerate(chosen) if layer != i), len(chosen))
        rest = chosen[bottom:]
        backwards = enumerate(reversed(rest), start=1)
        top = next((i - 1 for i, layer in backwards if layer != num_layers - i), len(rest))
        return cls(bottom, top, tuple(rest[: len(rest) - top]))

    def check(self, num_layers: int) -> None:
        """Raises InputError unless there is something to train and a middle to compress."""
        if self.num_bottom < 0 or self.num_top < 0 or not self.num_blocks:
            raise InputError(
                f"the adapter needs at least one block, got num_bottom = {self.num_bottom} and "
                f"num_top = {self.num_top}"
            )
        if self.num_blocks >= num_layers:
            raise InputError(
                f"num_bottom = {self.num_bottom} and num_top = {self.num_top} leave no middle in "
                f"a model of {num_layers} blocks"
                + (f" with inner = {list(self.inner)}" if self.inner else "")
            )
        bounds = (self.num_bottom - 1, *self.inner, num_layers - self.num_top)
        if any(a >= b for a, b in pairwise(bounds)):
            raise InputError(
                f"inner must be ascending layers in [{self.num_bottom}, "
                f"{num_layers - self.num_top}), got {list(self.inner)}"
            )

    def check_sandwich(self, what: str) -> None:
        """Raises InputError when there are inner blocks, naming what cannot have them."""
        if self.inner:
            raise InputError(
                f"{what} needs one middle between first and last blocks, the split has inner "
                f"blocks {list(self.inner)}"
            )

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are trained."""
        return self.num_bottom + len(self.inner) + self.num_top

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Full-model indices of the adapter's blocks, ascending."""
        top = range(num_layers - self.num_top, num_layers)
        return (*range(self.num_bottom), *self.inner, *top)

    def middle_layers(self, num_layers: int) -> tuple[int, ...]:
        """Full-model indices of all other blocks, ascending."""
        return tuple(sorted(set(range(num_layers)) - set(self.layers(num_layers))))


@flax.struct.dataclass
class Adapter:
    """The blocks that are trained; a stack may be empty.

    Attributes:
        bottom: stack of the first blocks.
        top: stack of the last blocks.
        inner: stack of further blocks between those, or None.
        inner_layers: their indices in the full model.
    """

    bottom: Block
    top: Block
    inner: Block | None = None
    inner_layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def split(self) -> AdapterSpec:
        """The split that the adapter belongs to."""
        return AdapterSpec(depth(self.bottom), depth(self.top), self.inner_layers)

    @property
    def stacks(self) -> tuple[Block, ...]:
        """Its stacks in depth order."""
        return tuple(s for s in (self.bottom, self.inner, self.top) if s is not None)

    @classmethod
    def of_stack(cls, blocks: Block, split: AdapterSpec) -> "Adapter":
        """The adapter from one stack of its blocks in depth order."""
        top = split.num_blocks - split.num_top
        return cls(
            bottom=slice_blocks(blocks, 0, split.num_bottom),
            top=slice_blocks(blocks, top, split.num_blocks),
            inner=slice_blocks(blocks, split.num_bottom, top) if split.inner else None,
            inner_layers=split.inner,
        )


def adapter_of(params: Params, split: AdapterSpec) -> Adapter:
    """The adapter of an original model; no other layer is copied.

    Of numpy segments its arrays are numpy, and views where a stack is a single layer.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    count = params.num_layers
    split.check(count)

    def stack(*bounds: tuple[int, int]) -> Block:
        parts = [part for pair in bounds for part in slice_segments(params.segments, *pair)]
        return concatenate_blocks(parts or [slice_blocks(params.segments[0], 0, 0)])

    return Adapter(
        bottom=stack((0, split.num_bottom)),
        top=stack((count - split.num_top, count)),
        inner=stack(*((layer, layer + 1) for layer in split.inner)) if split.inner else None,
        inner_layers=split.inner,
    )


@flax.struct.dataclass
class SplitModel:
    """A model whose adapter can be trained: an emulator, or the original as the upper bound.

    Attributes:
        shell: embeddings, final norm and head; frozen.
        adapter: blocks to be trained.
        middle: all other layers in depth order; frozen.
        inner_after: for each inner block of the adapter, how many segments of `middle` run before
            it.
    """

    shell: Any
    adapter: Adapter
    middle: tuple[Segment, ...]
    inner_after: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def assemble(self, adapter: Adapter | None = None) -> Params:
        """The runnable model: this middle within an adapter (its own by default)."""
        adapter = self.adapter if adapter is None else adapter
        segments: list[Segment] = [adapter.bottom]
        start = 0
        for index, stop in enumerate(self.inner_after):
            segments += self.middle[start:stop]
            segments.append(slice_blocks(adapter.inner, index, index + 1))
            start = stop
        segments += self.middle[start:]
        segments.append(adapter.top)
        return Params(self.shell, tuple(s for s in segments if depth(s)))

    @property
    def layer_map(self) -> LayerMap:
        """What runs where, with stored layers numbered in depth order."""
        places: list[int | None] = []
        stored = 0
        for index, segment in enumerate(self.middle):
            places += [None] * self.inner_after.count(index)
            order = segment.order if isinstance(segment, Shared) else range(depth(segment))
            places += [stored + place for place in order]
            stored += num_stored(segment)
        return (*places, *[None] * self.inner_after.count(len(self.middle)))

    def stored_layers(self) -> Iterator[Layer]:
        """The middle's layers as `layer_map` numbers them; one of a stack on a device is a copy."""
        for segment in self.middle:
            for index in range(num_stored(segment)):
                yield get_block(segment, index)


def split_model(params: Params, split: AdapterSpec) -> SplitModel:
    """The full model in the form in which its adapter can be trained: the upper bound.

    Segments of the model that lie within the middle are taken as they are.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    adapter = adapter_of(params, split)
    bounds = (split.num_bottom - 1, *split.inner, params.num_layers - split.num_top)
    pieces: list[Segment] = []
    inner_after = []
    for before, after in pairwise(bounds):
        pieces += slice_segments(params.segments, before + 1, after)
        inner_after.append(len(pieces))
    return SplitModel(params.shell, adapter, tuple(pieces), tuple(inner_after[:-1]))
