"""What is compared: names for settings of the compression, readable without JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradot_jax.compression.options import (
    CompressionOptions,
    DistillationOptions,
    ScaleOTOptions,
    check_budget,
)
from gradot_jax.errors import InputError

BASELINE = "gradot"
"""The method that the others are paired with."""

FLOOR = "empty"
"""The method without a middle, which shows whether the middle matters."""

FULL, FULL_ALL = "full-finetune", "full-finetune-all"
REFERENCES = (FULL, FULL_ALL)
"""Training the adapter's blocks, and all blocks, of the full model: upper bounds."""

VARIANTS: dict[str, dict[str, Any]] = {
    "gradot": {"method": "gradot"},
    "gradot-global": {"method": "gradot", "allocation": "global"},
    "gradot-refit": {"method": "gradot", "compensate_mlp": "refit"},
    "gradot-quadratic": {
        "method": "gradot",
        "attention_score": "quadratic",
        "channel_score": "token-fisher",
        "allocation": "global",
    },
    "gradot+": {
        "method": "gradot",
        "attention_basis": "whitened",
        "channel_score": "token-fisher",
        "allocation": "global",
    },
    "magnitude": {"method": "magnitude"},
    "activation-svd": {"method": "activation-svd"},
    "random": {"method": "random"},
    "layer-drop": {"method": "layer-drop"},
    "offsite-tuning": {"method": "offsite-tuning"},
    "crash": {"method": "crash"},
    "crash-own": {"method": "crash", "adapter": "own"},
    "scaleot": {"method": "scaleot"},
    "scaleot-own": {"method": "scaleot", "adapter": "own"},
    "empty": {"method": "empty"},
}
"""Fields of `CompressionOptions` by name; `gradot` is the paper's formulas."""

_SAME_ON_EVERY_DRAW = {"magnitude", "layer-drop", "empty"}


class Subject(NamedTuple):
    """One compression, or one way of training the full model.

    Attributes:
        method: of `VARIANTS` or `REFERENCES`.
        budget: share of the middle's parameters to keep; None where there is no choice.
        draw: seed of the calibration text and of all that the method draws; None where the method
            reads none.
    """

    method: str
    budget: float | None = None
    draw: int | None = None

    @property
    def label(self) -> str:
        """A name for files and logs."""
        budget = "" if self.budget is None else f"-{self.budget:g}"
        return f"{self.method}{budget}" + (f"-draw{self.draw}" if self.draw else "")


def check_methods(names: Sequence[str]) -> None:
    """Raises InputError unless every name is known and none is given twice."""
    known = (*REFERENCES, *VARIANTS)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(
            f"methods: got {', '.join(names) or 'none'}; expected some of {', '.join(known)}, "
            "each once" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )


def subjects(
    methods: Sequence[str], budgets: Sequence[float], draws: Sequence[int]
) -> list[Subject]:
    """Every subject, the references first: all others are measured against them."""
    check_methods(methods)
    for budget in budgets:
        check_budget("budgets", budget)
    found = [Subject(name) for name in REFERENCES if name in methods]
    for name in (name for name in methods if name not in REFERENCES):
        fixed = VARIANTS[name]["method"] in _SAME_ON_EVERY_DRAW
        for budget in [None] if name == FLOOR else budgets:
            found += [Subject(name, budget, draw) for draw in ([None] if fixed else draws)]
    return found


def shortened(training: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """The same settings of the methods that train, for another number of steps.

    Args:
        training: see `variant_options`.
        steps: of each.
    """
    distillation = training.get("offsite-tuning", {}).get("distillation", DistillationOptions())
    scaleot = training.get("scaleot", {}).get("scaleot", ScaleOTOptions())
    warmup = max(min(distillation.warmup_steps, steps - 1), 0)
    distillation = dataclasses.replace(distillation, steps=steps, warmup_steps=warmup)
    return {
        "offsite-tuning": {"distillation": distillation},
        "scaleot": {"scaleot": dataclasses.replace(scaleot, steps=steps)},
    }


def variant_options(
    subject: Subject, training: Mapping[str, Mapping[str, Any]]
) -> CompressionOptions:
    """The options of a compression.

    Args:
        subject: no reference.
        training: fields by method, for those that train.
    """
    fields = dict(VARIANTS[subject.method])
    if subject.budget is not None:
        fields["budget"] = subject.budget
    return CompressionOptions(
        seed=subject.draw or 0, **training.get(fields["method"], {}), **fields
    )
