"""What a comparison runs on: a model, its calibration text, and tasks to fine-tune it on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradot_jax.files.digest import tree_digest
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.partition import shard_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import DeviceMesh

Measure = Callable[[ModelConfig, Params], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings for AdamW whose rate rises linearly from 0 over `warmup` steps, then falls to 0.

    Attributes:
        steps: optimiser steps.
        batch_size: examples a step.
        learning_rate: peak.
        warmup: steps.
        b1: decay of the first moment.
        b2: decay of the second moment.
        weight_decay: decoupled.
        clip_norm: largest norm of the whole gradient.
        evaluations: of the development loss, besides the one before the first step; the adapter
            of the best is taken.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 10
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    evaluations: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validity:
    """How much must happen on a task for a comparison on it to mean something.

    For a perplexity both are relative (0.25 is a quarter), for scores they are points.

    Attributes:
        gain: least improvement by tuning the full model (V1).
        loss: least loss without a middle, tuned, against the full model, tuned (V2).
    """

    gain: float
    loss: float


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

    def measure(self, task: Task, params: Params) -> dict[str, float]:
        """Metrics of a model on a task's test part."""
        cast = jax.tree.map(lambda leaf: leaf.astype(self.compute_dtype), params)
        if self.mesh is not None:
            cast = shard_params(cast, self.mesh)
        return task.measure(self.config, cast)
