import json

import pytest

from gradot_jax.comparison.stages import Case, Plan, Stage, Unit, read_plan, shortened, single
from gradot_jax.errors import InputError
from gradot_jax.methods.options import DistillationOptions, ScaleOTOptions
from gradot_jax.methods.table import METHODS

TRAINING = {
    "distillation": DistillationOptions(steps=7),
    "scaleot": ScaleOTOptions(steps=9, harmonizer_rank=2),
}


def options_of(case, training=TRAINING, variants=None):
    stage = Stage(methods=(case.method,), budgets=(case.budget or 0.5,), tasks=("toy",))
    return Plan(stages=(stage,), variants=variants or {}).options(case, training)


def cases(methods, budgets, draws):
    return single(methods, budgets, ("toy",), draws=draws).cases


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_valid_options(name):
    options = options_of(Case(name, None if name == "empty" else 0.3, 1))
    assert (options.method, options.seed) == (name, 1)


def test_references_come_first_and_empty_has_no_budget():
    assert cases(("gradot", "empty", "full-finetune"), (0.6, 0.3), 1) == [
        Case("full-finetune"),
        Case("gradot", 0.6, 0),
        Case("gradot", 0.3, 0),
        Case("empty"),
    ]


def test_only_what_reads_more_than_weights_runs_on_every_draw():
    found = cases(("gradot", "magnitude", "random"), (0.3,), 2)
    assert [(case.method, case.draw) for case in found] == [
        ("gradot", 0),
        ("gradot", 1),
        ("magnitude", None),
        ("random", 0),
        ("random", 1),
    ]


def test_settings_of_training_reach_the_methods_that_read_them_alone():
    distilled = options_of(Case("offsite-tuning", 0.3, 0))
    assert distilled.distillation == TRAINING["distillation"]
    for name in ("scaleot", "scaleot-own"):
        assert options_of(Case(name, 0.3, 0)).scaleot == TRAINING["scaleot"]
    assert options_of(Case("gradot", 0.3, 0)) == options_of(Case("gradot", 0.3, 0), {})


def test_a_variant_has_its_own_options_with_the_budget_where_it_says():
    variants = {
        "drd": {"method": "gradot", "budget": 1.0, "attention_budget": "$budget", "mlp_budget": 1},
        "whole-rank": {"method": "scaleot", "scaleot": {"rank_removed": 0.0}},
    }
    drd = options_of(Case("drd", 0.6, 0), variants=variants)
    assert (drd.method, drd.budget, drd.attention_budget, drd.mlp_budget) == ("gradot", 1, 0.6, 1)
    scaleot = options_of(Case("whole-rank", 0.6, 0), variants=variants)
    assert (scaleot.budget, scaleot.scaleot.rank_removed, scaleot.scaleot.steps) == (0.6, 0, 9)


def test_what_stages_share_is_run_once_and_in_the_order_of_the_first():
    first = Stage(methods=("empty", "gradot"), budgets=(0.6,), tasks=("a",))
    second = Stage(methods=("gradot",), budgets=(0.3, 0.6), tasks=("a", "b"), seeds=2)
    units = Plan(stages=(first, second)).units
    assert units[:2] == [Unit(Case("empty"), "a", 0), Unit(Case("gradot", 0.6, 0), "a", 0)]
    assert len(units) == len(set(units)) == 2 + 2 * 2 * 2 - 1
    assert units[2:4] == [Unit(Case("gradot", 0.3, 0), "a", seed) for seed in (0, 1)]


def test_a_plan_is_read_from_its_file(tmp_path):
    path = tmp_path / "plan.json"
    stage = {"methods": ["gradot", "dense"], "budgets": [0.6], "tasks": ["city"], "seeds": 3}
    variants = {"dense": {"method": "gradot", "attention_budget": 1.0}}
    path.write_text(json.dumps({"stages": [stage], "variants": variants}))
    plan = read_plan(path)
    assert plan.tasks == ("city",) and plan.system("dense") == "gradot"
    assert len(plan.units) == 6


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "expected stages"),
        ({"stages": [], "more": 1}, "expected stages"),
        ({"stages": []}, "none given"),
        ({"stages": [{"methods": ["gradot"]}]}, "missing"),
        ({"stages": [7]}, "no plan"),
        ({"stages": [{"methods": ["sparse"], "budgets": [0.6], "tasks": ["a"]}]}, "sparse"),
        ({"stages": [{"methods": ["gradot"], "budgets": [2], "tasks": ["a"]}]}, "budgets"),
        ({"stages": [], "variants": {"gradot": {}}}, "its meaning already"),
        ({"stages": [], "variants": {"../evil": {"method": "gradot"}}}, "is no name"),
        (
            {"stages": [{"methods": ["gradot"], "budgets": [1], "tasks": ["a"], "seeds": 10**11}]},
            "at most 1000",
        ),
    ],
)
def test_what_is_no_plan_is_refused_with_its_file(tmp_path, plan, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(InputError, match=message) as refused:
        read_plan(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparse"}, "unknown method 'sparse'"),
        ({"method": "gradot", "lambda": 1}, "unknown option 'lambda'"),
        ({"method": "layer-drop", "lambda_mlp": 1.0}, "does nothing in the method layer-drop"),
        ({"method": "scaleot", "scaleot": {"depth": 1}}, "scaleot: "),
    ],
)
def test_what_is_no_variant_is_refused_before_anything_runs(options, message):
    stage = Stage(methods=("mine",), budgets=(0.6,), tasks=("toy",))
    with pytest.raises(InputError, match=message):
        Plan(stages=(stage,), variants={"mine": options})


def test_shortened_training_keeps_all_but_its_steps():
    short = shortened({"scaleot": TRAINING["scaleot"]}, 5)
    assert short["scaleot"] == ScaleOTOptions(steps=5, harmonizer_rank=2)
    # No warm-up is longer than the run.
    assert short["distillation"] == DistillationOptions(steps=5, warmup_steps=4)
    assert shortened({}, 1)["distillation"].warmup_steps == 0


@pytest.mark.parametrize("names", [("gradot", "sparse"), (), ("gradot", "gradot")])
def test_unknown_missing_and_repeated_methods_are_refused(names):
    with pytest.raises(InputError, match="expected some"):
        single(names, (0.5,), ("toy",))


@pytest.mark.parametrize(
    "changes", [{"seeds": 0}, {"rates": (0.0,)}, {"budgets": (0.6, 0.6)}, {"budgets": (1.5,)}]
)
def test_plans_out_of_range_are_refused(changes):
    fields = {"methods": ("gradot",), "budgets": (0.6,), "tasks": ("toy",)}
    with pytest.raises(InputError):
        single(**(fields | changes))
