import pytest

from gradot_jax.comparison.variants import VARIANTS, Subject, check_methods, subjects
from gradot_jax.comparison.variants import variant_options as options_of
from gradot_jax.compression.options import DistillationOptions
from gradot_jax.errors import InputError


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_valid_options(name):
    options = options_of(Subject(name, None if name == "empty" else 0.3, 1), {})
    assert options.method == VARIANTS[name]["method"]


def test_references_come_first_and_empty_has_no_budget():
    found = subjects(("gradot", "empty", "full-finetune"), (0.6, 0.3), (0,))
    assert found == [
        Subject("full-finetune"),
        Subject("gradot", 0.6, 0),
        Subject("gradot", 0.3, 0),
        Subject("empty"),
    ]


def test_only_what_reads_calibration_text_runs_on_every_draw():
    found = subjects(("gradot", "magnitude"), (0.3,), (0, 1))
    assert [(s.method, s.draw) for s in found] == [
        ("gradot", 0),
        ("gradot", 1),
        ("magnitude", None),
    ]


def test_settings_of_training_reach_the_method_that_trains_alone():
    distillation = DistillationOptions(steps=7)
    training = {"offsite-tuning": {"distillation": distillation}}
    assert options_of(Subject("offsite-tuning", 0.3, 0), training).distillation == distillation
    assert options_of(Subject("gradot", 0.3, 0), training).distillation == DistillationOptions()


@pytest.mark.parametrize("names", [("gradot", "sparse"), (), ("gradot", "gradot")])
def test_unknown_missing_and_repeated_methods_are_refused(names):
    with pytest.raises(InputError, match="expected some of"):
        check_methods(names)


def test_a_budget_above_one_is_refused():
    with pytest.raises(InputError, match="budgets"):
        subjects(("gradot",), (1.5,), (0,))
