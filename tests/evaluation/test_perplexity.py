import jax
import numpy as np
import pytest

from gradot_jax.data.examples import eval_batches
from gradot_jax.errors import InputError
from gradot_jax.evaluation import perplexity as module
from gradot_jax.evaluation.perplexity import perplexity


def reference(log_probabilities, examples):
    table = log_probabilities(examples.input_ids, examples.attention_mask)
    losses = [
        -table[row, position, examples.targets[row, position]]
        for row, position in zip(*np.nonzero(examples.loss_mask), strict=True)
    ]
    return np.mean(losses), len(losses)


@pytest.mark.parametrize("batch_size", [2, 7, 9])
def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batches(
    config, params, examples, log_probabilities, batch_size
):
    mean, count = reference(log_probabilities, examples)
    result = perplexity(config, params, eval_batches(examples, batch_size))
    assert result.num_tokens == count
    np.testing.assert_allclose(result.nats_per_token, mean, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(mean), rtol=1e-5)


def test_evaluation_compiles_once_though_the_last_batch_is_short(config, params, examples):
    before = module.jitted_loss._cache_size()
    perplexity(config, params, eval_batches(examples, 3))
    perplexity(config, params, eval_batches(examples, 3))
    assert module.jitted_loss._cache_size() == before + 1


def test_a_diverged_model_has_infinite_perplexity(config, params, examples):
    huge = jax.tree.map(lambda leaf: leaf * 1e4, params)
    result = perplexity(config, huge, eval_batches(examples, 7))
    assert result.perplexity == np.inf and np.isfinite(result.nats_per_token)


def test_nothing_to_count_is_refused(config, params, examples):
    silent = examples._replace(loss_mask=np.zeros_like(examples.loss_mask))
    for batches in ([], eval_batches(silent, 7)):
        with pytest.raises(InputError, match="perplexity: no token counts"):
            perplexity(config, params, batches)
