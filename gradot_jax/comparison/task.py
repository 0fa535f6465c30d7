"""A downstream task as the comparison takes it, wherever its examples come from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.checkpoint import tree_digest

Measure = Callable[[OPTConfig, Params], dict[str, float]]


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
    """A task ready to train and evaluate on.

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
