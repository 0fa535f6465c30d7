import math

import pytest

from gradot_jax.errors import InputError
from gradot_jax.training.rate import search_rate


def watched(loss):
    tried = []

    def loss_of(rate):
        tried.append(rate)
        return loss(rate)

    return loss_of, tried


@pytest.mark.parametrize(
    ("optimum", "tries"), [(1, [1, 2, 0.5]), (2, [1, 2, 4]), (9, [1, 2, 4, 8, 16]), (0.25, None)]
)
def test_the_best_rate_lies_between_two_that_are_no_better(optimum, tries):
    loss_of, tried = watched(lambda rate: abs(math.log(rate / optimum)))
    found = search_rate(loss_of, (1.0, 2.0))
    assert found.bracketed
    assert found.losses.keys() == set(tried)
    assert min(tried) < found.rate < max(tried)
    assert found.losses[found.rate] == min(found.losses.values())
    assert tries is None or tried == tries


def test_a_series_goes_on_by_its_outermost_ratio():
    loss_of, tried = watched(lambda rate: -rate if rate < 50 else 0)
    assert search_rate(loss_of, (0.2, 1.0)).rate == 25
    assert tried == [0.2, 1, 5, 25, 125]


def test_rates_that_diverge_bracket_from_above():
    found = search_rate(lambda rate: math.inf if rate > 2 else -rate, (1.0, 2.0))
    assert (found.rate, found.bracketed, found.losses[4.0]) == (2.0, True, math.inf)


def test_of_rates_that_are_equal_the_lowest_is_taken():
    assert search_rate(lambda rate: float(rate < 1), (0.5, 1.0, 2.0, 4.0)).rate == 1.0


def test_a_search_that_finds_no_end_says_so():
    found = search_rate(lambda rate: -rate, (1.0, 2.0), most=5)
    assert (found.rate, found.bracketed, len(found.losses)) == (16.0, False, 5)


def test_a_single_rate_is_not_tried():
    found = search_rate(lambda rate: pytest.fail("tried"), (3.0,))
    assert (found.rate, found.losses, found.bracketed) == (3.0, {}, False)


@pytest.mark.parametrize("rates", [(), (0.0, 1.0), (1.0, math.inf), (1.0, 1.0), (-1.0,)])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(InputError, match="rates"):
        search_rate(lambda rate: 0.0, rates)
