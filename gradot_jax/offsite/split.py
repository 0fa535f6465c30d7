"""The split of a model into adapter blocks, which are trained, and the middle."""

import dataclasses
from itertools import pairwise

import flax.struct

from gradot_jax.errors import InputError
from gradot_jax.models.opt.params import (
    Block,
    Params,
    concatenate_blocks,
    depth,
    layers_at,
    slice_blocks,
    slice_segments,
    take_blocks,
)


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
        top = 0
        while top < len(rest) and rest[-1 - top] == num_layers - 1 - top:
            top += 1
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
    def spec(self) -> AdapterSpec:
        """The split that the adapter belongs to."""
        return AdapterSpec(depth(self.bottom), depth(self.top), self.inner_layers)

    @property
    def stacks(self) -> tuple[Block, ...]:
        """Its stacks in depth order."""
        return tuple(s for s in (self.bottom, self.inner, self.top) if s is not None)

    @classmethod
    def of_stack(cls, blocks: Block, spec: AdapterSpec) -> "Adapter":
        """The adapter from one stack of its blocks in depth order."""
        top = spec.num_blocks - spec.num_top
        return cls(
            bottom=slice_blocks(blocks, 0, spec.num_bottom),
            top=slice_blocks(blocks, top, spec.num_blocks),
            inner=slice_blocks(blocks, spec.num_bottom, top) if spec.inner else None,
            inner_layers=spec.inner,
        )


def adapter_of(params: Params, spec: AdapterSpec) -> Adapter:
    """The adapter of an original model; no other layer is copied.

    Of numpy segments its arrays are numpy, and views where a stack is a single layer.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    count = params.num_layers
    spec.check(count)

    def stack(*bounds: tuple[int, int]) -> Block:
        parts = [part for pair in bounds for part in slice_segments(params.segments, *pair)]
        return concatenate_blocks(parts or [slice_blocks(params.segments[0], 0, 0)])

    return Adapter(
        bottom=stack((0, spec.num_bottom)),
        top=stack((count - spec.num_top, count)),
        inner=stack(*((layer, layer + 1) for layer in spec.inner)) if spec.inner else None,
        inner_layers=spec.inner,
    )


def middle_blocks(params: Params, spec: AdapterSpec) -> list[Block]:
    """The middle of an original model as single blocks, in depth order.

    Of numpy segments, such as those of a memory-mapped checkpoint, they are views.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    spec.check(params.num_layers)
    return layers_at(params, spec.middle_layers(params.num_layers))


def split_blocks(params: Params, spec: AdapterSpec) -> tuple[Adapter, Block]:
    """The adapter and the middle (one stack) of an original model.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    count = params.num_layers
    spec.check(count)
    blocks = concatenate_blocks(params.segments)
    if spec.inner:
        adapter = take_blocks(blocks, spec.layers(count))
        return Adapter.of_stack(adapter, spec), take_blocks(blocks, spec.middle_layers(count))
    top = count - spec.num_top
    adapter = Adapter(
        bottom=slice_blocks(blocks, 0, spec.num_bottom), top=slice_blocks(blocks, top, count)
    )
    return adapter, slice_blocks(blocks, spec.num_bottom, top)
