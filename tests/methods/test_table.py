import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.methods.options import (
    CompressionOptions,
    CrashOptions,
    DistillationOptions,
    ScaleOTOptions,
)
from gradot_jax.methods.table import METHODS

PRESETS = {
    "gradot-global": ("gradot", {"allocation": "global"}),
    "gradot-lambda": ("gradot", {"lambda_attention": 0.3, "lambda_mlp": 0.3}),
    "gradot-refit": ("gradot", {"compensate_mlp": "refit"}),
    "gradot-quadratic": (
        "gradot",
        {
            "attention_score": "quadratic",
            "channel_score": "token-fisher",
            "allocation": "global",
        },
    ),
    "gradot+": (
        "gradot",
        {
            "attention_basis": "whitened",
            "channel_score": "token-fisher",
            "allocation": "global",
        },
    ),
    "crash-own": ("crash", {"adapter": "own"}),
    "scaleot-own": ("scaleot", {"adapter": "own"}),
}
OF_EVERY_METHOD = {"method", "budget", "seed"}
FIELDS = {field.name for field in dataclasses.fields(CompressionOptions)} - OF_EVERY_METHOD
NESTED = {
    "distillation": DistillationOptions(steps=3),
    "crash": CrashOptions(share=False),
    "scaleot": ScaleOTOptions(steps=3),
}
BUDGETS = {"attention_budget": 0.6, "mlp_budget": 0.6}
"""The whole budget where nothing is asked for."""

WITH = {"whitened": {"attention_score": "l1"}, "quadratic": {"attention_basis": "svd"}}
"""The whitened basis brings its own score."""


def values(name):
    """Every value that some method has of its own for an option."""
    own = {method.options.get(name) for method in METHODS.values()} - {None}
    return own or {(NESTED | BUDGETS)[name]}


def but_for_the_method(options) -> dict:
    return dataclasses.asdict(options) | {"method": None}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_compresses_to_what_it_forecasts(name, six_layers):
    result, outlook = (run(name, budget=0.9) for run in (six_layers.compress, six_layers.forecast))
    assert METHODS[name].name == name == result.plan.method
    stored = list(result.emulator.stored_layers())
    assert len(stored) == len(result.plan.layers) == len(outlook.shapes)
    assert result.emulator.adapter.split.num_blocks == 2
    assert (outlook.trained > 0) == (name in ("offsite-tuning", "scaleot", "scaleot-own"))


def test_methods_and_options_are_known_without_jax():
    code = """
import sys
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.table import METHODS
for name in METHODS:
    CompressionOptions(method=name)
print(*sorted({"jax", "jaxlib", "flax", "optax"} & set(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == []


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_left_out_is_as_the_method_has_it(method):
    options = CompressionOptions(method=method.name)
    assert options.record is method
    for name in FIELDS - NESTED.keys():
        assert getattr(options, name) == method.options.get(name)
    assert method.options.keys() <= FIELDS


def test_presets_are_all_that_share_the_code_of_another():
    bases = {name: base for name, (base, _) in PRESETS.items()}
    first = {}
    for method in METHODS.values():
        base = first.setdefault(method.compress, method.name)
        assert bases.get(method.name, method.name) == base


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_base_with_the_options_spelled_out(preset, six_layers):
    base, spelled = PRESETS[preset]
    options = CompressionOptions(method=base, **spelled)
    assert but_for_the_method(CompressionOptions(method=preset)) == but_for_the_method(options)
    got = six_layers.compress(preset, budget=0.9)
    expected = six_layers.compress(base, budget=0.9, **spelled)
    assert dataclasses.replace(got.plan, method=base) == expected.plan
    assert got.calibration == expected.calibration
    jax.tree.map(np.testing.assert_array_equal, got.emulator, expected.emulator)
    jax.tree.map(np.testing.assert_array_equal, got.scores, expected.scores)


@pytest.mark.parametrize("preset", PRESETS)
def test_options_of_its_base_take_a_preset_back(preset):
    base, spelled = PRESETS[preset]
    own = METHODS[base].options
    for name in spelled:
        options = CompressionOptions(method=preset, **{name: own[name]})
        assert getattr(options, name) == own[name] != spelled[name]
        assert all(getattr(options, other) == spelled[other] for other in spelled if other != name)
    back = CompressionOptions(method=preset, **{name: own[name] for name in spelled})
    assert but_for_the_method(back) == but_for_the_method(CompressionOptions(method=base))


def test_an_allocation_that_is_asked_for_is_that_of_the_plan(six_layers):
    options = {"method": "gradot+", "budget": 0.5}
    uniform = six_layers.compress(**options, allocation="uniform").plan.emulator.shapes
    assert uniform == six_layers.forecast(**options, allocation="uniform").shapes
    assert six_layers.compress(**options).plan.emulator.shapes != uniform


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_that_a_method_does_not_read_are_refused_whatever_their_value(method):
    for name in FIELDS - method.options.keys():
        for value in values(name):
            with pytest.raises(InputError, match=f"{name} does nothing in the method") as error:
                CompressionOptions(method=method.name, **{name: value})
            readers = [other for other in METHODS if name in METHODS[other].options]
            assert str(error.value).endswith(", ".join(readers))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_that_a_method_reads_are_taken(method):
    for name in method.options:
        for value in values(name):
            options = CompressionOptions(method=method.name, **WITH.get(value, {}), **{name: value})
            assert getattr(options, name) == value
