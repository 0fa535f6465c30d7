"""The emulator: what the model owner ships."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import flax.struct
import jax
import numpy as np

from gradot_jax.models.params import Layer, Segment, Shared, segment_blocks, stack_blocks
from gradot_jax.models.split import Adapter, LayerMap, SplitModel


@flax.struct.dataclass
class Emulator(SplitModel):
    """A compressed model as the data owner receives it.

    Nothing that ships accepts a `Params` or a `SplitModel` that is no emulator: the original
    cannot be shipped by passing the wrong object.
    """


def build_emulator(
    shell: Any, adapter: Adapter, layers: Sequence[Layer], layer_map: LayerMap | None = None
) -> Emulator:
    """An emulator from single layers.

    Its arrays are where the shell's are. Of a shell in host memory, as of a memory-mapped
    checkpoint, every layer is a segment of its own and none is copied; on devices those of equal
    shape are stacked. Without a map every layer, in depth order, runs once.

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
