"""Options of a compression, readable without JAX."""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, get_args

from gradot_jax.compression.budget import check_budget
from gradot_jax.errors import InputError
from gradot_jax.methods.table import METHODS, Method

AdapterChoice = Literal["sandwich", "own"]
AttentionScore = Literal["l1", "quadratic"]
AttentionBasis = Literal["svd", "whitened"]
ChannelScore = Literal["l1", "gcs-set", "token-fisher"]
Allocation = Literal["uniform", "global"]
AttentionCompensation = Literal["none", "bias", "refit"]
MLPCompensation = Literal["none", "refit"]
FisherKind = Literal["empirical", "mc"]

T = TypeVar("T")
if TYPE_CHECKING:
    MethodName = str
    Asked = Annotated[T, "as the method has it, where nothing is asked for"]
else:
    MethodName = Literal[tuple(METHODS)]
    Asked = Optional

_ADDED = {"skip_positions": 0}
"""Options that are younger than results on record, with the value that means what was before."""

_FOR_ALL = ("method", "budget", "seed")
_METHODS_OWN: Any = None


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

    A field that is left out has the method's own value, so that `gradot+` is `gradot` with other
    defaults; a field that the method does not read must be left out.

    Attributes:
        method: `gradot` scores by GCS, as in the paper; `gradot-global`, `gradot-lambda`,
            `gradot-refit`, `gradot-quadratic` and `gradot+` are the same with other defaults;
            `magnitude` scores by singular values and channel norms; `activation-svd` by singular
            values in the whitened norm of the inputs and by the energy of channels; `random` keeps
            at random;
            `layer-drop` keeps evenly spread layers, `offsite-tuning` distils them; `crash` keeps
            one layer of each cluster and shares it; `scaleot` puts harmonizers in place of the
            layers of least importance; `-own` lets these two choose the adapter's blocks; `empty`
            keeps no middle at all, the floor against which the others are measured.
        budget: largest share of the parameters of the middle's kernels to keep, in (0, 1].
        attention_budget: the same for the kernels outside the MLPs alone; `budget` by default, or
            what a larger `mlp_budget` leaves of it.
        mlp_budget: the same for the MLPs alone, likewise; both together may not exceed `budget`.
        adapter: `sandwich` trains the first and last blocks; `own` lets `crash` and `scaleot`
            choose as many blocks wherever they would.
        attention_score: `l1` is the paper's; `quadratic` is the KFAC quadratic form.
        attention_basis: `svd` is the paper's; `whitened` decomposes A^1/2 W G^1/2 and scores by
            its squared singular values.
        channel_score: `l1` is the paper's; `gcs-set` searches for the set that scores least by it
            as a whole; `token-fisher` selects sets by the exact Fisher of tokens.
        lambda_attention: weight of the loss term for attention, dimensionless; 0 leaves it out.
        lambda_mlp: the same for the MLPs.
        allocation: `uniform` gives every layer the same share; `global` ranks all layers
            together.
        rank_multiple: ranks are multiples of it (128 suits TPUs, 64 GPUs).
        channel_multiple: the same for numbers of channels.
        compensate_attention: `bias` shifts biases by the mean of what was removed, `refit` fits
            the right factors on the calibration inputs; `none` is the paper.
        compensate_mlp: `refit` fits the map out of the channels on the calibration activations;
            `none` is the paper.
        damping: ridge of the refits, relative to the mean diagonal of the second moment.
        skip_positions: first tokens of each calibration sequence to leave out of factors and
            moments; the first one holds a few activations of huge size.
        fisher: targets of the Fisher: the text's own (`empirical`) or sampled (`mc`).
        seed: of all that is drawn: sampled targets, random selection, training.
        distillation: for `offsite-tuning`.
        crash: for `crash`.
        scaleot: for `scaleot`.
    """

    method: MethodName = "gradot"
    budget: float = 0.6
    attention_budget: Asked[float] = _METHODS_OWN
    mlp_budget: Asked[float] = _METHODS_OWN
    adapter: Asked[AdapterChoice] = _METHODS_OWN
    attention_score: Asked[AttentionScore] = _METHODS_OWN
    attention_basis: Asked[AttentionBasis] = _METHODS_OWN
    channel_score: Asked[ChannelScore] = _METHODS_OWN
    lambda_attention: Asked[float] = _METHODS_OWN
    lambda_mlp: Asked[float] = _METHODS_OWN
    allocation: Asked[Allocation] = _METHODS_OWN
    rank_multiple: Asked[int] = _METHODS_OWN
    channel_multiple: Asked[int] = _METHODS_OWN
    compensate_attention: Asked[AttentionCompensation] = _METHODS_OWN
    compensate_mlp: Asked[MLPCompensation] = _METHODS_OWN
    damping: Asked[float] = _METHODS_OWN
    skip_positions: Asked[int] = _METHODS_OWN
    fisher: Asked[FisherKind] = _METHODS_OWN
    seed: int = 0
    distillation: DistillationOptions = DistillationOptions()
    crash: CrashOptions = CrashOptions()
    scaleot: ScaleOTOptions = ScaleOTOptions()

    def __post_init__(self) -> None:
        """Fills in what the method has of its own, and checks ranges and choices.

        Raises:
            InputError: for a value out of range, or one that the method does not read.
        """
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        self._take_from_method()
        for name in ("budget", "attention_budget", "mlp_budget"):
            value = getattr(self, name)
            if value is not None:
                check_budget(name, value)
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{name} must be one of {choices}, got {value!r}")
        self._check_numbers()
        if self.attention_basis == "whitened" and self.attention_score != "l1":
            raise InputError(
                "attention_score does nothing in the whitened basis: its singular values are the "
                "score"
            )

    def _take_from_method(self) -> None:
        own = METHODS[self.method].options
        for field in dataclasses.fields(self):
            asked = getattr(self, field.name) != field.default
            if field.name in _FOR_ALL or (asked and field.name in own):
                continue
            if asked:
                readers = (m.name for m in METHODS.values() if field.name in m.options)
                raise InputError(
                    f"{field.name} does nothing in the method {self.method}: it is read by "
                    f"{', '.join(readers)}"
                )
            if own.get(field.name) is not None:
                object.__setattr__(self, field.name, own[field.name])

    def _check_numbers(self) -> None:
        for name in ("rank_multiple", "channel_multiple"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a whole number, at least 1, got {value!r}")
        skipped = self.skip_positions
        if skipped is not None and (type(skipped) is not int or skipped < 0):
            raise InputError(f"skip_positions must be a whole number, at least 0, got {skipped!r}")
        for name in ("lambda_attention", "lambda_mlp"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise InputError(f"damping must be positive and finite, got {self.damping}")

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that tell these options from others, also from those of later versions."""
        values = dataclasses.asdict(self)
        return {
            name: value
            for name, value in values.items()
            if name not in _ADDED or value not in (None, _ADDED[name])
        }

    @property
    def record(self) -> Method:
        """The method's record."""
        return METHODS[self.method]

    @property
    def compensates(self) -> bool:
        """Whether factors are read after scoring."""
        asked = (self.compensate_attention, self.compensate_mlp)
        return any(kind not in (None, "none") for kind in asked)

    @property
    def reads_gradient(self) -> bool:
        """Whether weight gradients are read."""
        return bool(self.lambda_attention or self.lambda_mlp)

    @property
    def calibrates(self) -> Literal["factors", "inputs", "nothing"]:
        """What a calibration is for: Kronecker factors, moments of inputs.

        Each includes what comes after it.
        """
        reads = self.record.reads
        if reads == "factors":
            return "factors"
        return "inputs" if reads == "inputs" or self.compensates else "nothing"


_CHOICES = {
    "adapter": AdapterChoice,
    "attention_score": AttentionScore,
    "attention_basis": AttentionBasis,
    "channel_score": ChannelScore,
    "allocation": Allocation,
    "compensate_attention": AttentionCompensation,
    "compensate_mlp": MLPCompensation,
    "fisher": FisherKind,
}
