"""Options of a compression, readable without JAX."""

import dataclasses
import math
from typing import Literal, get_args

from gradot_jax.errors import InputError

Method = Literal[
    "gradot",
    "magnitude",
    "activation-svd",
    "random",
    "layer-drop",
    "offsite-tuning",
    "crash",
    "scaleot",
    "empty",
]
AdapterChoice = Literal["sandwich", "own"]
AttentionScore = Literal["l1", "quadratic"]
AttentionBasis = Literal["svd", "whitened"]
ChannelScore = Literal["l1", "token-fisher"]
Allocation = Literal["uniform", "global"]
AttentionCompensation = Literal["none", "bias", "refit"]
MLPCompensation = Literal["none", "refit"]
FisherKind = Literal["empirical", "mc"]

_GRADOT = ("gradot",)
_WIDTH = ("gradot", "magnitude", "activation-svd", "random")
_READ_BY: dict[str, tuple[str, ...]] = {
    "adapter": ("crash", "scaleot"),
    "attention_score": _GRADOT,
    "attention_basis": _GRADOT,
    "channel_score": _GRADOT,
    "lambda_attention": _GRADOT,
    "lambda_mlp": _GRADOT,
    "fisher": _GRADOT,
    "attention_budget": _WIDTH,
    "mlp_budget": _WIDTH,
    "allocation": _WIDTH,
    "rank_multiple": _WIDTH,
    "channel_multiple": _WIDTH,
    "compensate_attention": _WIDTH,
    "compensate_mlp": _WIDTH,
    "damping": _WIDTH,
    "distillation": ("offsite-tuning",),
    "crash": ("crash",),
    "scaleot": ("scaleot",),
}
"""Which methods read an option; those that are not named are for all, needed or not."""


