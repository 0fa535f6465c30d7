import math

import pytest

from gradot_jax.comparison.report import report
from gradot_jax.comparison.summary import (
    estimate,
    mean_interval,
    paired_differences,
    predictions,
    same_system,
    select,
    summarise,
    validity,
)
from gradot_jax.methods.table import METHODS

TASK = {"label": "toy", "metric": "score", "higher_is_better": True}


def make_result(rows, *, higher=True, cases=(), compressions=(), gain=5, loss=5):
    task = {**TASK, "higher_is_better": higher, "validity": {"gain": gain, "loss": loss}}
    rows_planned = [*rows, *cases]
    planned = [{"task": "toy", **{k: r[k] for k in ("method", "budget")}} for r in rows_planned]
    return {
        "tasks": {"toy": task},
        "planned": planned,
        "systems": {r["method"]: r["method"] for r in rows_planned},
        "codes": {"c0de": len(rows)},
        "missing": len(cases),
        "again": [],
        "rows": rows,
        "compressions": list(compressions),
        "settings": {"draws": sorted({row["draw"] or 0 for row in rows})},
        "failures": {},
    }


def row(method, plug_in, *, seed=0, draw=0, budget=0.3, emulator=10.0, full=50.0, zero=20.0):
    values = {
        "zero_shot": zero,
        "full_finetuned": full,
        "emulator_zero_shot": 5.0 + (draw or 0),
        "emulator_finetuned": emulator,
        "plug_in": plug_in,
        "delta": plug_in - emulator,
    }
    row = {"task": "toy", "method": method, "budget": budget, "seed": seed, "draw": draw}
    row |= {"learning_rate": 1e-3, "trials": {}, "bracketed": False}
    return row | {name: {"score": v} for name, v in values.items()}


def test_runs_on_one_draw_are_one_observation_and_repeated_measurements_count_once():
    rows = [row("gradot", 40.0 + s + 2 * d, seed=s, draw=d) for s in (0, 1) for d in (0, 1)]
    (summary,) = summarise(make_result(rows))
    assert summary["runs"] == 4
    # Means of the draws: 40.5 and 42.5.
    assert summary["plug_in"] == (41.5, pytest.approx(1.0), 2)
    assert summary["zero_shot"] == (20.0, None, 1)
    assert summary["full_finetuned"].count == 2
    assert summary["emulator_zero_shot"] == (5.5, pytest.approx(0.5), 2)


def test_differences_are_paired_by_seed_and_have_the_interval_of_the_pairs():
    rows = [row("gradot", v, seed=s) for s, v in enumerate((40.0, 50.0, 60.0))]
    others = ((2, 58.0), (0, 39.0), (1, 47.0))
    rows += [row("magnitude", v, seed=s, draw=None) for s, v in others]
    gap = paired_differences(make_result(rows))[0]["plug_in"]
    # Differences -1, -3, -2: deviation 1, over the root of 3 pairs, times t = 4.30265.
    assert (gap.mean, gap.count) == (-2.0, 3)
    assert (gap.low, gap.high) == pytest.approx(
        (-2 - 4.30265 / 3**0.5, -2 + 4.30265 / 3**0.5), rel=1e-5
    )


def test_a_positive_difference_is_better_where_lower_is_better():
    rows = [row("gradot", 40.0), row("magnitude", 43.0, draw=None)]
    (pair,) = paired_differences(make_result(rows, higher=False))
    assert pair["plug_in"].mean == -3.0


def test_what_was_not_run_is_printed_as_such_and_single_runs_have_no_error():
    missing = {"method": "crash", "budget": 0.3, "draw": 0}
    text = report(make_result([row("gradot", 41.25)], cases=[missing]))
    ours, area = (line for line in text.splitlines() if line.startswith("| gradot"))
    assert "41.2" in ours and "±" not in ours and "[" not in area
    assert "Not run: crash 0.3." in text


def test_diverged_runs_are_printed_as_such():
    assert "diverged" in report(make_result([row("gradot", math.nan)]))


def test_rates_at_an_edge_are_named():
    searched = {"trials": {"1": 2.0, "2": 1.0}}
    inner = row("gradot", 41.0) | searched | {"bracketed": True}
    edge = row("magnitude", 40.0) | searched
    assert "lies between two" in report(make_result([inner]))
    text = report(make_result([inner, edge]))
    assert "at an edge of those that were tried: magnitude 0.3." in text


def test_variants_of_a_system_are_told_from_other_systems():
    result = {"systems": {"drd": "gradot"} | {name: name for name in METHODS}}
    for name in METHODS:
        assert same_system(result, name, "gradot") == name.startswith("gradot")
        assert same_system(result, name, "drd") == name.startswith("gradot")
    assert same_system(result, "crash", "crash-own")
    assert not same_system(result, "crash", "scaleot")
    assert same_system(result, "forgotten", "forgotten")
    assert not same_system(result, "forgotten", "gradot")


