import pytest

from gradot_jax.comparison.variants import Case, cases, check_methods, same_system, shortened
from gradot_jax.comparison.variants import variant_options as options_of
from gradot_jax.errors import InputError
from gradot_jax.methods.options import DistillationOptions, ScaleOTOptions
from gradot_jax.methods.table import METHODS

TRAINING = {
    "distillation": DistillationOptions(steps=7),
    "scaleot": ScaleOTOptions(steps=9, harmonizer_rank=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_valid_options(name):
    options = options_of(Case(name, None if name == "empty" else 0.3, 1), TRAINING)
    assert (options.method, options.seed) == (name, 1)


def test_references_come_first_and_empty_has_no_budget():
    found = cases(("gradot", "empty", "full-finetune"), (0.6, 0.3), (0,))
    assert found == [
        Case("full-finetune"),
        Case("gradot", 0.6, 0),
        Case("gradot", 0.3, 0),
        Case("empty"),
    ]


def test_only_what_reads_more_than_weights_runs_on_every_draw():
    found = cases(("gradot", "magnitude", "random"), (0.3,), (0, 1))
    assert [(case.method, case.draw) for case in found] == [
        ("gradot", 0),
        ("gradot", 1),
        ("magnitude", None),
        ("random", 0),
        ("random", 1),
    ]


def test_settings_of_training_reach_the_methods_that_read_them_alone():
    distilled = options_of(Case("offsite-tuning", 0.3, 0), TRAINING)
    assert distilled.distillation == TRAINING["distillation"]
    for name in ("scaleot", "scaleot-own"):
        assert options_of(Case(name, 0.3, 0), TRAINING).scaleot == TRAINING["scaleot"]
    assert options_of(Case("gradot", 0.3, 0), TRAINING) == options_of(Case("gradot", 0.3, 0), {})


def test_shortened_training_keeps_all_but_its_steps():
    short = shortened({"scaleot": TRAINING["scaleot"]}, 5)
    assert short["scaleot"] == ScaleOTOptions(steps=5, harmonizer_rank=2)
    # No warm-up is longer than the run.
    assert short["distillation"] == DistillationOptions(steps=5, warmup_steps=4)
    assert shortened({}, 1)["distillation"].warmup_steps == 0


def test_variants_of_a_system_are_told_from_other_systems():
    assert all(same_system(name, "gradot") == name.startswith("gradot") for name in METHODS)
    assert same_system("crash", "crash-own") and not same_system("crash", "scaleot")
    assert same_system("forgotten", "forgotten") and not same_system("forgotten", "gradot")


@pytest.mark.parametrize("names", [("gradot", "sparse"), (), ("gradot", "gradot")])
def test_unknown_missing_and_repeated_methods_are_refused(names):
    with pytest.raises(InputError, match="expected some of"):
        check_methods(names)


def test_a_budget_above_one_is_refused():
    with pytest.raises(InputError, match="budgets"):
        cases(("gradot",), (1.5,), (0,))