def _check_at_least(where: str, options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not least <= value < math.inf:
            raise InputError(f"{where}.{name} must be at least {least}, got {value}")


def _check_rate(where: str, rate: float) -> None:
    if not 0 < rate < math.inf:
        raise InputError(f"{where}.learning_rate must be positive and finite, got {rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """How `offsite-tuning` trains the layers that it keeps (Xiao et al. 2023).

    Attributes:
        steps: batches to train on.
        learning_rate: peak; the schedule is a cosine.
        warmup_steps: updates over which it rises.
        weight_decay: of matrices.
        lm_weight: weight of the next-token loss of the emulator.
        kd_weight: weight of the normalised squared error against the original middle.
    """

    steps: int = 300
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0
    lm_weight: float = 1.0
    kd_weight: float = 30.0

    def __post_init__(self) -> None:
        """Checks ranges; raises InputError."""
        _check_at_least("distillation", self, 1, "steps")
        _check_at_least("distillation", self, 0, "warmup_steps", "weight_decay")
        _check_at_least("distillation", self, 0, "lm_weight", "kd_weight")
        _check_rate("distillation", self.learning_rate)
        if not (self.lm_weight or self.kd_weight):
            raise InputError(
                "distillation.lm_weight and distillation.kd_weight are both 0: nothing is left to "
                "train on"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashOptions:
    """How `crash` rebuilds the depth of the model (Zhang et al. 2023).

    Attributes:
        share: run the nearest kept layer where one was removed; off leaves the depth reduced.
    """

    share: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOTOptions:
    """How `scaleot` trains harmonizers and ranks layers (Yao et al. 2024).

    Attributes:
        steps: alternating steps of harmonizer training and importance update.
        learning_rate: of the harmonizers.
        harmonizer_rank: width of a harmonizer.
        group_size: consecutive layers among which the replaced ones are chosen.
        num_networks: networks sampled for each importance update.
        importance_rate: factor on each importance update.
        rank_removed: share of the rank of q, k, v and out that the kept layers lose.
    """

    steps: int = 300
    learning_rate: float = 1e-4
    harmonizer_rank: int = 64
    group_size: int = 4
    num_networks: int = 3
    importance_rate: float = 1.0
    rank_removed: float = 0.8

    def __post_init__(self) -> None:
        """Checks ranges; raises InputError."""
        _check_at_least("scaleot", self, 1, "steps", "harmonizer_rank")
        _check_at_least("scaleot", self, 2, "group_size", "num_networks")
        _check_at_least("scaleot", self, 0, "importance_rate", "rank_removed")
        _check_rate("scaleot", self.learning_rate)
        if self.rank_removed >= 1:
            raise InputError(f"scaleot.rank_removed must lie in [0, 1), got {self.rank_removed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How to compress; the defaults are the paper's formulas.

    Attributes:
        method: `gradot` scores by GCS; `magnitude` by singular values and channel norms;
            `activation-svd` by singular values in the whitened norm of the inputs and by the
            energy of channels; `random` keeps at random; `layer-drop` keeps evenly spread layers,
            `offsite-tuning` distils them; `crash` keeps one layer of each cluster and shares it;
            `scaleot` puts harmonizers in place of the layers of least importance; `empty` keeps
            no middle at all, the floor against which the others are judged.
        budget: share of the middle's parameters to keep, in (0, 1].
        attention_budget: the same for attention alone; None for `budget`.
        mlp_budget: the same for the MLPs alone; None for `budget`.
        adapter: `sandwich` trains the first and last blocks; `own` lets `crash` and `scaleot`
            choose as many blocks wherever they would.
        attention_score: `l1` is the paper's; `quadratic` is the KFAC quadratic form.
        attention_basis: `svd` is the paper's; `whitened` decomposes A^1/2 W G^1/2 and scores by
            its squared singular values.
        channel_score: `l1` is the paper's; `token-fisher` selects sets by the exact Fisher of
            tokens.
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
        seed: of all that is drawn: sampled targets, random selection, training.
        distillation: for `offsite-tuning`.
        crash: for `crash`.
        scaleot: for `scaleot`.
    """

    method: Method = "gradot"
    budget: float = 0.6
    attention_budget: float | None = None
    mlp_budget: float | None = None
    adapter: AdapterChoice = "sandwich"
    attention_score: AttentionScore = "l1"
    attention_basis: AttentionBasis = "svd"
    channel_score: ChannelScore = "l1"
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
    distillation: DistillationOptions = DistillationOptions()
    crash: CrashOptions = CrashOptions()
    scaleot: ScaleOTOptions = ScaleOTOptions()

    def __post_init__(self) -> None:
        """Checks ranges and choices; raises InputError."""
        for name in ("budget", "attention_budget", "mlp_budget"):
            value = getattr(self, name)
            if value is not None:
                check_budget(name, value)
        for name, kind in (
            ("method", Method),
            ("adapter", AdapterChoice),
            ("attention_score", AttentionScore),
            ("attention_basis", AttentionBasis),
            ("channel_score", ChannelScore),
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
        if self.attention_basis == "whitened" and self.attention_score != "l1":
            raise InputError(
                "attention_score does nothing in the whitened basis: its singular values are the "
                "score"
            )
        for field in dataclasses.fields(self):
            readers = _READ_BY.get(field.name, (self.method,))
            if self.method not in readers and getattr(self, field.name) != field.default:
                raise InputError(
                    f"{field.name} does nothing in the method {self.method}: it is read by "
                    f"{', '.join(readers)}"
                )

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
    def reads(self) -> Literal["factors", "inputs", "weights"]:
        """What scores and compensations look at: Kronecker factors, moments of inputs, or neither.

        Each includes what comes after it.
        """
        if self.method == "gradot":
            return "factors"
        return "inputs" if self.method == "activation-svd" or self.compensates else "weights"


def check_budget(name: str, budget: float) -> None:
    """Raises InputError unless a budget lies in (0, 1]."""
    if not 0 < budget <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {budget}")
