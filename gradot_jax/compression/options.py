"""Options of a compression, readable without JAX."""

import dataclasses
import math
from typing import Literal, get_args

from gradot_jax.errors import InputError

Method = Literal["gradot", "magnitude", "layer-drop", "empty"]
Allocation = Literal["uniform", "global"]
AttentionCompensation = Literal["none", "bias", "refit"]
MLPCompensation = Literal["none", "refit"]
FisherKind = Literal["empirical", "mc"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How to compress; the defaults are the paper's formulas.

    Attributes:
        method: `gradot` scores by GCS; `magnitude` by singular values and channel norms;
            `layer-drop` keeps evenly spread layers; `empty` keeps no middle at all, the floor
            against which the others are judged.
        budget: share of the middle's parameters to keep, in (0, 1].
        attention_budget: the same for attention alone; None for `budget`.
        mlp_budget: the same for the MLPs alone; None for `budget`.
        lambda_attention: weight of the loss term for attention, dimensionless; 0 leaves it out.
        lambda_mlp: the same for the MLPs.
        allocation: `uniform` gives every layer the same share; `global` ranks all layers
            together.
        rank_multiple: ranks are multiples of it (128 suits TPUs, 64 GPUs).
        channel_multiple: the same for numbers of channels.
        compensate_attention: `bias` shifts biases by the mean of what was removed, `refit` fits
            the right factors on the calibration inputs; `none` is the paper.
        compensate_mlp: `refit` fits fc2 on the calibration activations; `none` is the paper.
        damping: ridge of the refits, relative to the mean diagonal of the second moment.
        fisher: targets of the Fisher: the text's own (`empirical`) or sampled (`mc`).
        seed: of sampled targets.
    """

    method: Method = "gradot"
    budget: float = 0.6
    attention_budget: float | None = None
    mlp_budget: float | None = None
    lambda_attention: float = 0.0
    lambda_mlp: float = 0.0
    allocation: Allocation = "uniform"
    rank_multiple: int = 1
    channel_multiple: int = 1
    compensate_attention: AttentionCompensation = "none"
    compensate_mlp: MLPCompensation = "none"
    damping: float = 1e-4
    fisher: FisherKind = "empirical"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks ranges and choices; raises InputError."""
        for name in ("budget", "attention_budget", "mlp_budget"):
            value = getattr(self, name)
            if value is not None:
                check_budget(name, value)
        for name, kind in (
            ("method", Method),
            ("allocation", Allocation),
            ("compensate_attention", AttentionCompensation),
            ("compensate_mlp", MLPCompensation),
            ("fisher", FisherKind),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("rank_multiple", "channel_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lambda_attention", "lambda_mlp"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not 0 < self.damping < math.inf:
            raise InputError(f"damping must be positive and finite, got {self.damping}")

    @property
    def budgets(self) -> tuple[float, float]:
        """Budgets of attention and MLP."""
        attention = self.budget if self.attention_budget is None else self.attention_budget
        return attention, self.budget if self.mlp_budget is None else self.mlp_budget

    @property
    def compensates(self) -> bool:
        """Whether factors are read after scoring."""
        return self.compensate_attention != "none" or self.compensate_mlp != "none"

    @property
    def reads_gradient(self) -> bool:
        """Whether weight gradients are read."""
        uses_lambda = self.lambda_attention != 0 or self.lambda_mlp != 0
        return self.method == "gradot" and uses_lambda

    @property
    def reads_factors(self) -> bool:
        """Whether calibration text is read at all."""
        return self.method == "gradot" or (self.method == "magnitude" and self.compensates)


def check_budget(name: str, budget: float) -> None:
    """Raises InputError unless a budget lies in (0, 1]."""
    if not 0 < budget <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {budget}")
