import jax
import numpy as np
import pytest

from gradot_jax.data.examples import eval_batches
from gradot_jax.errors import InputError
from gradot_jax.evaluation.exact_match import exact_match
from gradot_jax.evaluation.scores import sequence_scores


@pytest.fixture
def half_right(examples, log_probabilities):
    """The examples with the model's own choice as target at the counted tokens of some rows."""
    table = log_probabilities(examples.input_ids, examples.attention_mask)
    targets = examples.targets.copy()
    for row in (0, 2, 3):
        counted = examples.loss_mask[row] > 0
        targets[row, counted] = table[row].argmax(-1)[counted]
    # Row 3 has one counted token wrong, its last.
    last = np.nonzero(examples.loss_mask[3])[0][-1]
    targets[3, last] = (targets[3, last] + 1) % table.shape[-1]
    return examples._replace(targets=targets)


@pytest.mark.parametrize("batch_size", [3, 7])
def test_an_example_matches_when_every_counted_token_does(
    config, params, half_right, log_probabilities, batch_size
):
    table = log_probabilities(half_right.input_ids, half_right.attention_mask)
    likelihoods = [
        sum(
            table[row, position, half_right.targets[row, position]]
            for position in np.nonzero(half_right.loss_mask[row])[0]
        )
        for row in range(7)
    ]
    result = exact_match(config, params, eval_batches(half_right, batch_size))
    assert result.num_examples == 7
    assert result.exact_match == 2 / 7
    np.testing.assert_allclose(result.log_likelihood, np.mean(likelihoods), rtol=1e-6)


def test_rows_without_counted_tokens_are_left_out(config, params, half_right):
    mask = half_right.loss_mask.copy()
    mask[[0, 5]] = 0
    result = exact_match(config, params, eval_batches(half_right._replace(loss_mask=mask), 7))
    assert result.num_examples == 5
    assert result.exact_match == 1 / 5


def test_evaluation_compiles_once(config, params, half_right):
    before = sequence_scores._cache_size()
    exact_match(config, params, eval_batches(half_right, 4))
    assert sequence_scores._cache_size() == before + 1


def test_a_diverged_model_matches_a_share_that_is_no_number(config, params, half_right):
    lost = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    result = exact_match(config, lost, eval_batches(half_right, 7))
    assert np.isnan(result.exact_match) and np.isnan(result.log_likelihood)
    assert result.num_examples == 7


def test_nothing_to_count_is_refused(config, params, half_right):
    silent = half_right._replace(loss_mask=np.zeros_like(half_right.loss_mask))
    with pytest.raises(InputError, match="exact match: no token counts"):
        exact_match(config, params, eval_batches(silent, 7))
