"""The split of a model into bottom adapter, middle and top adapter."""

import dataclasses

import flax.struct

from gradot_jax.errors import InputError
from gradot_jax.models.opt.params import (
    Block,
    Params,
    concatenate_blocks,
    depth,
    slice_blocks,
)


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Which blocks the data owner trains.

    Attributes:
        num_bottom: first blocks of the model.
        num_top: last blocks of the model.
    """

    num_bottom: int = 2
    num_top: int = 2

    def check(self, num_layers: int) -> None:
        """Raises InputError unless there is something to train and a middle to compress."""
        if self.num_bottom < 0 or self.num_top < 0 or self.num_bottom + self.num_top == 0:
            raise InputError(
                f"the adapter needs at least one block, got num_bottom = {self.num_bottom} and "
                f"num_top = {self.num_top}"
            )
        if self.num_bottom + self.num_top >= num_layers:
            raise InputError(
                f"num_bottom = {self.num_bottom} and num_top = {self.num_top} leave no middle in "
                f"a model of {num_layers} blocks"
            )


@flax.struct.dataclass
class Adapter:
    """The blocks that are trained; either stack may be empty.

    Attributes:
        bottom: stack of the first blocks.
        top: stack of the last blocks.
    """

    bottom: Block
    top: Block

    @property
    def spec(self) -> AdapterSpec:
        """The split that the adapter belongs to."""
        return AdapterSpec(depth(self.bottom), depth(self.top))


def split_blocks(params: Params, spec: AdapterSpec) -> tuple[Adapter, Block]:
    """The adapter and the middle (one stack) of an original model.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    spec.check(params.num_layers)
    blocks = concatenate_blocks(params.segments)
    top = params.num_layers - spec.num_top
    adapter = Adapter(
        bottom=slice_blocks(blocks, 0, spec.num_bottom),
        top=slice_blocks(blocks, top, params.num_layers),
    )
    return adapter, slice_blocks(blocks, spec.num_bottom, top)
