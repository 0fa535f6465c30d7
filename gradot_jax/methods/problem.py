"""What every compression method takes and yields."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from gradot_jax.compression.plan import HarmonizerPlan, LayerPlan
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.params import Layer, Params
from gradot_jax.models.split import AdapterSpec, LayerMap
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import DeviceMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be compressed, and how.

    Attributes:
        config: of the model.
        params: the full original model.
        split: the adapter asked for.
        batches: the model owner's public text, of one shape.
        options: how to compress.
        mesh: devices to spread the work over.
        checkpoints: folder from which an interrupted compression goes on; None keeps none.
        scratch: empty folder for finished layers where there are no checkpoints; None keeps them
            in memory.
        progress: whether to report.
        dtype: of the arithmetic, see `nn.dtypes.compute_dtype`; methods that train have that of
            the weights.
        offload: whether a calibration keeps the boundaries of layers in host memory.
    """

    config: ModelConfig
    params: Params
    split: AdapterSpec
    batches: Sequence[Batch]
    options: CompressionOptions
    mesh: DeviceMesh | None = None
    checkpoints: Path | None = None
    scratch: Path | None = None
    progress: bool = False
    dtype: DTypeLike | None = None
    offload: bool = False

    @property
    def middle(self) -> tuple[int, ...]:
        """Indices of the middle's layers in the full model."""
        return self.split.middle_layers(self.params.num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method makes of the middle.

    Attributes:
        layers: what each stored layer is, in depth order.
        blocks: the stored layers, single.
        layer_map: for each place between bottom and top adapter, in the order in which they run:
            an index into `blocks`, or None for the next inner block of the adapter; None as a
            whole runs every block once.
        split: the adapter, where the method chose its own.
        scores: arrays by name, for the model owner's record.
        calibration: JSON values, for the model owner's record.
    """

    layers: Sequence[LayerPlan | HarmonizerPlan]
    blocks: Sequence[Layer]
    layer_map: LayerMap | None = None
    split: AdapterSpec | None = None
    scores: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def whole_layer(config: ModelConfig, layer: int) -> LayerPlan:
    """The plan of a block that is kept as it is; `layer` is its index in the full model."""
    components = tuple((site, None) for site in config.family.layout.low_rank)
    channels = tuple(range(channel_count(config)))
    return LayerPlan(layer=layer, components=components, channels=channels)
