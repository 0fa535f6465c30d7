"""What is compared, and in which order: readable without JAX, as JSON too.

A plan is a list of stages, the most urgent first. What two stages share is run once.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradot_jax.compression.budget import check_budget
from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import read_json
from gradot_jax.methods.options import CompressionOptions, DistillationOptions, ScaleOTOptions
from gradot_jax.methods.table import METHODS
from gradot_jax.training.rate import check_rates

BASELINE = "gradot"
"""The method that the others are paired with."""

EMPTY = "empty"
"""The method without a middle, which shows whether the middle matters."""

FULL, FULL_ALL = "full-finetune", "full-finetune-all"
REFERENCES = (FULL, FULL_ALL)
"""Training the adapter's blocks, and all blocks, of the full model: upper bounds."""

THE_BUDGET = "$budget"
"""Stands in the options of a variant for the budget of the row."""

RATES = (1.0, 2.0)
"""Factors on a task's learning rate that a search begins with, see `training.rate`."""

MOST_RUNS = 1000
"""Seeds, or draws, of a stage."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,59}")

Variants = Mapping[str, Mapping[str, Any]]


class Case(NamedTuple):
    """One compression, or one way of training the full model.

    Attributes:
        method: of `METHODS`, `REFERENCES` or the plan's variants.
        budget: share of the middle's parameters to keep; None where there is no choice.
        draw: seed of the calibration text and of all that the method draws; None where the method
            reads none.
    """

    method: str
    budget: float | None = None
    draw: int | None = None

    @property
    def label(self) -> str:
        """A name for logs."""
        budget = "" if self.budget is None else f"-{self.budget:g}"
        return f"{self.method}{budget}" + (f"-draw{self.draw}" if self.draw else "")


class Unit(NamedTuple):
    """One fine-tuning with its measurements.

    Attributes:
        case: what is tuned.
        task: name.
        seed: of the order of the examples.
    """

    case: Case
    task: str
    seed: int

    @property
    def group(self) -> str:
        """What shares the choice of a rate, and is left to one process."""
        return f"{self.case.method}-{self.case.budget}-{self.task}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A full grid.

    Attributes:
        methods: of `METHODS`, `REFERENCES` and the plan's variants.
        budgets: shares of the middle's parameters to keep.
        tasks: names.
        seeds: how many, from 0.
        draws: of calibration text, how many, from 0.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    tasks: tuple[str, ...]
    seeds: int = 1
    draws: int = 1

    def __post_init__(self) -> None:
        """Checks ranges; raises InputError."""
        for name in ("methods", "budgets", "tasks"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: expected some, each once, got {list(values)}")
        for budget in self.budgets:
            check_budget("budgets", budget)
        # Equal cells have equal settings: 1 and 1.0 are one budget.
        object.__setattr__(self, "budgets", tuple(map(float, self.budgets)))
        for name in ("seeds", "draws"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST_RUNS:
                raise InputError(
                    f"{name} must be a whole number, at least 1 and at most {MOST_RUNS}, got "
                    f"{value!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, the most urgent first.

    Attributes:
        stages: in their order.
        variants: options of `CompressionOptions` by a name of their own; `$budget` among them is
            the row's budget, which is otherwise the option `budget`.
        rates: factors on each task's learning rate to begin a search with; a single one is taken.
    """

    stages: tuple[Stage, ...]
    variants: Variants = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = RATES

    def __post_init__(self) -> None:
        """Checks names and options; raises InputError."""
        check_rates(self.rates)
        object.__setattr__(self, "rates", tuple(map(float, self.rates)))
        for name in self.variants:
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"variants: {name!r:.80} is no name; expected at most 60 letters, digits, +, "
                    "., _ and -"
                )
        known = (*REFERENCES, *METHODS)
        if taken := [name for name in self.variants if name in known]:
            raise InputError(f"variants: {', '.join(taken)} has its meaning already")
        for name in self.variants:
            if self.system(name) not in METHODS:
                raise InputError(f"variant {name}: unknown method {self.system(name)!r}")
        names = dict.fromkeys(name for stage in self.stages for name in stage.methods)
        unknown = [name for name in names if name not in (*known, *self.variants)]
        if unknown or not names:
            raise InputError(
                f"methods: unknown: {', '.join(unknown) or 'none given'}; expected some of "
                f"{', '.join((*known, *self.variants))}"
            )
        for case in self.cases:
            if case.method in self.variants:
                self.options(case, {})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of all stages."""
        return tuple(dict.fromkeys(task for stage in self.stages for task in stage.tasks))

    @property
    def cases(self) -> list[Case]:
        """Every case once, the references first: all others are measured against them."""
        found = dict.fromkeys(case for stage in self.stages for case in self._cases(stage))
        # Each stage has its references first; so has the whole.
        return sorted(found, key=lambda case: case.method not in REFERENCES)

    @property
    def units(self) -> list[Unit]:
        """Every unit once, in the order in which they run: those of a case beside each other."""
        return list(dict.fromkeys(unit for stage in self.stages for unit in self._units(stage)))

    def system(self, method: str) -> str:
        """The method of `METHODS` that a name stands for; a reference stands for itself."""
        return str(self.variants.get(method, {}).get("method", method))

    def options(self, case: Case, training: Mapping[str, Any]) -> CompressionOptions:
        """The options of a compression, with those fields of `training` that its method reads.

        Raises:
            InputError: for options that the method has not, or that are out of range.
        """
        own = dict(self.variants.get(case.method, {}))
        method = str(own.pop("method", case.method))
        read = METHODS[method].options
        fields = {name: value for name, value in training.items() if name in read}
        if case.budget is not None:
            fields["budget"] = case.budget
        known = {field.name: field for field in dataclasses.fields(CompressionOptions)}
        for name, value in own.items():
            if name not in known:
                raise InputError(f"variant {case.method}: unknown option {name!r}")
            if isinstance(value, Mapping):
                base = fields.get(name, known[name].default)
                try:
                    value = dataclasses.replace(base, **value)
                except TypeError as error:
                    raise InputError(f"variant {case.method}: {name}: {error}") from None
            fields[name] = case.budget if value == THE_BUDGET else value
        return CompressionOptions(method=method, seed=case.draw or 0, **fields)

    def _cases(self, stage: Stage) -> Iterator[Case]:
        for name in sorted(stage.methods, key=lambda name: name not in REFERENCES):
            if name in REFERENCES:
                yield Case(name)
                continue
            system = METHODS[self.system(name)]
            draws = [None] if system.reads == "weights" else range(stage.draws)
            for budget in [None] if system.name == EMPTY else stage.budgets:
                yield from (Case(name, budget, draw) for draw in draws)

    def _units(self, stage: Stage) -> Iterator[Unit]:
        for case in self._cases(stage):
            for task in stage.tasks:
                yield from (Unit(case, task, seed) for seed in range(stage.seeds))


def single(
    methods: Sequence[str],
    budgets: Sequence[float],
    tasks: Sequence[str],
    *,
    seeds: int = 1,
    draws: int = 1,
    rates: Sequence[float] = RATES,
) -> Plan:
    """A plan of one stage; raises InputError."""
    stage = Stage(
        methods=tuple(methods), budgets=tuple(budgets), tasks=tuple(tasks), seeds=seeds, draws=draws
    )
    return Plan(stages=(stage,), rates=tuple(rates))


def read_plan(path: Path) -> Plan:
    """Reads a plan: an object with `stages`, and `variants` and `rates` where they are wanted.

    Raises:
        InputError: when it is malformed.
    """
    values = read_json(path)
    fields = {field.name for field in dataclasses.fields(Plan)}
    if not isinstance(values, dict) or not {"stages"} <= values.keys() <= fields:
        raise InputError(f"{path}: expected stages, and perhaps rates and variants")
    try:
        return Plan(
            stages=tuple(_stage(**stage) for stage in values["stages"]),
            variants=values.get("variants", {}),
            rates=tuple(values.get("rates", RATES)),
        )
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: no plan of a comparison: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _stage(*, methods: list, budgets: list, tasks: list, seeds: int = 1, draws: int = 1) -> Stage:
    lists = {"methods": tuple(methods), "budgets": tuple(budgets), "tasks": tuple(tasks)}
    return Stage(**lists, seeds=seeds, draws=draws)


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
