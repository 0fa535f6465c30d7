"""All that is known of a compression method before it runs. Nothing here imports JAX.

A method is one record in `METHODS` and one file or folder beside this one. A record may be a
preset: it shares the code of another, with defaults of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from gradot_jax.compression.plan import HarmonizerShape, LayerShape
    from gradot_jax.methods.options import CompressionOptions
    from gradot_jax.methods.problem import Outcome, Problem
    from gradot_jax.models.family import ModelConfig
    from gradot_jax.models.split import AdapterSpec

Reads = Literal["factors", "inputs", "text", "seed", "weights"]


class Stored(NamedTuple):
    """What a method will store.

    Attributes:
        shapes: of the stored middle layers. With a budget shared between layers (`allocation =
            "global"`) each has the average shape; an adapter that the method chooses itself may
            make them other layers.
        trained: parameters that it trains on the way.
    """

    shapes: "tuple[LayerShape | HarmonizerShape, ...]"
    trained: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
    """One compression method, or a preset of one.

    Attributes:
        name: as `--method` takes it.
        compress: makes the emulator's middle; raises InputError.
        forecast: what it will store; raises InputError for a budget that cannot be met.
        options: fields of `CompressionOptions` that it reads beside those for all, with the values
            that they have where nothing is asked for. None is whatever the field has.
        reads: what the result depends on beside the weights: Kronecker `factors`, moments of
            `inputs`, the `text` as such, the `seed` alone, or nothing but the `weights`.
        streams: whether it takes the model layer by layer, one on the devices at a time.
    """

    name: str
    compress: Callable[["Problem"], "Outcome"]
    forecast: Callable[["ModelConfig", "AdapterSpec", "CompressionOptions"], Stored]
    _: dataclasses.KW_ONLY
    options: Mapping[str, Any]
    reads: Reads
    streams: bool = True

    @property
    def scores(self) -> bool:
        """Whether it scores the components and channels of every layer, see `methods.scored`."""
        return "allocation" in self.options


def _gradot(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.gradot import compress

    return compress(problem)


def _magnitude(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.magnitude import compress

    return compress(problem)


def _activation_svd(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.activation_svd import compress

    return compress(problem)


def _random(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.random import compress

    return compress(problem)


def _layer_drop(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.layer_drop import compress

    return compress(problem)


def _offsite_tuning(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.offsite_tuning import compress

    return compress(problem)


def _crash(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.crash.crash import compress

    return compress(problem)


def _scaleot(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.scaleot.scaleot import compress

    return compress(problem)


def _empty(problem: "Problem") -> "Outcome":
    from gradot_jax.methods.empty import compress

    return compress(problem)


def _width(config, split, options) -> Stored:
    from gradot_jax.methods.allocation import forecast

    return forecast(config, split, options)


def _depth(config, split, options) -> Stored:
    from gradot_jax.methods.layer_drop import forecast

    return forecast(config, split, options)


def _trained_depth(config, split, options) -> Stored:
    from gradot_jax.methods.offsite_tuning import forecast

    return forecast(config, split, options)


def _harmonizers(config, split, options) -> Stored:
    from gradot_jax.methods.scaleot.scaleot import forecast

    return forecast(config, split, options)


def _nothing(config, split, options) -> Stored:
    del config, split, options
    return Stored(())


SCORED = {
    "attention_budget": None,
    "mlp_budget": None,
    "allocation": "uniform",
    "rank_multiple": 1,
    "channel_multiple": 1,
    "compensate_attention": "none",
    "compensate_mlp": "none",
    "damping": 1e-4,
    "skip_positions": 0,
}
"""Options of every method that scores components and channels."""

GRADOT = {
    **SCORED,
    "attention_score": "l1",
    "attention_basis": "svd",
    "channel_score": "l1",
    "lambda_attention": 0.0,
    "lambda_mlp": 0.0,
    "fisher": "empirical",
}
"""The paper's formulas."""


WHITENED = {**GRADOT, "attention_basis": "whitened", "channel_score": "token-fisher"}
QUADRATIC = {**GRADOT, "attention_score": "quadratic", "channel_score": "token-fisher"}
CRASH = {"adapter": "sandwich", "crash": None}
SCALEOT = {"adapter": "sandwich", "scaleot": None}
REFIT, GLOBAL, OWN = {"compensate_mlp": "refit"}, {"allocation": "global"}, {"adapter": "own"}
LAMBDA = {"lambda_attention": 0.3, "lambda_mlp": 0.3}

_ALL = (
    Method("gradot", _gradot, _width, options=GRADOT, reads="factors"),
    Method("gradot-global", _gradot, _width, options=GRADOT | GLOBAL, reads="factors"),
    Method("gradot-lambda", _gradot, _width, options=GRADOT | LAMBDA, reads="factors"),
    Method("gradot-refit", _gradot, _width, options=GRADOT | REFIT, reads="factors"),
    Method("gradot-quadratic", _gradot, _width, options=QUADRATIC | GLOBAL, reads="factors"),
    Method("gradot+", _gradot, _width, options=WHITENED | GLOBAL, reads="factors"),
    Method("magnitude", _magnitude, _width, options=SCORED, reads="weights"),
    Method("activation-svd", _activation_svd, _width, options=SCORED, reads="inputs"),
    Method("random", _random, _width, options=SCORED, reads="seed"),
    Method("layer-drop", _layer_drop, _depth, options={}, reads="weights"),
    Method(
        "offsite-tuning",
        _offsite_tuning,
        _trained_depth,
        options={"distillation": None},
        reads="text",
        streams=False,
    ),
    Method("crash", _crash, _depth, options=CRASH, reads="text", streams=False),
    Method("crash-own", _crash, _depth, options=CRASH | OWN, reads="text", streams=False),
    Method("scaleot", _scaleot, _harmonizers, options=SCALEOT, reads="text", streams=False),
    Method(
        "scaleot-own", _scaleot, _harmonizers, options=SCALEOT | OWN, reads="text", streams=False
    ),
    Method("empty", _empty, _nothing, options={}, reads="weights"),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method by its name; `gradot` is the paper's formulas, `empty` the floor."""
