"""How models are tuned on a task, and when that means something; readable without JAX."""

import dataclasses
from typing import Any


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

    def changed(self, **fields: Any) -> "FineTuning":
        """With other settings; a warm-up as long as the run or longer ends before it."""
        changed = dataclasses.replace(self, **fields)
        return dataclasses.replace(changed, warmup=min(changed.warmup, changed.steps - 1))


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
