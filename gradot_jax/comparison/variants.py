"""What is compared: methods at budgets, and the full model; readable without JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradot_jax.compression.budget import check_budget
from gradot_jax.errors import InputError
from gradot_jax.methods.options import CompressionOptions, DistillationOptions, ScaleOTOptions
from gradot_jax.methods.table import METHODS

BASELINE = "gradot"
"""The method that the others are paired with."""

FLOOR = "empty"
"""The method without a middle, which shows whether the middle matters."""

FULL, FULL_ALL = "full-finetune", "full-finetune-all"
REFERENCES = (FULL, FULL_ALL)
"""Training the adapter's blocks, and all blocks, of the full model: upper bounds."""


class Case(NamedTuple):
    """One compression, or one way of training the full model.

    Attributes:
        method: of `METHODS` or `REFERENCES`.
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
    known = (*REFERENCES, *METHODS)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(
            f"methods: got {', '.join(names) or 'none'}; expected some of {', '.join(known)}, "
            "each once" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )


def cases(methods: Sequence[str], budgets: Sequence[float], draws: Sequence[int]) -> list[Case]:
    """Every case, the references first: all others are measured against them.

    Args:
        methods: of `METHODS` and `REFERENCES`.
        budgets: for all of them but the references and the floor.
        draws: seeds of the calibration text; a method whose result is the same on every draw runs
            on none.

    Raises:
        InputError: for an unknown or repeated method, or a budget out of range.
    """
    check_methods(methods)
    for budget in budgets:
        check_budget("budgets", budget)
    found = [Case(name) for name in REFERENCES if name in methods]
    for name in (name for name in methods if name not in REFERENCES):
        seeds = [None] if METHODS[name].reads == "weights" else draws
        for budget in [None] if name == FLOOR else budgets:
            found += [Case(name, budget, draw) for draw in seeds]
    return found


def same_system(method: str, other: str) -> bool:
    """Whether two methods are settings of one, as `gradot` and `gradot+` are."""
    known = method in METHODS and other in METHODS
    return METHODS[method].compress is METHODS[other].compress if known else method == other


def shortened(training: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same settings of the methods that train, for another number of steps of each."""
    distillation = training.get("distillation", DistillationOptions())
    warmup = max(min(distillation.warmup_steps, steps - 1), 0)
    scaleot = training.get("scaleot", ScaleOTOptions())
    return {
        **training,
        "distillation": dataclasses.replace(distillation, steps=steps, warmup_steps=warmup),
        "scaleot": dataclasses.replace(scaleot, steps=steps),
    }


def variant_options(case: Case, training: Mapping[str, Any]) -> CompressionOptions:
    """The options of a compression, with those fields of `training` that its method reads."""
    read = METHODS[case.method].options
    fields = {name: value for name, value in training.items() if name in read}
    if case.budget is not None:
        fields["budget"] = case.budget
    return CompressionOptions(method=case.method, seed=case.draw or 0, **fields)
