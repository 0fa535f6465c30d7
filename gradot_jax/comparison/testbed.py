"""What a comparison runs on: a model, its calibration text, and tasks to fine-tune it on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradot_jax.data.recipe import FineTuning, Validity
from gradot_jax.files.digest import json_digest, tree_digest
from gradot_jax.models.family import ModelConfig, config_identity
from gradot_jax.models.params import Params
from gradot_jax.models.partition import shard_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import DeviceMesh

Measure = Callable[[ModelConfig, Params], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task ready to train and evaluate on, wherever its examples come from.

    Attributes:
        name: short, for files and rows.
        label: for headings.
        metric: the one to report of those that `measure` returns.
        higher_is_better: of all that `measure` returns.
        tuning: settings of the fine-tuning, and the rate that the grid of rates multiplies.
        train: examples to tune on.
        development: examples to choose the best step and the learning rate with.
        measure: a model's metrics on the test part.
        test_digest: of the test part.
        validity: thresholds of V1 and V2.
        evaluation_batch: development examples a batch.
        protocol: JSON values for the record: which text, and how the test part is measured.
    """

    name: str
    label: str
    metric: str
    higher_is_better: bool
    tuning: FineTuning
    train: Batch
    development: Batch
    measure: Measure
    test_digest: str
    validity: Validity
    evaluation_batch: int = 30
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the examples that are tuned on."""
        return {name: tree_digest(getattr(self, name)) for name in ("train", "development")}

    def better_by(self, value: float, other: float) -> float:
        """How much better a value of a metric is than another; negative where it is worse."""
        return value - other if self.higher_is_better else other - value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Testbed:
    """A model with text and tasks.

    Attributes:
        name: of the model.
        config: its configuration.
        params: its weights, float32.
        tasks: to fine-tune and measure on.
        calibration: the model owner's text by seed of the draw, batches of one shape.
        held_out: text on which gradients are compared.
        split: the adapter of methods that choose none.
        training: fields of `CompressionOptions`, for the methods that read them.
        compute_dtype: of fine-tuning and evaluation.
        mesh: devices to spread everything over.
    """

    # It is no test, whatever its name.
    __test__ = False

    name: str
    config: ModelConfig
    params: Params
    tasks: tuple[Task, ...]
    calibration: Callable[[int], Sequence[Batch]]
    held_out: Sequence[Batch]
    split: AdapterSpec = dataclasses.field(default_factory=AdapterSpec)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compute_dtype: str = "float32"
    mesh: DeviceMesh | None = None

    @functools.cached_property
    def model_digest(self) -> str:
        """SHA-256 of the weights and of the configuration that says how they are used."""
        return json_digest([config_identity(self.config), tree_digest(self.params)])

    @functools.cached_property
    def held_out_digest(self) -> str:
        """Of the text on which gradients are compared."""
        return tree_digest(list(self.held_out))

    def calibration_digest(self, draw: int) -> str:
        """Of a draw of calibration text."""
        if draw not in self._draws:
            self._draws[draw] = tree_digest(list(self.calibration(draw)))
        return self._draws[draw]

    @functools.cached_property
    def _draws(self) -> dict[int, str]:
        return {}

    def measure(self, task: Task, params: Params) -> dict[str, float]:
        """Metrics of a model on a task's test part."""
        cast = jax.tree.map(lambda leaf: leaf.astype(self.compute_dtype), params)
        if self.mesh is not None:
            cast = shard_params(cast, self.mesh)
        return task.measure(self.config, cast)
