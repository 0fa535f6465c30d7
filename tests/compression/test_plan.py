import dataclasses
import json

import pytest

from gradot_jax.compression.plan import (
    EmulatorSpec,
    HarmonizerPlan,
    HarmonizerShape,
    LayerPlan,
    LayerShape,
    Plan,
)
from gradot_jax.errors import InputError

PLAN = Plan(
    method="gradot",
    attention_budget=0.5,
    mlp_budget=0.6,
    num_bottom=2,
    num_top=1,
    inner=(5,),
    layers=(
        LayerPlan(layer=2, components=(("q_proj", (0, 3)), ("k_proj", None)), channels=(1, 4, 5)),
        LayerPlan(layer=4, components=(("q_proj", (1,)), ("k_proj", (0,))), channels=(0,)),
        HarmonizerPlan(layer=6, rank=3),
    ),
    layer_map=(0, 0, None, 1, 2),
)


def test_json_round_trip_gives_an_equal_plan_with_an_equal_hash():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN and hash(again) == hash(PLAN) and again.emulator == PLAN.emulator
    empty = dataclasses.replace(PLAN, layers=(), inner=(), layer_map=())
    assert Plan.from_json(empty.to_json()) == empty


def test_what_ships_counts_and_does_not_name_what_was_kept():
    shapes = (
        LayerShape(ranks=(("q_proj", 2), ("k_proj", None)), num_channels=3),
        LayerShape(ranks=(("q_proj", 1), ("k_proj", 1)), num_channels=1),
        HarmonizerShape(rank=3),
    )
    assert PLAN.emulator == EmulatorSpec(
        method="gradot",
        attention_budget=0.5,
        mlp_budget=0.6,
        shapes=shapes,
        layer_map=(0, 0, None, 1, 2),
    )
    # A plan that keeps as much elsewhere ships as the same.
    elsewhere = LayerPlan(
        layer=3, components=(("q_proj", (1, 2)), ("k_proj", None)), channels=(0, 2, 3)
    )
    moved = dataclasses.replace(PLAN, layers=(elsewhere, *PLAN.layers[1:]))
    assert moved.emulator == PLAN.emulator


def altered(change) -> str:
    values = json.loads(PLAN.to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"layers": []}',
        altered(lambda v: v.pop("method")),
        altered(lambda v: v.update(extra=1)),
        altered(lambda v: v.update(method=None)),
        altered(lambda v: v.update(layers={"0": 1})),
        altered(lambda v: v.update(num_bottom=-1)),
        altered(lambda v: v.update(num_top=1.5)),
        altered(lambda v: v.update(attention_budget=0)),
        altered(lambda v: v.update(mlp_budget="0.5")),
        altered(lambda v: v["layers"].reverse()),
        altered(lambda v: v.update(inner=[5, 4])),
        altered(lambda v: v.update(inner=5)),
        altered(lambda v: v.pop("layer_map")),
        altered(lambda v: v.update(layer_map=[0, 3])),
        altered(lambda v: v.update(layer_map=[0, "1"])),
        altered(lambda v: v["layers"][2].update(rank=-1)),
        altered(lambda v: v["layers"][2].update(extra=1)),
        altered(lambda v: v["layers"][0].update(extra=1)),
        altered(lambda v: v["layers"][0].update(layer="2")),
        altered(lambda v: v["layers"][0].update(components=[])),
        altered(lambda v: v["layers"][0]["components"].update(q_proj="01")),
        altered(lambda v: v["layers"][0]["components"].update(q_proj=[3, 0])),
        altered(lambda v: v["layers"][0].update(channels="145")),
        altered(lambda v: v["layers"][0].update(channels=[1, 1])),
        altered(lambda v: v["layers"][0].update(channels=[0.0])),
        altered(lambda v: v["layers"][0].update(channels=[-1, 2])),
    ],
)
def test_junk_is_refused(text):
    with pytest.raises(InputError, match="not a compression plan"):
        Plan.from_json(text)