def test_with_several_draws_pairs_are_averaged_within_a_draw():
    rows = [row("gradot", 40.0 + 2 * d, seed=s, draw=d) for s in range(3) for d in (0, 1)]
    rows += [row("magnitude", 41.0 + s, seed=s, draw=None) for s in range(3)]
    gap = paired_differences(make_result(rows))[0]["plug_in"]
    # Means over seeds: 2 on the first draw, 0 on the second; the deviation of the mean is 1.
    assert (gap.mean, gap.count) == (1.0, 2)
    assert (gap.low, gap.high) == pytest.approx((1 - 12.7062, 1 + 12.7062), rel=1e-5)


def test_runs_that_tuned_nothing_are_named():
    untouched = {**row("gradot", 41.0), "best_step": 0}
    assert "as it was shipped: gradot 0.3 (1 of 1)" in report(make_result([untouched]))


def test_validity_holds_where_it_should():
    rows = [row("gradot", 40.0 + s, seed=s, full=50.0 + s) for s in range(3)]
    rows += [row("magnitude", 30.0 + 2 * s, seed=s, draw=None, full=50.0 + s) for s in range(3)]
    rows += [row("empty", 12.0, seed=s, draw=None, budget=None) for s in range(3)]
    check = validity(make_result(rows))["toy"]
    assert check["V1"]["holds"] and check["V2"]["holds"]
    # Differences -10, -9, -8 with a reach of 2.5.
    assert check["V3"]["holds"] is True
    assert validity(make_result(rows[::3]))["toy"]["V3"]["holds"] is None


def test_variants_of_gradot_and_random_selection_are_left_out_of_validity():
    rows = [row("gradot", 40.0 + s, seed=s) for s in range(3)]
    rows += [row("gradot+", 41.0 - s, seed=s) for s in range(3)]
    rows += [row("random", 9.0, seed=s) for s in range(3)]
    rows += [row("magnitude", 30.0 + s, seed=s, draw=None) for s in range(3)]
    rows += [row("empty", 12.0, draw=None, budget=None)]
    assert validity(make_result(rows))["toy"]["V3"]["holds"] is True


def test_validity_fails_where_it_should():
    rows = [row("gradot", 9.0 + s, seed=s, full=21.0) for s in range(2)]
    rows += [row("magnitude", 11.0 - s, seed=s, draw=None, full=21.0) for s in range(2)]
    rows += [row("empty", 12.0, draw=None, budget=None, full=21.0, emulator=20.0)]
    check = validity(make_result(rows))["toy"]
    assert not any(check[name]["holds"] for name in ("V1", "V2", "V3"))
    assert check["V3"]["delta_not_positive"] == ["gradot 0.3"]
    assert check["V3"]["level_with_gradot"] == ["magnitude 0.3"]


def test_without_the_empty_middle_nothing_is_said_of_validity():
    assert validity(make_result([row("gradot", 40.0)])) == {}


def test_selection_is_by_every_field():
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    assert select(rows, a=1, b=3) == rows[1:]


def test_mean_and_standard_error_are_those_of_the_formula():
    mean, error, count = estimate([1.0, 2.0, 6.0])
    assert (mean, count) == (3.0, 3)
    # Deviations -2, -1, 3: sample variance 14 / 2, over 3 runs.
    assert error == pytest.approx(math.sqrt(7 / 3))


def test_one_run_has_no_error_and_no_interval():
    assert estimate([4.0]) == (4.0, None, 1)
    assert mean_interval([4.0]) == (4.0, None, None, 1)


def test_a_diverged_run_spoils_the_mean():
    mean, error, _ = estimate([1.0, math.nan])
    assert math.isnan(mean) and error is None


@pytest.mark.parametrize(("values", "quantile"), [([1.0, 3.0], 12.7062), ([1, 2, 6], 4.30265)])
def test_interval_reaches_students_quantile_of_the_table(values, quantile):
    interval = mean_interval(values)
    reach = interval.high - interval.mean
    assert reach == pytest.approx(quantile * estimate(values).error, rel=1e-5)
    assert interval.mean - interval.low == pytest.approx(reach)


def test_what_is_known_before_ranks_plug_ins_by_spearman():
    worth = [10.0, 20.0, 30.0, 40.0, 50.0]
    rows = [row(f"m{i}", value) for i, value in enumerate(worth)]
    gaps = [3.0, 2.0, 2.5, 1.0, 0.5]
    compressions = [
        {"method": f"m{i}", "budget": 0.3, "draw": 0, "loss_gap": gap} for i, gap in enumerate(gaps)
    ]
    (found,) = predictions(make_result(rows, compressions=compressions))
    # Ranks 1 3 2 4 5 against 1 2 3 4 5: 1 - 6 * 2 / (5 * 24).
    assert found["rho"] == pytest.approx(0.9)
    assert (found["quantity"], found["rho_nats"], found["emulators"]) == ("loss_gap", None, 5)
    assert not predictions(make_result(rows[:4], compressions=compressions[:4]))
