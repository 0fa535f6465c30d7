"""What every compression method takes and yields; each method is one file in `offsite/methods/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from gradot_jax.compression.options import CompressionOptions
from gradot_jax.compression.plan import HarmonizerPlan, LayerPlan
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import ATTENTION_SITES, Block, Params
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.offsite.split import AdapterSpec
from gradot_jax.parallel import DeviceMesh


class Problem(NamedTuple):
    """What is to be compressed, and how.

    Attributes:
        config: of the model.
        params: the full original model.
        split: the adapter asked for.
        batches: the owner's public text, of one shape.
        options: how to compress.
        mesh: devices to spread the work over.
        checkpoints: folder from which an interrupted compression goes on; None keeps none.
        progress: whether to report.
        dtype: of the arithmetic, see `nn.dtypes.compute_dtype`; methods that train have that of
            the weights.
        offload: whether a calibration keeps the boundaries of layers in host memory.
    """

    config: OPTConfig
    params: Params
    split: AdapterSpec
    batches: Sequence[Batch]
    options: CompressionOptions
    mesh: DeviceMesh | None = None
    checkpoints: Path | None = None
    progress: bool = False
    dtype: DTypeLike | None = None
    offload: bool = False


class Outcome(NamedTuple):
    """What a method makes of the middle.

    Attributes:
        layers: what each stored block is, in depth order.
        blocks: the stored blocks, single.
        layer_map: for each place between bottom and top adapter, in the order in which they run:
            an index into `blocks`, or None for the next inner block of the adapter; None as a
            whole runs every block once.
        split: the adapter, where the method chose its own.
        scores: arrays by name, for the owner's record.
        calibration: JSON values, for the owner's record.
    """

    layers: Sequence[LayerPlan | HarmonizerPlan]
    blocks: Sequence[Block | Harmonizer]
    layer_map: tuple[int | None, ...] | None = None
    split: AdapterSpec | None = None
    scores: Mapping[str, np.ndarray] = MappingProxyType({})
    calibration: Mapping[str, Any] = MappingProxyType({})


def whole_layer(config: OPTConfig, layer: int) -> LayerPlan:
    """The plan of a block that is kept as it is.

    Args:
        config: of the model.
        layer: index in the full model.
    """
    components = tuple((site, None) for site in ATTENTION_SITES)
    return LayerPlan(layer=layer, components=components, channels=tuple(range(config.ffn_dim)))


def layers_to_keep(num_layers: int, options: CompressionOptions) -> int:
    """The number of whole layers nearest to the budget, at least one."""
    return max(int(options.budget * num_layers + 0.5), 1)
