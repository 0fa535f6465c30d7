"""The model families that are read, and the choice among them by `config.json`."""

from typing import Any

from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.llama import LLAMA
from gradot_jax.models.opt import OPT

FAMILIES = (OPT, LLAMA)


def read_config(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The configuration of a model of whatever family, from the contents of a `config.json`.

    Raises:
        InputError: for a family that is not read, or a value of the wrong type or range.
    """
    model_type = values.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.read_config(values, where)
    known = ", ".join(repr(name) for family in FAMILIES for name in family.model_types)
    raise InputError(f"{where}: model_type is {model_type!r:.80}, expected {known}")
