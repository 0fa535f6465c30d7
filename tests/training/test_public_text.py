from itertools import islice

import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch
from gradot_jax.training.public_text import hold_out, shuffled_epochs


def numbered(count, counted=1.0):
    mask = np.full((1, 2), counted, np.float32)
    return [Batch(np.full((1, 2), i), np.full((1, 2), i), mask, mask) for i in range(count)]


def names(batches):
    return [int(batch.input_ids[0, 0]) for batch in batches]


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (15, 1), (16, 2), (33, 4)])
def test_the_last_eighth_is_held_out_and_nothing_of_very_few(count, held):
    rest, held_out = hold_out(numbered(count))
    assert names(rest) == list(range(count - held))
    assert names(held_out) == list(range(count - held, count))


def test_every_epoch_visits_every_batch_once_in_an_order_of_its_own():
    drawn = names(islice(shuffled_epochs(numbered(8), seed=3)(0), 24))
    epochs = [drawn[:8], drawn[8:16], drawn[16:]]
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(8))]
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("start", [0, 3, 8, 13])
def test_batches_after_a_step_are_those_of_an_uninterrupted_run(start):
    following = shuffled_epochs(numbered(8), seed=3)
    whole = names(islice(following(0), 24))
    assert names(islice(following(start), 24 - start)) == whole[start:]


def test_orders_depend_on_the_seed_alone():
    orders = [names(islice(shuffled_epochs(numbered(8), seed)(0), 8)) for seed in (1, 1, 2, -1)]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3


def test_text_without_batches_or_targets_is_refused():
    with pytest.raises(InputError, match="at least one batch"):
        hold_out([])
    with pytest.raises(InputError, match=r"last 1 of 5 batches .* no target"):
        hold_out(numbered(4) + numbered(1, counted=0.0))
    with pytest.raises(InputError, match=r"last 2 of 2 batches .* no target"):
        hold_out(numbered(2, counted=0.0))
