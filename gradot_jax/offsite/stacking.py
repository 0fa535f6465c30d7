"""The middle of a model to be trained around, in few stacks: less to compile, the same function.

What is stored keeps its true sizes; this is for the one who runs it.
"""

from itertools import pairwise

from gradot_jax.models.opt.params import Segment
from gradot_jax.models.opt.ragged import WASTE, merge_segments
from gradot_jax.offsite.emulator import SplitModel


def few_stacks(model: SplitModel, *, waste: float = WASTE) -> SplitModel:
    """Joins what runs between the same inner blocks, see `merge_segments`.

    A memory-mapped model, whose layers are each by themselves, becomes stacks on the host.

    Args:
        model: an emulator or the original.
        waste: zeros, as a share of the weights.
    """
    middle: list[Segment] = []
    ends = []
    for start, stop in pairwise((0, *model.inner_after, len(model.middle))):
        middle += merge_segments(model.middle[start:stop], waste=waste)
        ends.append(len(middle))
    return model.replace(middle=tuple(middle), inner_after=tuple(ends[:-1]))
