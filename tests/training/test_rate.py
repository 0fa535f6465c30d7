import math

import pytest

from gradot_jax.errors import InputError
from gradot_jax.training.rate import search_rate


def watched(loss):
    tried = []

    def run(rate):
        tried.append(rate)
        return loss(rate), f"run at {rate}"

    return run, tried


@pytest.mark.parametrize(
    ("optimum", "tries"), [(1, [1, 2, 0.5]), (2, [1, 2, 4]), (9, [1, 2, 4, 8, 16]), (0.25, None)]
)
def test_the_best_rate_lies_between_two_that_are_no_better(optimum, tries):
    run, tried = watched(lambda rate: abs(math.log(rate / optimum)))
    found = search_rate(run, (1.0, 2.0))
    assert found.bracketed
    assert found.losses.keys() == set(tried)
    assert min(tried) < found.rate < max(tried)
    assert found.losses[found.rate] == min(found.losses.values())
    assert found.best == f"run at {found.rate}"
    assert tries is None or tried == tries


def test_a_series_goes_on_by_its_outermost_ratio():
    run, tried = watched(lambda rate: -rate if rate < 50 else 0)
    assert search_rate(run, (0.2, 1.0)).rate == 25
    assert tried == [0.2, 1, 5, 25, 125]


def test_rates_that_diverge_bracket_from_above():
    run, _ = watched(lambda rate: math.inf if rate > 2 else -rate)
    found = search_rate(run, (1.0, 2.0))
    assert (found.rate, found.bracketed, found.losses[4.0]) == (2.0, True, math.inf)


def test_where_nothing_trains_the_way_is_down():
    run, tried = watched(lambda rate: math.inf if rate > 0.3 else 1.0 - rate)
    found = search_rate(run, (1.0, 2.0))
    assert (found.rate, found.bracketed, found.best) == (0.25, True, "run at 0.25")
    assert tried == [1, 2, 0.5, 0.25, 0.125]
    nothing = search_rate(lambda rate: (math.inf, None), (1.0, 2.0), most=4)
    assert (nothing.best, nothing.bracketed, min(nothing.losses)) == (None, False, 0.25)


def test_rates_that_leave_the_weights_as_they_were_point_down():
    run, _ = watched(lambda rate: 1.0 if rate >= 0.2 else 0.6 + rate)
    found = search_rate(run, (1.0, 2.0), most=6)
    assert (found.rate, found.bracketed, found.best) == (0.0625, False, "run at 0.0625")
    valley, _ = watched(lambda rate: 1.0 if rate >= 0.2 else abs(rate - 0.1))
    assert search_rate(valley, (1.0, 2.0))[::2] == (0.125, True)


def test_where_nothing_helps_the_lowest_is_taken_and_is_not_bracketed():
    run, _ = watched(lambda rate: 1.0)
    found = search_rate(run, (1.0, 2.0), most=4)
    assert (found.rate, found.bracketed, found.best) == (0.25, False, "run at 0.25")


def test_a_loss_that_is_no_number_is_none():
    run, _ = watched(lambda rate: math.nan if rate == 1 else rate)
    assert search_rate(run, (1.0, 2.0), most=6).losses[1.0] == math.inf


@pytest.mark.parametrize("rates", [(1.0, 1.000001), (1e-300, 1.0), (1.0, 1e200)])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_search_ends(rates, sign):
    run, tried = watched(lambda rate: sign * rate)
    search_rate(run, rates)
    assert len(tried) <= 12


def test_a_search_that_finds_no_end_says_so():
    run, _ = watched(lambda rate: -rate)
    found = search_rate(run, (1.0, 2.0), most=5)
    assert (found.rate, found.bracketed, len(found.losses)) == (16.0, False, 5)


def test_a_single_rate_is_not_tried():
    found = search_rate(lambda rate: pytest.fail("tried"), (3.0,))
    assert found == (3.0, {}, False, None)


@pytest.mark.parametrize("rates", [(), (0.0, 1.0), (1.0, math.inf), (1.0, 1.0), (-1.0,)])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(InputError, match="rates"):
        search_rate(lambda rate: (0.0, None), rates)
