import math

import pytest

from gradot_jax.comparison.statistics import estimate, paired_interval


def test_mean_and_standard_error_are_those_of_the_formula():
    mean, error, count = estimate([1.0, 2.0, 6.0])
    assert (mean, count) == (3.0, 3)
    # Deviations -2, -1, 3: sample variance 14 / 2, over 3 runs.
    assert error == pytest.approx(math.sqrt(7 / 3))


def test_one_run_has_no_error_and_no_interval():
    assert estimate([4.0]) == (4.0, None, 1)
    assert paired_interval([4.0]) == (4.0, None, None, 1)


def test_a_diverged_run_spoils_the_mean():
    mean, error, _ = estimate([1.0, math.nan])
    assert math.isnan(mean) and error is None


@pytest.mark.parametrize(("values", "quantile"), [([1.0, 3.0], 12.7062), ([1, 2, 6], 4.30265)])
def test_interval_reaches_students_quantile_of_the_table(values, quantile):
    _, error, _ = estimate(values)
    mean, low, high, _ = paired_interval(values)
    assert high - mean == pytest.approx(quantile * error, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
