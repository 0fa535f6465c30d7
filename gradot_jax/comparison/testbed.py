"""What a comparison runs on: a model, its calibration text and tasks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradot_jax.comparison.task import Task
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params
from gradot_jax.models.opt.partition import shard_params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.split import AdapterSpec
from gradot_jax.parallel import DeviceMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Testbed:
    """A model with text and tasks.

    Attributes:
        name: of the model.
        config: its configuration.
        params: its weights, float32.
        tasks: to fine-tune and measure on.
        calibration: the owner's text by seed of the draw, batches of one shape.
        held_out: text on which gradients are compared.
        split: the adapter of methods that choose none.
        training: fields of `CompressionOptions` by method, for those that train.
        compute_dtype: of fine-tuning and evaluation.
        mesh: devices to spread everything over.
    """

    # It is no test, whatever its name.
    __test__ = False

    name: str
    config: OPTConfig
    params: Params
    tasks: tuple[Task, ...]
    calibration: Callable[[int], Sequence[Batch]]
    held_out: Sequence[Batch]
    split: AdapterSpec = dataclasses.field(default_factory=AdapterSpec)
    training: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    compute_dtype: str = "float32"
    mesh: DeviceMesh | None = None

    def measure(self, task: Task, params: Params) -> dict[str, float]:
        """Metrics of a model on a task's test part."""
        cast = jax.tree.map(lambda leaf: leaf.astype(self.compute_dtype), params)
        if self.mesh is not None:
            cast = shard_params(cast, self.mesh)
        return task.measure(self.config, cast)
