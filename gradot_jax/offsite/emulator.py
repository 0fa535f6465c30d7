"""The emulator: what the model owner ships."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import flax.struct
import jax
import numpy as np

from gradot_jax.models.opt.params import (
    Layer,
    Params,
    Segment,
    Shared,
    Shell,
    depth,
    get_block,
    num_stored,
    segment_blocks,
    slice_blocks,
    slice_segments,
    stack_blocks,
)
from gradot_jax.offsite.split import Adapter, AdapterSpec, adapter_of

LayerMap = tuple[int | None, ...]
"""What runs between bottom and top adapter, place by place: the index of a stored layer of the
middle, or None for the next inner block of the adapter."""


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

    shell: Shell
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

    @property
    def stored_layers(self) -> list[Layer]:
        """The layers of the middle as `layer_map` numbers them."""
        return list(self.iterate_stored())

    def iterate_stored(self) -> Iterator[Layer]:
        """The same one at a time: a layer of a stack on a device is a copy."""
        for segment in self.middle:
            for index in range(num_stored(segment)):
                yield get_block(segment, index)


@flax.struct.dataclass
class Emulator(SplitModel):
    """A compressed model as the data owner receives it.

    Nothing that ships accepts a `Params` or a `SplitModel` that is no emulator: the original
    cannot be shipped by passing the wrong object.
    """


def build_emulator(
    shell: Shell, adapter: Adapter, layers: Sequence[Layer], layer_map: LayerMap | None = None
) -> Emulator:
    """An emulator from single layers.

    Its arrays are where the shell's are. Of a shell in host memory, as of a memory-mapped
    checkpoint, every layer is a segment of its own and none is copied; on devices those of equal
    shape are stacked.

    Args:
        shell: of the original.
        adapter: of the original.
        layers: what is stored of the middle, in depth order.
        layer_map: what runs where; None runs every layer once.

    Raises:
        ValueError: when the map has not a place for each inner block of the adapter.
    """
    gaps: list[list[int]] = [[]]
    for place in range(len(layers)) if layer_map is None else layer_map:
        if place is None:
            gaps.append([])
        else:
            gaps[-1].append(place)
    if len(gaps) - 1 != len(adapter.inner_layers):
        raise ValueError(
            f"the layer map has {len(gaps) - 1} places for the {len(adapter.inner_layers)} inner "
            "blocks of the adapter"
        )
    on_host = isinstance(shell.embed_tokens, np.ndarray)
    middle: list[Segment] = []
    ends = []
    for gap in gaps:
        middle += _segments(layers, gap, on_host=on_host)
        ends.append(len(middle))
    return Emulator(shell, adapter, tuple(middle), tuple(ends[:-1]))


def _segments(layers: Sequence[Layer], places: list[int], *, on_host: bool) -> tuple[Segment, ...]:
    if len(set(places)) == len(places):
        blocks = [layers[place] for place in places]
        return tuple(map(_host_stack, blocks)) if on_host else segment_blocks(blocks)
    shared = []
    for _, run in groupby(places, lambda place: str(jax.tree.map(jax.typeof, layers[place]))):
        order = list(run)
        stored = sorted(set(order))
        blocks = stack_blocks([layers[place] for place in stored])
        shared.append(Shared(blocks, tuple(map(stored.index, order))))
    return tuple(shared)


def _host_stack(layer: Layer) -> Layer:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], layer)


def split_model(params: Params, spec: AdapterSpec) -> SplitModel:
    """The full model in the form in which its adapter can be trained: the upper bound.

    Segments of the model that lie within the middle are taken as they are.

    Raises:
        InputError: when the split leaves no middle or nothing to train.
    """
    adapter = adapter_of(params, spec)
    bounds = (spec.num_bottom - 1, *spec.inner, params.num_layers - spec.num_top)
    pieces: list[Segment] = []
    inner_after = []
    for before, after in pairwise(bounds):
        pieces += slice_segments(params.segments, before + 1, after)
        inner_after.append(len(pieces))
    return SplitModel(params.shell, adapter, tuple(pieces), tuple(inner_after[:-1]))
